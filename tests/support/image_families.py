"""Tiny models of every image-classification family of transformers: the default configuration with sizes shrunk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import _DERIVED, IS_RELEASE, shrunk
from transformers import AutoModelForImageClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSES

# What the rule gets wrong, or leaves large: changes to the values that it makes.
_PLAIN = {"image_size": 32, "patch_size": 8}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "beit": _PLAIN,
    "convnext": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "image_size": 32},
    "convnextv2": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "image_size": 32},
    "clip": {"vision_config": _PLAIN},
    "data2vec-vision": _PLAIN,
    "deit": _PLAIN,
    "dinov2": _PLAIN,
    "dinov2_with_registers": _PLAIN,
    "donut-swin": {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 16, "image_size": 32, "window_size": 4},
    "ijepa": _PLAIN,
    "metaclip_2": {"vision_config": _PLAIN},
    "siglip": {"vision_config": _PLAIN},
    "siglip2": {"vision_config": {"patch_size": 8, "num_patches": 16}},
    "swin": {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 16, "image_size": 32, "window_size": 4},
    "swinv2": {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 16, "image_size": 32, "window_size": 4},
    "timm_wrapper": {"architecture": "vit_tiny_patch16_224"},
    "vit": _PLAIN,
    "vit_msn": _PLAIN,
}
# Of transformers' backbones: made from the number of layers.
_OF_STAGES = {"stage_names", "out_features", "out_indices", "_out_features", "_out_indices"}
# As in patching/families.json: the sites (# is a number), what is left alone and why; or why it is refused; or why no
# model of it can be built here.
_ALL = json.loads((Path(__file__).parents[1] / "patching" / "image_families.json").read_text())
FACTS = {family: facts for family, facts in _ALL.items() if family in CLASSES}
PATCHED = [family for family, facts in FACTS.items() if "sites" in facts]
# Those that are not slow tests: a plain ViT, one with convolutions in it, and one that is refused.
QUICK = {"vit", "convnext", "resnet"}


def quick_ones(names: list[str]) -> list[Any]:
    """Parameters of a test of all these families, slow but for `QUICK`."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def image_config(family: str) -> Any:
    """The configuration of a tiny model of a family."""
    own = CONFIG_MAPPING[family]
    values = {key: value for key, value in own().to_dict().items() if key not in _DERIVED | _OF_STAGES}
    for key, value in EXCEPTIONS.get(family, {}).items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    config = own(**{**shrunk(values), **{k: v for k, v in EXCEPTIONS.get(family, {}).items() if type(v) is not dict}})
    named = CLASSES[family]
    config.architectures = [named if isinstance(named, str) else named[0]]  # some have several heads
    return config


def image_model(family: str, device: str = "cpu") -> Any:
    """A tiny image classifier of a family in evaluation mode, its weights large enough for an activation to matter.

    Another release of transformers may need another configuration; the test is skipped there.
    """
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = AutoModelForImageClassification.from_config(image_config(family))
    except Exception as error:
        if IS_RELEASE:
            raise
        pytest.skip(f"{family}: no tiny model for transformers {transformers.__version__}: {str(error)[:100]}")
    if device == "cpu":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "layer_scale" in name or "lambda" in name:  # of a layer's share, next to nothing at the start
                    parameter.fill_(1.0)
                elif parameter.dim() > 1 and "embed" not in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """What a model is run on: random pixels of its size, or what else it takes."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.randint(3, 60, (2, 16), generator=generator)}
    inner = getattr(config, "vision_config", config)
    if config.model_type == "siglip2":
        pixels = torch.randn(2, 16, 3 * 8 * 8, generator=generator)
        return {
            "pixel_values": pixels,
            "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
        }
    size = getattr(inner, "image_size", None) or 224
    size = size[0] if isinstance(size, (list, tuple)) else size
    return {model.main_input_name: torch.randn(2, 3, size, size, generator=generator)}
