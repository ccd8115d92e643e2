"""The attributes of a kind of training: TRL's classes, the data it takes, and its evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl import ScriptArguments

from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.measured import Evaluated, ItemText

Row = dict[str, Any]


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
        name: The name of the command, such as `"dpo"`.
        label: The name in words, as the field uses it.
        example: A command, for `--help`.
        config: TRL's configuration class: the options of a recipe.
        trainer: Our subclass of TRL's trainer.
        items: The word for its evaluation items, in the plural.
        needs: The columns it takes, in words.
        takes: Whether it can use data with these columns, given the recipe's training arguments.
        parts: Names of the trained parts of a row, each a text or messages.
        evaluate: Metrics of a trainer's model on its evaluation data and, for each metric that is a mean over items,
            the values of the items in the order of the data.
        texts: The texts of the evaluation items, for the report.
        headline: The metric of the verdict; it has a value for every item.
        logged: The evaluation metric that TRL logs in training, and whether higher is better.
        script: TRL's script arguments, which include the data set.
        auto_class: transformers' class that loads the model.
        reference: Whether training needs a frozen copy of the model, unless a recipe says otherwise (GRPO with a beta
            above 0).
        sequences: How many sequences of a row go through the model together.
        samples: Whether the model samples the answers on which it is trained.
        prepare: Converts a split into a form that TRL accepts; called with the split and the recipe.
        drawn: Orders the training rows for one seed of a comparison, if the trainer itself does not shuffle them.
        check: Raises InputError for incompatible options; called with the recipe and a prefix for messages.
        arguments: Further arguments of the trainer.
        skeleton: Builds and checks the recipe's model without weights, if it is not a language model.
        check_rows: Raises InputError for an unusable row, if rows are not text; called with the recipe, a split and
            its name.
        start: The MODEL from which a run starts before any patch; called with the recipe, the training rows, and a
            directory to make the model in.
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
    texts: Callable[[Any], list[ItemText]]
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
    """Raises InputError if a reference that follows the trained weights would keep an outdated activation."""
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
