"""Traces a model with transformers' exporters, and builds the sample inputs."""

import copy
from typing import Any

import torch

from crrelu_llm.errors import InputError, reading
from crrelu_llm.export.formats import FORMATS
from crrelu_llm.quiet import quiet

_BEFORE, _NOW = 5, 3  # tokens in the cache and new tokens of the traced call


def empty_cache(model: Any, batch: int = 1) -> Any:
    """An empty cache of keys and values, the input of a graph with a cache at the start of a text.

    Returns:
        None if the family's cache holds more than growing keys and values.
    """
    cache = _filled_cache(model, batch, _BEFORE)
    if cache is None:
        return None
    for layer in cache.layers:
        layer.keys, layer.values = (part[:, :, :0].contiguous() for part in (layer.keys, layer.values))
        if hasattr(layer, "cumulative_length"):  # a sliding window
            layer.cumulative_length = 0
    return cache


def _filled_cache(model: Any, batch: int, length: int) -> Any:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    with torch.no_grad():
        out = model(input_ids=_some_ids(model, batch, length), use_cache=True)
    cache: Any = getattr(out, "past_key_values", None)
    if type(cache) is not DynamicCache or not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        return None
    cache = copy.deepcopy(cache)
    for layer in cache.layers:
        if layer.keys is None or layer.keys.dim() != 4:
            return None
        layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()
    return cache


def _some_ids(model: Any, batch: int, length: int) -> torch.Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return (torch.arange(batch * length) % (vocabulary - 1) + 1).view(batch, length)


def sample(model: Any, format_name: str) -> dict[str, Any]:
    """The inputs of the traced call: a few tokens after a few cached ones, or a whole text without a cache."""
    cache = _filled_cache(model, 2, _BEFORE) if FORMATS[format_name].caches else None
    if cache is None:
        batch = 1 if format_name == "executorch" else 2
        ids = _some_ids(model, batch, _BEFORE + _NOW)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    ids = _some_ids(model, 2, _NOW)
    mask = torch.ones(2, _BEFORE + _NOW, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}


def trace(model: Any, format_name: str, inputs: dict[str, Any], max_length: int) -> Any:
    """The model as an `ExportedModel` of a format; `inputs` come from `sample`.

    Args:
        max_length: Longest text, for a format that plans its memory in advance.

    Raises:
        InputError: The format cannot hold the model.
    """
    from transformers.exporters.auto import EXPORT_BACKENDS, AutoHfExporter

    config: dict[str, Any] = {"dynamic_shapes": _shapes(inputs, None)}
    if format_name == "executorch":
        config["dynamic_shapes"] = _shapes(inputs, torch.export.Dim("length", min=2, max=max_length))
        config["prefer_deferred_runtime_asserts_over_guards"] = True
    with quiet(), reading(f"{format_name} cannot hold this {model.config.model_type}", "choose another --format"):
        made = EXPORT_BACKENDS[format_name].config(**config)
        exported = AutoHfExporter.from_config(made).export(model, inputs, made)
    return exported


def _shapes(inputs: dict[str, Any], length: Any) -> dict[str, Any]:
    """The dynamic axes: batch and length; or only the length, if its bounds are given."""
    from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes

    auto = torch.export.Dim.AUTO
    shapes: dict[str, Any] = {}
    for name, value in inputs.items():
        if torch.is_tensor(value):
            shapes[name] = {0: auto, 1: auto} if length is None else {1: length}
        elif name == "past_key_values":  # flattened as in the exporters: keys, values and other tensors of a layer
            leaves = get_auto_dynamic_shapes(value)
            shapes[name] = [{0: auto, 2: auto} if axes and len(axes) == 4 else axes for axes in leaves]
    return shapes


def require_exportable(model: Any, name: str) -> None:
    """Raises InputError for weights that no exporter can read."""
    if getattr(model.config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        raise InputError(f"{name}: its weights are quantised; export the checkpoint before it is quantised")
