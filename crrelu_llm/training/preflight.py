"""Checks before the long work: packages, trackers, access to the hub, rows, and saving."""

import itertools
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, Trainer
from transformers.integrations import integration_utils
from trl.data_utils import is_conversational_from_value, maybe_convert_to_chatml

from crrelu_llm.data.messages import are_messages, say_something
from crrelu_llm.errors import InputError, reading, reason_of
from crrelu_llm.patching import loading
from crrelu_llm.training.arguments import Recipe

logger = logging.getLogger("crrelu_llm")
_OF_A_STREAM = 100  # rows checked in a stream, which cannot be read ahead as a whole


def check_machine(recipe: Recipe) -> None:
    """Checks the requirements of a recipe outside this package: optional packages, trackers, a login.

    Raises:
        InputError: A requirement is missing.
    """
    args, where = recipe.training, recipe.source
    for name in args.report_to or ():
        short = {"azure_ml": "azureml", "comet_ml": "comet"}.get(name, name)
        available = getattr(integration_utils, f"is_{short}_available", None)
        if available is not None and not available():
            package = {"azure_ml": "azureml-core"}.get(name, name)
            raise InputError(f"{where}: report_to {name}: pip install {package}, or set report_to: none")
    if "wandb" in (args.report_to or ()):
        _check_wandb(where)
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise InputError(f"{where}: optim {args.optim}: {reason_of(error)}") from error
    except Exception:  # some optimisers need the model, which is not loaded yet
        pass
    if args.use_liger_kernel:
        with reading(f"{where}: use_liger_kernel", "pip install liger-kernel, or leave it out"):
            import liger_kernel.transformers  # noqa: F401
    if args.push_to_hub:
        from huggingface_hub import whoami

        with reading(f"{where}: push_to_hub", "log in with `hf auth login`, or leave it out"):
            whoami(token=args.hub_token)


def _check_wandb(where: str) -> None:
    import wandb

    if os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun"):
        return
    with reading(f"{where}: report_to wandb", "log in with `wandb login`, or set WANDB_MODE=offline"):
        if not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            raise ValueError("no API key")


def check_model(recipe: Recipe) -> None:
    """Builds the model without weights from its config and the recipe's options, with the trainer's head.

    Raises:
        InputError: The model cannot be built, or lacks the head to train.
    """
    if recipe.kind.skeleton is not None:
        recipe.kind.skeleton(recipe)
        return
    model, attention = str(recipe.model.model_name_or_path), recipe.model.attn_implementation
    if loading.is_gguf(model):
        return
    chosen, wanted = {"attn_implementation": attention} if attention else {}, recipe.kind.auto_class
    with reading(f"{recipe.source}: {model}", "choose other options, or another model"):
        config = loading.load_config(model, **recipe.loading)
        found = loading.head_of(config)
        if found != wanted and (wanted == loading.CAUSAL_LM or found == loading.IMAGE_CLASSIFIER):
            instead = "image trains it" if found == loading.IMAGE_CLASSIFIER else "reward trains classifiers"
            raise InputError(
                f"{model} is {loading.HEADS[found]}, without a head that predicts tokens, which {recipe.kind.name} "
                f"trains; give a language model (crrelu {instead})"
            )
        loading.skeleton(model, auto_class=wanted, **recipe.loading, **chosen)


def tokenizer_of(recipe: Recipe) -> Any:
    """The tokenizer for the rows, with the recipe's chat template.

    Raises:
        InputError: The tokenizer cannot be loaded, or has tokens without an embedding in the model.
    """
    model = str(recipe.model.model_name_or_path)
    tokenizer = loading.load_tokenizer(model, **recipe.loading)
    config = loading.load_config(model, **recipe.loading)
    source = getattr(recipe.training, "chat_template_path", None)
    if source is None:
        loading.require_embeddings(tokenizer, getattr(config.get_text_config(), "vocab_size", None), model)
    elif source.endswith((".jinja", ".j2")):
        with reading(f"{recipe.source}: chat_template_path {source}", "check the path"):
            tokenizer.chat_template = Path(source).read_text(encoding="utf-8")
    else:  # the template brings its own tokens, for which TRL adds embeddings to the model
        with reading(f"{recipe.source}: chat_template_path {source}", "check the path"):
            tokenizer = AutoTokenizer.from_pretrained(source)
    return tokenizer


def text_check(recipe: Recipe) -> Callable[[Recipe, Any, str], None]:
    """A check of every row of text with the recipe's tokenizer (see `check_rows`)."""
    tokenizer = tokenizer_of(recipe)
    return lambda recipe, rows, name: check_rows(recipe, rows, name, tokenizer)


def check_rows(recipe: Recipe, rows: Any, name: str, tokenizer: Any) -> None:
    """Checks every row as TRL will use it: its parts, and its rendering by the chat template.

    Args:
        rows: A split; of a stream only the first rows are checked.
        name: The name of the data, for messages.
        tokenizer: The model's tokenizer, with the chat template of the training.

    Raises:
        InputError: A row cannot be used; the message has its number, counted from 1.
    """
    if rows is None or (getattr(recipe.training, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
        return
    first = next(iter(rows), None)
    if first is None:
        return
    converts, conversational = is_conversational_from_value(first), None
    last = max(tokenizer.get_vocab().values()) if "input_ids" in first else 0
    some = rows if hasattr(rows, "__len__") else itertools.islice(rows, _OF_A_STREAM)
    for number, row in enumerate(tqdm(some, desc=f"Reading {name}", delay=5, leave=False), 1):
        with reading(f"{name}: row {number}", "mend the row, or leave it out", ours=True):
            if "input_ids" in first:
                _check_ids(row, last)
                continue
            if "chosen_ids" in first:  # already tokenised
                continue
            if "label" in first and "completion" in first and row["label"] not in (0, 1):
                raise InputError(f"label is {row['label']!r:.40}; it must be true (desirable) or false")
            row = maybe_convert_to_chatml(row) if converts else row
            sides = _sides(recipe, row)
            talks = not isinstance(next(iter(sides.values())), str)
            if conversational not in (None, talks):
                raise InputError(f"it is {_kind(talks)}, but the previous rows are {_kind(not talks)}")
            conversational = talks
            if talks:
                _render(tokenizer, row, sides)


def _check_ids(row: dict[str, Any], last: int) -> None:
    """Checks a row that is already tokenised."""
    ids, labels = row["input_ids"], row.get("labels")
    if not isinstance(ids, list) or not ids or not all(isinstance(entry, int) and 0 <= entry <= last for entry in ids):
        raise InputError(f"input_ids are not a list of tokens from 0 to {last}")
    if labels is not None and len(labels) != len(ids):
        raise InputError(f"there are {len(ids)} input_ids, and {len(labels)} labels")


def _kind(conversational: bool) -> str:
    return "a conversation" if conversational else "plain text"


def _sides(recipe: Recipe, row: dict[str, Any]) -> dict[str, Any]:
    """The trained parts of a row, each a text or messages."""
    names = recipe.kind.parts(recipe, row)
    sides = {name: row.get(name) for name in names}
    for name, side in sides.items():
        if not isinstance(side, str) and not (are_messages(side) and say_something(side or [])):
            raise InputError(f"{name} is neither text nor a list of messages: {side!r:.60}")
    if len({isinstance(side, str) for side in sides.values()}) > 1:
        raise InputError(f"{' and '.join(names)} must all be texts, or all messages")
    return sides


def _render(tokenizer: Any, row: dict[str, Any], sides: dict[str, Any]) -> None:
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = json.loads(tools)
    prompt = sides.get("prompt") or []
    options = {"tools": tools, **row.get("chat_template_kwargs", {})}
    for side in [side for name, side in sides.items() if name != "prompt"]:
        tokenizer.apply_chat_template([*prompt, *side], tokenize=False, **options)
    if len(sides) == 1 and prompt:  # the prompt for sampling
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **options)


def check_prepared(trainer: Any, recipe: Recipe, given: dict[str, int | None]) -> None:
    """Checks the rows that TRL has prepared: their number, their length, and whether they have trained tokens.

    Args:
        given: How many rows each split had, by name; None for a stream.

    Raises:
        InputError: No row is left, or a row is longer than the model's table of positions.
    """
    for name, data in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset)):
        if data is None or not hasattr(data, "__len__"):
            continue
        rows, own = given.get(name), getattr(trainer.args, "eval_packing", None) if name == "eval" else None
        packed = getattr(trainer.args, "packing", False) if own is None else own
        cut = f"max_length is {getattr(recipe.training, 'max_length', None)}"
        if len(data) == 0 or ("labels" in data.column_names and not _any_label(data)):
            raise InputError(
                f"{recipe.source}: no row of the {name} data has a token to train on: {cut}, and prompts alone fill "
                "it, or everything is masked; raise max_length, or check the data"
            )
        if rows is not None and not packed and len(data) < rows:
            logger.warning(
                "%d of %d rows of the %s data are left out: they have no token to train on (%s)",
                rows - len(data), rows, name, cut,
            )  # fmt: skip
        if not packed:
            _check_positions(trainer, data, f"{recipe.source}: {name} data")


def _any_label(data: Any) -> bool:
    return any(any(label != -100 for label in labels) for labels in data["labels"])


def _check_positions(trainer: Any, data: Any, where: str) -> None:
    """Refuses rows beyond a table of positions; warns of rotary positions beyond those of the model's training."""
    model = trainer.model
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    most = getattr(trainer.args, "max_length", None)
    if not positions or (most or positions + 1) <= positions:
        return
    longest = min(_longest(trainer, data), most or positions + 1_000_000)  # pairs are truncated when they are batched
    if longest <= positions:
        return
    table = any(
        isinstance(module, nn.Embedding) and positions <= module.num_embeddings <= positions + 2
        for name, module in model.named_modules()
        if "pos" in name or name.endswith("wpe")
    )
    said = f"{where}: the longest row has {longest} tokens, but the model has {positions} positions"
    if table:
        raise InputError(f"{said}; set max_length to {positions} or less")
    logger.warning("%s: the model was not trained for longer rows", said)


def _longest(trainer: Any, data: Any) -> int:
    """Tokens in the longest sequence of any row; 0 if unknown."""
    lengths = {name: [len(ids) for ids in data[name]] for name in data.column_names if name.endswith("_ids")}
    if "input_ids" in lengths:
        return max(lengths["input_ids"], default=0)
    answers = [values for name, values in lengths.items() if name != "prompt_ids"]
    starts = lengths.get("prompt_ids", [0] * len(data))  # without this column, the answers include the prompts
    if not answers and "prompt" in data.column_names and hasattr(trainer, "_tokenize_prompts"):  # they are sampled
        starts = [len(ids) for ids in trainer._tokenize_prompts(list(data["prompt"]))[0]]
        answers = [[trainer.args.max_completion_length or 0] * len(data)]
    return max((start + max(row) for start, *row in zip(starts, *answers, strict=True)), default=0) if answers else 0


def try_saving(trainer: Any, recipe: Recipe) -> None:
    """Saves everything but the weights, as the end of training will, where a failure would cost the training.

    Raises:
        InputError: A part cannot be saved.
    """
    model, adapts = trainer.model, hasattr(trainer.model, "peft_config")
    base = model.get_base_model() if adapts else model
    parts = {
        "the model's config": base.config,
        "its generation config": getattr(base, "generation_config", None) if base.can_generate() else None,
        "the tokenizer": trainer.processing_class,
    }
    place = Path(trainer.args.output_dir)
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".trial.", suffix=".tmp") as made:
        for name, part in parts.items():
            if part is not None:
                with reading(f"{recipe.source}: {name} could not be saved after training", "correct it first"):
                    part.save_pretrained(made)
