"""Reward functions of GRPO and RLOO: by TRL's names, by import path or from a file; tested before training."""

import asyncio
import contextlib
import copy
import functools
import importlib
import importlib.util
import inspect
import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import trl.rewards
from transformers import TrainerCallback
from trl.data_utils import is_conversational

from crrelu_llm.compat.vllm import leave_alone
from crrelu_llm.data.pairs import holds_pairs
from crrelu_llm.errors import InputError, reading, reason_of
from crrelu_llm.training.kinds.kind import refuse_moving_references

logger = logging.getLogger("crrelu_llm")
# Names known to TRL's scripts.
_NAMED = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
_OVERLONG = "get_soft_overlong_punishment"
_TRIED = 2  # rows in the test


def has_prompts(columns: set[str], args: Any) -> bool:
    """Whether data with these columns has prompts from which to sample answers."""
    return bool({"prompt", "messages"} & columns) or holds_pairs(columns)


def parts_of_a_prompt(recipe: Any, row: dict[str, Any]) -> list[str]:
    """The only part of a row."""
    return ["prompt"]


def refuse_blend(recipe: Any, where: str) -> None:
    """Raises InputError for a gradual swap: sampling and training would use different activations."""
    refuse_moving_references(recipe, where)
    if recipe.activation.blend_steps:
        raise InputError(f"{where}blend_steps is not for {recipe.kind.name}, which samples its answers; leave it out")


def reward_arguments(recipe: Any) -> dict[str, Any]:
    """The trainer's `reward_funcs`: a reward model and the functions of the recipe, each checked at every call.

    Raises:
        InputError: No reward function is given, or one cannot be found.
    """
    script, where = recipe.script, f"{recipe.source}: reward_funcs"
    found: list[Any] = [script.reward_model_name_or_path] if script.reward_model_name_or_path else []
    found += [checked(load_function(name, where)) for name in script.reward_funcs or ()]
    if not found:
        known = ", ".join((*_NAMED, _OVERLONG))
        raise InputError(
            f"{recipe.source}: reward_funcs is missing: {known}, an import path (package.module.function), or a file "
            "(rewards.py:function); or set reward_model_name_or_path"
        )
    return {"reward_funcs": found}


def load_function(name: str, where: str) -> Callable[..., Any]:
    """Loads a reward function by one of TRL's names, an import path, or `FILE.py:FUNCTION`.

    Raises:
        InputError: The function cannot be found.
    """
    if name in _NAMED:
        return getattr(trl.rewards, name)
    if name == _OVERLONG:  # with the values of TRL's scripts
        return trl.rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    file, colon, attribute = name.rpartition(":")
    with reading(f"{where} {name}", "give one of TRL's names, package.module.function, or FILE.py:FUNCTION"):
        if colon:
            spec = importlib.util.spec_from_file_location(Path(file).stem, file)
            if spec is None or spec.loader is None or not Path(file).is_file():
                raise InputError(f"no such file: {file}")
            _search(str(Path(file).resolve().parent))  # for modules beside the file
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            place, dot, attribute = name.rpartition(".")
            if not dot:
                raise InputError("no such function")
            _search("")
            module = importlib.import_module(place)
        if not callable(getattr(module, attribute, None)):
            raise InputError(f"{module.__name__} has no function {attribute}")
    return getattr(module, attribute)


def _search(folder: str) -> None:
    """Lets imports find the modules in a folder."""
    if folder not in sys.path:
        sys.path.insert(0, folder)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a reward function to raise InputError if it fails, or returns anything but a finite number or None for
    each answer."""
    name = getattr(function, "__name__", type(function).__name__)
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wait(*args: Any, **kwargs: Any) -> Any:
            with _named(name):
                rewards = await function(*args, **kwargs)
            return _judged(name, rewards, kwargs["completions"])

        return wait

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _named(name):
            rewards = function(*args, **kwargs)
        return _judged(name, rewards, kwargs["completions"])

    return call


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Reports failures of a reward function in one line."""
    try:
        yield
    except Exception as error:
        raise InputError(f"the reward function {name} failed: {reason_of(error)}") from error


def _judged(name: str, rewards: Any, answers: list[Any]) -> Any:
    """Checks and returns the rewards of a reward function."""
    if not hasattr(rewards, "__len__") or len(rewards) != len(answers):
        many = f"{len(rewards)} rewards" if hasattr(rewards, "__len__") else f"{rewards!r:.40}"
        raise InputError(f"the reward function {name} returned {many} for {len(answers)} answers; return one for each")
    for number, reward in enumerate(rewards, 1):
        if reward is not None and not _finite(reward):
            raise InputError(
                f"the reward function {name} returned {reward!r:.40} for answer {number}; return a finite number, or "
                "None for an answer that it does not judge"
            )
    return rewards


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


class SampledMixin:
    """Extends a trainer that samples its answers: tests the reward functions before training, and continues the step
    count after a resume."""

    args: Any
    model: Any
    ref_model: Any
    state: Any
    train_dataset: Any
    reward_funcs: list[Any]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for model in (self.model, self.ref_model):
            if model is not None and getattr(self.args, "use_vllm", False):
                leave_alone(model)
        self._try_rewards()
        self.add_callback(_CountOn(self))  # type: ignore[attr-defined]

    def _try_rewards(self) -> None:
        """Calls every reward function once, on a few prompts with a made-up answer.

        Raises:
            InputError: A function fails, or returns an unusable reward.
        """
        rows = [row for row, _ in zip(self.train_dataset, range(_TRIED), strict=False)]
        prompts = [row["prompt"] for row in rows]
        talks = is_conversational({"prompt": prompts[0]})
        answer: Any = [{"role": "assistant", "content": "An answer."}] if talks else "An answer."
        columns: dict[str, Any] = {
            key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion")
        }
        columns |= {"trainer_state": self.state, "log_extra": _ignore, "log_metric": _ignore}
        for function in self.reward_funcs:
            if hasattr(function, "__wrapped__"):
                given = copy.deepcopy({"prompts": prompts, "completions": [answer for _ in rows]})
                rewards = function(**given, completion_ids=[[0] for _ in rows], **columns)
                if inspect.iscoroutine(rewards):
                    asyncio.run(rewards)


class _CountOn(TrainerCallback):
    """Continues the step count of a resumed training; TRL restarts it at 0, and it determines when to sample."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets TRL's count of micro-batches."""
        self.trainer._step = state.global_step * args.gradient_accumulation_steps
        every = args.steps_per_generation * args.num_iterations
        if self.trainer._step % every:
            logger.warning(
                "the checkpoint lies between two samplings of answers (one in %d steps): the resumed run samples "
                "again and differs from the stopped run; choose a multiple of that number as save_steps",
                every // args.gradient_accumulation_steps,
            )


def _ignore(*args: Any, **kwargs: Any) -> None:
    return None
