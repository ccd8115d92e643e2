"""Recipes: TRL's own options and the activation section, parsed by TRL's own parser, with errors in one line."""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from crrelu_llm.errors import InputError, reading, reason_of
from crrelu_llm.patching import guard
from crrelu_llm.patching.mixture import text_of
from crrelu_llm.secrets import hidden_part, publishable
from crrelu_llm.training.activation_section import ActivationArguments
from crrelu_llm.training.blending import check_blend_ends
from crrelu_llm.training.kinds import kind_of
from crrelu_llm.training.launch import launch_keys

if TYPE_CHECKING:
    from crrelu_llm.training.kinds.kind import Kind


@dataclass
class Recipe:
    """A parsed recipe: TRL's four argument groups, the activation section, and the source of the recipe.

    Attributes:
        values: The requested options, in publishable form.
        hidden: A hash of the values that are hidden there, if any.
    """

    kind: "Kind"
    script: ScriptArguments
    training: Any
    model: ModelConfig
    mixture: DatasetMixtureConfig
    activation: ActivationArguments
    values: dict[str, Any]
    hidden: str | None
    source: str

    @property
    def loading(self) -> dict[str, Any]:
        """The options for every load of the recipe's model, where set: `revision`, `trust_remote_code`."""
        given = {"revision": self.model.model_revision, "trust_remote_code": self.training.trust_remote_code}
        return {key: value for key, value in given.items() if value}


class RecipeParser(TrlParser):
    """TRL's parser, with errors as InputError instead of a usage text and an exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.splitlines()[-1])


def make_parser(kind: str, prog: str | None = None, **kwargs: Any) -> RecipeParser:
    """The parser of `crrelu KIND`: every option of `trl KIND` and the activation section."""
    trl = kind_of(kind)
    groups: Any = (trl.script, trl.config, ModelConfig, DatasetMixtureConfig, ActivationArguments)
    # An abbreviated option would be accepted, but run.json would not record it.
    return RecipeParser(groups, prog=prog or f"crrelu {kind}", allow_abbrev=False, **kwargs)


def parse(kind: str, argv: list[str]) -> Recipe:
    """Parses `--config R.yaml --option value ...`; options override the file. Writes nothing.

    Raises:
        InputError: A missing file, an unknown key, a wrong type or an invalid value: one line, with the file.
    """
    parser = make_parser(kind)
    path, values = read_recipe(argv)
    where = f"{path}: " if path else ""
    if path:
        _check_keys(parser, values, where)
    sources = ["model_name_or_path", *(["model_config"] if hasattr(kind_of(kind).config, "model_config") else [])]
    if not any(values.get(key) or any(a.startswith(f"--{key}") for a in argv) for key in sources):
        _check_options(parser, argv)
        raise InputError(f"{where}{_no_model(kind)}")
    try:
        # Every key has been checked: those unknown to the parser are options of `accelerate launch`.
        script, training, model, mixture, activation = parser.parse_args_and_config(argv, fail_with_unknown_args=False)
    except InputError as error:
        raise InputError(f"{where}{_name_the_option(error)}") from error
    except Exception as error:  # the configs' own checks (bf16 on a CPU, strategies that contradict each other, ...)
        _check_options(parser, argv)
        raise InputError(f"{where}{reason_of(error)}") from error
    asked = values | _overrides(argv, parser)
    known, hidden = publishable(asked), hidden_part(asked)
    source = path or "the command line"
    recipe = Recipe(kind_of(kind), script, training, model, mixture, activation, known, hidden, source)
    with reading(source):
        _check(recipe, where)
    return recipe


def _no_model(kind: str) -> str:
    if hasattr(kind_of(kind).config, "model_config"):
        return "model_name_or_path is missing (a hub name or a directory), or model_config, for a model from scratch"
    return "model_name_or_path is missing: a hub name, a directory or a .gguf file"


def read_recipe(argv: list[str]) -> tuple[str | None, dict[str, Any]]:
    """Path and unchecked keys of the recipe named on a command line; None and no keys if it names none."""
    path = _config_path(argv)
    return path, _read_yaml(path) if path else {}


def _config_path(argv: list[str]) -> str | None:
    for index, argument in enumerate(argv):
        if argument.startswith("--config="):
            raise InputError("write --config FILE, with a space")
        if argument == "--config":
            if index + 1 == len(argv):
                raise InputError("--config needs a file")
            return argv[index + 1]
    return None


def _read_yaml(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise InputError(f"no such recipe: {path} (`crrelu recipes list` shows the shipped ones)")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {reason_of(error)}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: a recipe is a list of `key: value` lines")
    if isinstance(values.get("activation"), dict):  # one per layer
        values["activation"] = text_of(values["activation"])
    return values


def _check_keys(parser: RecipeParser, values: dict[str, Any], where: str) -> None:
    """Reports all unknown keys and wrong types in one line."""
    actions = {action.dest: action for action in parser._actions}
    single = _single_options(parser)
    problems = []
    for key, value in values.items():
        if key == "env" or (key not in actions and key in launch_keys()):
            continue
        if key not in actions:
            close = difflib.get_close_matches(str(key), actions, 1)
            problems.append(f"unknown key {key!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
            continue
        kind = actions[key].type
        if value is None and actions[key].default is not None and not single.get(key, True):
            problems.append(f"{key} is empty; give it a value, or leave it out")
            continue
        if value is None or actions[key].nargs not in (None, "?"):
            continue
        if kind in (int, float):
            try:
                fine = not isinstance(value, (bool, list, dict)) and kind(value) == float(value)
            except (TypeError, ValueError, OverflowError):
                fine = False
            if not fine:
                problems.append(f"{key} must be a number{' (whole)' if kind is int else ''}, not {value!r}")
        elif (choices := list(actions[key].choices or ())) and value not in choices:
            problems.append(f"{key} must be one of {', '.join(map(str, choices))}, not {value!r}")
        elif key in single and isinstance(value, (list, dict)):
            problems.append(f"{key} must be a single value, not {value!r}")
    if problems:
        raise InputError(where + "; ".join(problems))


def _single_options(parser: RecipeParser) -> dict[str, bool]:
    """Options with a single value, and whether the value may be empty. Many of TRL's options that the command line
    takes as text may be a list or a dictionary, and are not included."""
    hints = {name: hint for group in parser.dataclass_types for name, hint in get_type_hints(group).items()}
    plain = {name: {hint} if get_origin(hint) is None else set(get_args(hint)) for name, hint in hints.items()}
    one = {str, int, float, bool, NoneType}
    return {
        name: NoneType in kinds
        for name, kinds in plain.items()
        if kinds <= one and get_origin(hints[name]) is not list
    }


def _check_options(parser: RecipeParser, argv: list[str]) -> None:
    """Reports unknown options of the command line, as the user wrote them."""
    known = [option for action in parser._actions for option in action.option_strings] + ["--config"]
    for argument in argv:
        option = argument.partition("=")[0]
        if option.startswith("--") and option not in known:
            close = difflib.get_close_matches(option, known, 1)
            raise InputError(f"unknown option {option}" + (f" (did you mean {close[0]}?)" if close else ""))


def _name_the_option(error: InputError) -> str:
    return str(error).removeprefix("argument ")


def _check(recipe: Recipe, where: str) -> None:
    script, training, model, mixture = recipe.script, recipe.training, recipe.model, recipe.mixture
    activation = recipe.activation
    if activation.activation == "native":
        raise InputError(
            f"{where}native is an arm of `crrelu compare`; leave activation out (--activation null) to train the "
            "unpatched model"
        )
    if not model.model_name_or_path and getattr(training, "model_config", None) is None:
        raise InputError(f"{where}{_no_model(recipe.kind.name)}")
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(training, key) < 1:
            raise InputError(f"{where}{key} must be 1 or more, not {getattr(training, key)}")
    if not script.dataset_name and not mixture.datasets:
        raise InputError(
            f"{where}dataset_name is missing: a hub name, a local file or directory, or builtin:docstrings"
        )
    for name in training.report_to or ():
        if not isinstance(name, str) or name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise InputError(f"{where}report_to: unknown tracker {name!r}; choose from {known}")
    if activation.patch_config(where) is not None and training.use_liger_kernel:
        guard.refuse_mlp_kernels(training.liger_kernel_config or {}, where)
    if training.max_steps > 0:
        check_blend_ends(activation.blend_steps, training.max_steps, where)
    if activation.recompute_activation and training.torch_compile:
        raise InputError(
            f"{where}recompute_activation has no effect in a compiled model, which decides itself what to store; "
            "leave it or torch_compile out"
        )
    if activation.activation_l1 and training.torch_compile:
        raise InputError(
            f"{where}activation_l1 observes every activation with a hook, which a compiled model does not allow; "
            "leave it or torch_compile out"
        )
    if activation.density_update_steps:
        _check_density_updates(training, where)
    if recipe.kind.name != "sft" and activation.distill_weight:
        raise InputError(f"{where}distill_weight is for SFT; leave it out of {recipe.kind.name}")
    recipe.kind.check(recipe, where)
    if training.output_dir and Path(training.output_dir).is_file():
        raise InputError(f"{where}output_dir {training.output_dir} is a file")
    parent = Path(training.output_dir or ".").absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{where}output_dir {training.output_dir}: cannot write in {parent}; choose another")


def _check_density_updates(training: Any, where: str) -> None:
    if training.torch_compile:
        raise InputError(
            f"{where}density_update_steps observes every activation with a hook, which a compiled model does not "
            "allow; leave it or torch_compile out"
        )
    if getattr(training, "sync_ref_model", False):
        raise InputError(
            f"{where}sync_ref_model does not go with density_update_steps: it would update the weights of the "
            "reference but not its centres and widths; leave one of them out"
        )


def _overrides(argv: list[str], parser: RecipeParser) -> dict[str, Any]:
    """The options given on the command line, as parsed."""
    given = {option for option in argv if option.startswith("--")}
    names = {
        action.dest
        for action in parser._actions
        for option in action.option_strings
        if option in given or any(argument.startswith(option + "=") for argument in given)
    }
    if not names:
        return {}
    namespace, _ = parser.parse_known_args([a for a in _without_config(argv)])
    return {name: getattr(namespace, name) for name in sorted(names) if hasattr(namespace, name)}


def _without_config(argv: list[str]) -> list[str]:
    if "--config" not in argv:
        return argv
    index = argv.index("--config")
    return argv[:index] + argv[index + 2 :]
