"""Evaluates a trainer that samples: the mean reward of greedy answers to held-out prompts, with a value per prompt."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from trl.data_utils import is_conversational

from crrelu_llm.evaluation.items import columns_of, computing_model, evaluating
from crrelu_llm.evaluation.measured import SHOWN, Evaluated, ItemText


def evaluate_generated(trainer: Any) -> Evaluated:
    """Reward and length of greedily decoded answers, and their divergence from the reference; items are the prompts.

    The reward of an answer is the weighted sum over the reward functions, as in training; an answer without a score
    counts 0. `kl` is the mean of log π − log π_ref over an answer's tokens (nats, at the sampling temperature), if the
    recipe has a β and therefore a reference model. Every process answers all prompts, because a sharded model needs
    all processes.
    """
    rows = list(trainer.eval_dataset)
    size, found = trainer.args.per_device_eval_batch_size, []
    kept = {name: list(values) for name, values in trainer._metrics["eval"].items()}
    starts = tqdm(range(0, len(rows), size), desc="Answering", disable=not trainer.accelerator.is_main_process)
    with evaluating(trainer), greedy(trainer):
        for start in starts:
            found.append(_answered(trainer, rows[start : start + size]))
    trainer._metrics["eval"].clear()
    trainer._metrics["eval"].update(kept)
    for name in ("_pending_metrics", "_pending_extra_logs"):  # logs of the reward functions about these answers
        getattr(trainer, name, {}).clear()
    items = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    metrics = {name: float(values.mean()) for name, values in items.items()}
    return metrics, {name: values.tolist() for name, values in items.items()}


def _answered(trainer: Any, rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    prompts = [row["prompt"] for row in rows]
    prompt_ids, completion_ids, *rest = trainer._generate(prompts)
    completions = rest[1] if len(rest) > 1 else rest[0]  # GRPO returns a tool mask before them
    if is_conversational({"prompt": prompts[0]}):
        prompts = copy.deepcopy(prompts)  # a reward function may change its copy
    scores = (
        trainer._calculate_rewards(copy.deepcopy(rows), prompts, completions, completion_ids)[: len(rows)]
        .double()
        .cpu()
    )
    rewards = (scores * trainer.reward_weights.double().cpu()).nansum(1)
    found = {"reward": rewards.numpy(), "answer_tokens": np.array([float(len(ids)) for ids in completion_ids])}
    if trainer.beta:
        found["kl"] = _divergence(trainer, prompt_ids, completion_ids)
    return found


@torch.no_grad()
def _divergence(trainer: Any, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> np.ndarray:
    """The mean of log π − log π_ref over the tokens of each answer, `(prompts,)`; 0 for an empty answer."""
    values = []
    for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
        if not completion:
            values.append(0.0)
            continue
        ids = torch.tensor([[*prompt, *completion]], device=trainer.accelerator.device)
        arguments = (ids, torch.ones_like(ids), len(completion))
        policy = trainer._get_per_token_logps_and_entropies(computing_model(trainer), *arguments)[0]
        with _reference(trainer) as model:
            reference = trainer._get_per_token_logps_and_entropies(model, *arguments)[0]
        values.append((policy.double() - reference.double()).mean().item())
    return np.array(values)


@contextlib.contextmanager
def _reference(trainer: Any) -> Iterator[Any]:
    """A context with the reference model: a copy of the first model, or the base model with the adapter disabled."""
    if trainer.ref_model is not None:
        yield trainer.ref_model
        return
    with trainer.accelerator.unwrap_model(trainer.model).disable_adapter():
        yield computing_model(trainer)


@contextlib.contextmanager
def greedy(trainer: Any) -> Iterator[None]:
    """A context in which the trainer decodes greedily."""
    if getattr(trainer, "use_vllm", False):
        engine, several = trainer.vllm_generation, trainer.num_generations_eval
        sampled = engine.temperature
        engine.temperature, trainer.num_generations_eval = 0.0, 1
        trainer._last_loaded_step = -1  # load_best_model_at_end changes the weights without a step
        try:
            yield
        finally:
            engine.temperature, trainer.num_generations_eval = sampled, several
        return
    before, options = trainer.generation_config, getattr(trainer, "generation_kwargs", None)
    trainer.generation_config = copy.deepcopy(before)
    trainer.generation_config.update(do_sample=False, temperature=1.0, top_p=1.0, top_k=50, min_p=None)
    if options is not None:
        trainer.generation_kwargs = options | {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    try:
        yield
    finally:
        trainer.generation_config = before
        if options is not None:
            trainer.generation_kwargs = options


def prompt_texts(trainer: Any) -> list[ItemText]:
    """The end of each prompt."""
    if "prompt" not in columns_of(trainer.eval_dataset):
        return []
    prompts = trainer.eval_dataset["prompt"]
    return [ItemText(prompt=_plain(prompt)[-SHOWN:], options=[]) for prompt in prompts]


def _plain(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(turn["content"]) for turn in prompt)
