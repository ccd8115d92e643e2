"""What a kind of training answers: TRL's classes, the data it takes, and what an evaluation of it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl import ScriptArguments

from crrelu_llm.errors import InputError

Row = dict[str, Any]
Evaluated = tuple[dict[str, float], dict[str, list[float]]]


def _no_arguments(recipe: Any) -> dict[str, Any]:
    return {}


def _no_check(recipe: Any, where: str) -> None:
    return None


def _in_order(train: Any, seed: int) -> Any:
    return train


def _as_it_is(split: Any, recipe: Any) -> Any:
    return split


@dataclass(frozen=True)
class Kind:
    """A kind of training.

    Attributes:
        name: Of the command: `"dpo"`.
        label: In words, with the name that the field uses.
        example: A command, for `--help`.
        config: TRL's configuration: the options of a recipe.
        trainer: Our class over TRL's trainer.
        items: What an item of its evaluation is called, in the plural.
        needs: The columns it takes, in words.
        takes: Whether it can use data of these columns, given the recipe's training arguments.
        parts: Names of the parts of a row that are trained on, each a text or messages.
        evaluate: Metrics of a trainer's model on its evaluation data, and for each of them that is a mean over items,
            the items' values in the order of the data.
        texts: What to show of each evaluation item: `prompt` and `options`, the right one first.
        headline: The metric that a verdict is about; a value for every item.
        logged: The metric of an evaluation that TRL logs while it trains, and whether a higher one is better.
        script: TRL's arguments of its script, of which the data set is one.
        auto_class: transformers' class that loads the model.
        reference: Whether a frozen copy of the model is held beside the trained one, unless a recipe says otherwise
            (GRPO with a beta above 0).
        sequences: How many sequences of a row go through the model together.
        samples: Whether the model writes the answers that it is trained on.
        prepare: Brings a split into a shape that TRL takes; called with the split and the recipe.
        drawn: The training rows of one seed of a comparison, where the trainer itself takes them in their order.
        check: Raises InputError for options that do not go together; called with the recipe and a prefix for messages.
        arguments: Further arguments of the trainer.
        skeleton: The recipe's model without weights, checked, where that is not a language model's.
        check_rows: Raises InputError for a row that cannot be used, where rows are no text; called with the recipe, a
            split and its name.
        start: The MODEL that a run starts from before any patch; called with the recipe, the training rows, and a
            directory to make it in.
    """

    name: str
    label: str
    example: str
    config: type
    trainer: type
    items: str
    needs: str
    takes: Callable[[set[str], Any], bool]
    parts: Callable[[Any, Row], Sequence[str]]
    evaluate: Callable[[Any], Evaluated]
    texts: Callable[[Any], list[dict[str, Any]]]
    headline: str = "loss"
    logged: tuple[str, bool] = ("eval_loss", False)
    script: type = ScriptArguments
    auto_class: str = "AutoModelForCausalLM"
    reference: bool = False
    sequences: int = 1
    samples: bool = False
    prepare: Callable[[Any, Any], Any] = _as_it_is
    drawn: Callable[[Any, int], Any] = _in_order
    check: Callable[[Any, str], None] = _no_check
    arguments: Callable[[Any], dict[str, Any]] = _no_arguments
    skeleton: Callable[[Any], Any] | None = None
    check_rows: Callable[[Any, Any, str], None] | None = None
    start: Callable[[Any, Any, Path], str] | None = None


def refuse_moving_references(recipe: Any, where: str) -> None:
    """Raises InputError where a reference that follows the trained weights would keep what these move away from."""
    if not getattr(recipe.training, "sync_ref_model", False):
        return
    if recipe.activation.blend_steps:
        raise InputError(
            f"{where}sync_ref_model does not go with blend_steps: the reference keeps the original activation, which "
            "the trained weights move away from; leave one of them out"
        )
    if recipe.activation.affine_learning_rate:
        raise InputError(
            f"{where}sync_ref_model does not go with affine_learning_rate: the reference keeps scale, shift, gain and "
            "offset, which the trained weights move away from; leave one of them out"
        )
