"""The options of a patch: for `crrelu patch` and for the activation section of a recipe. Imports nothing."""

from typing import Any

# name -> (default, help). The defaults are those of PatchConfig, whose docstring says more.
OPTIONS: dict[str, tuple[Any, str]] = {
    "epsilon_init": (0.01, "start value of epsilon without calibration"),
    "epsilon_per": ("layer", "one epsilon per layer or per channel"),
    "calibration": ("fit", "how the patch is fitted to data: none, fit or refit"),
    "calibration_data": ("builtin:docstrings", "hub name, local file or directory, or builtin:NAME"),
    "calibration_tokens": (8192, "number of calibration tokens"),
    "calibration_images": (256, "number of calibration images, for an image model"),
    "density": ("standard", "density that CRReLU corrects for: standard, or fitted to each site's pre-activations"),
    "layers": ("all", "layers to patch: all, or numbers and ranges from 0, as 0-5,8"),
    "every": (1, "step between these layers: 2 takes every second one"),
    "parts": ("main", "part of the model: main, the vision tower of a multimodal model, or all"),
    "recompute_activation": (
        False,
        "keep no output of CRReLU for the backward pass: less memory, the same gradients",
    ),
}
