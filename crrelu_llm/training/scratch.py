"""The starting image model of a run, before any patch: initialised from a config, or a checkpoint with a new head."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from crrelu_llm.data.images import label_names
from crrelu_llm.errors import InputError, reading
from crrelu_llm.files import remove
from crrelu_llm.patching import fingerprint, loading
from crrelu_llm.training.arguments import Recipe
from crrelu_llm.training.processes import main_process_first

logger = logging.getLogger("crrelu_llm")
_MADE_OF = "starting_model.json"
_SHOWN = 8


def image_config(recipe: Recipe) -> Any:
    """The config of a recipe's model: that of its checkpoint, or made from `model_config`, still without labels.

    Raises:
        InputError: The config cannot be read, or is not that of an image classifier.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as classes

    given, where = recipe.training.model_config, recipe.source
    if given is None:
        name = str(recipe.model.model_name_or_path)
        config = loading.load_config(name, **recipe.loading)
    else:
        name = f"{where}: model_config"
        values = _values(given, name)
        with reading(name, "check its keys and values"):
            config = AutoConfig.for_model(**values) if "model_type" in values else None
        if config is None:
            raise InputError(f"{name} has no model_type; name a family of transformers, such as vit")
    kind = classes.get(config.model_type)
    if kind is None or loading.head_of(config) != loading.IMAGE_CLASSIFIER:
        what = loading.HEADS[loading.head_of(config)]
        raise InputError(
            f"{name}: {config.model_type} is {what}, not an image classifier; give crrelu image an image model, or "
            "train it with crrelu sft"
        )
    # Some families have several image heads: the one named in the config is used, or else the first.
    config.architectures = config.architectures or (
        [] if given is None else [kind if isinstance(kind, str) else kind[0]]
    )
    return config


def skeleton(recipe: Recipe) -> Any:
    """A recipe's model without weights.

    Raises:
        InputError: The model cannot be built, or does not take pixels.
    """
    import transformers

    config, attention = image_config(recipe), recipe.model.attn_implementation
    where = str(recipe.model.model_name_or_path or f"{recipe.source}: model_config")
    options = {"attn_implementation": attention} if attention else {}
    with torch.device("meta"), reading(f"{where}: no model can be built from its config", "check the options"):
        try:
            model = getattr(transformers, loading.IMAGE_CLASSIFIER).from_config(config, **options)
        except ImportError as error:
            raise InputError(f"{where}: {loading.without_timm(error)}") from error
    if model.main_input_name != "pixel_values":
        raise InputError(f"{where}: {config.model_type} takes {model.main_input_name}, not pixels of images")
    return model


def starting_model(recipe: Recipe, train: Any, directory: Path) -> str:
    """The MODEL from which a run starts; made in `directory` if the recipe's model has no head for the labels.

    Weights without a checkpoint are initialised with the recipe's seed, so that arms with the same seed start equal.
    An existing model of the same config, labels and seed is reused.

    Args:
        recipe: The recipe of the run.
        train: The training rows, which name the labels.
        directory: Where to make the model.

    Raises:
        InputError: The checkpoint's head has other labels, or `directory` holds another model.
    """
    name = str(recipe.script.dataset_name)
    config, names = image_config(recipe), label_names(train, recipe.training.label_column_name, name)
    model = recipe.model.model_name_or_path
    if model is not None and _has_head(config):
        known = list(config.id2label.values())
        if set(names) <= set(known):
            return loading.resolve(model)
        if not recipe.training.ignore_mismatched_sizes:
            unknown = next(label for label in names if label not in set(known))
            raise InputError(
                f"{name}: the label {unknown} is not one of {model}'s: {', '.join(map(str, known[:_SHOWN]))}"
                f"{', …' if len(known) > _SHOWN else ''}; set ignore_mismatched_sizes: true for a new head"
            )
    given = recipe.training.model_config
    made_of = {
        "model": model if given is None else _values(given, "model_config"),
        "labels": names,
        "seed": recipe.training.seed,
        **({} if model is None else {"digests": fingerprint.of_model(model, **recipe.loading)}),
    }
    with main_process_first():
        if directory.is_dir() and any(directory.iterdir()):
            if json.loads(json.dumps(made_of)) != _made_of(directory):
                raise InputError(
                    f"{directory} holds a model with another config, other labels or another seed; remove it, or "
                    "choose another output_dir"
                )
        elif PartialState().is_local_main_process:
            remove(directory)
            drawn = _draw(recipe, config, names)
            loading.save(drawn, _processor(recipe, config), directory, {_MADE_OF: made_of})
    return str(directory.resolve())


def _has_head(config: Any) -> bool:
    return any("ForImageClassification" in name for name in config.architectures or ())


def _made_of(directory: Path) -> Any:
    path = directory / _MADE_OF
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _values(given: Any, name: str) -> dict[str, Any]:
    """The content of `model_config`: a map, JSON, or the path of a config.json."""
    if isinstance(given, dict):
        return given
    with reading(f"{name} {given}", "give a map, or the path of a config.json"):
        path = Path(str(given))
        path = path / "config.json" if path.is_dir() else path
        values = json.loads(str(given) if str(given).lstrip().startswith("{") else path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not a map of keys and values")
    return values


def _draw(recipe: Recipe, config: Any, names: list[str]) -> Any:
    """The whole model with a head for these labels; new weights are initialised with the recipe's seed."""
    import transformers

    auto = getattr(transformers, loading.IMAGE_CLASSIFIER)
    model, before = recipe.model.model_name_or_path, config.num_labels
    config.id2label = dict(enumerate(names))
    config.label2id = {label: number for number, label in config.id2label.items()}
    with reading(f"{recipe.source}: no model can be built from its config", "check the options"):
        torch.manual_seed(recipe.training.seed)
        drawn = auto.from_config(config)
        if model is None:
            return drawn
        options = {"use_safetensors": loading.needs_safetensors(model), **recipe.loading}
        trained = auto.from_pretrained(loading.resolve(model), num_labels=before, **options)
        fresh = _head_keys(auto, config, len(names))
        kept = {key: value for key, value in trained.state_dict().items() if key not in fresh}
        drawn.load_state_dict(drawn.state_dict() | kept)
        logger.warning("%s gets a new head for %d labels: %s", model, len(names), ", ".join(sorted(fresh)))
    return drawn


def _head_keys(auto: Any, config: Any, labels: int) -> set[str]:
    """Names of the weights with a shape that depends on the number of labels: the head's last layer."""
    import copy

    shapes = []
    for count in (labels, labels + 1):
        other = copy.deepcopy(config)
        other.num_labels = count
        with torch.device("meta"):
            shapes.append({key: value.shape for key, value in auto.from_config(other).state_dict().items()})
    return {key for key, shape in shapes[0].items() if shapes[1][key] != shape}


def _processor(recipe: Recipe, config: Any) -> Any:
    """The checkpoint's image processor; for a config, one that resizes to the model's size and scales to −1 … 1."""
    model = recipe.model.model_name_or_path
    if model is not None:
        return loading.load_processor(model, **recipe.loading)
    from transformers import ViTImageProcessorPil

    size = recipe.training.image_size or getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    grey = {"image_mean": [0.5], "image_std": [0.5]} if getattr(config, "num_channels", 3) == 1 else {}
    return ViTImageProcessorPil(size={"height": height, "width": width}, **grey)
