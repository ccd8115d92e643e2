"""How to patch a model: the options, checked."""

import re
from dataclasses import asdict, dataclass
from typing import Any

from crrelu_llm.errors import InputError
from crrelu_llm.patching import mixture
from crrelu_llm.patching.sites import PARTS

CALIBRATIONS = ("none", "fit", "refit")
EPSILON_PER = ("layer", "channel")
DENSITIES = ("standard", "fitted")
_LAYERS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


@dataclass
class PatchConfig:
    """How to patch a model.

    Attributes:
        activation: `"crrelu"`, or any name of transformers' ACT2FN (`"gelu"`, `"relu"`, `"silu"`, `"prelu"`, ...),
            or `"elu"`, `"celu"` or `"selu"`. Different layers, counted from 0, may get different activations:
            `"0-5=relu,6-=crrelu"`, or as a mapping `{"0-5": "relu", "6-": "crrelu"}`; layers that are not named keep
            their activation.
        epsilon_init: Start value of ε where no calibration sets it (the paper's 0.01).
        epsilon_per: One ε per `"layer"`, shape `(1,)`, or one per `"channel"`, shape `(channels,)`.
        calibration: How the patch is fitted to text, so that the model keeps its function. `"none"`: no fit, the plain
            swap. `"fit"`: fits ε, and scale, shift, gain and offset of each channel inside the activation, by weighted
            least squares against the original activation; no weight changes. `"refit"`: then also changes the
            projection after it, by ridge regression, where that lowers the error on held-back text.
        calibration_data: Hub name, local file or directory, or `builtin:docstrings`.
        calibration_tokens: How many tokens of `calibration_data` to use.
        density: The density of pre-activations for which CRReLU is the correction: `"standard"`, N(0, 1), as in the
            paper; `"fitted"`, N(μ, σ²) with the moments of each site on the calibration text:
            `relu(x) + ε·(x − μ)·exp(−(x − μ)²/2σ²)`.
        recompute_activation: In training, recompute the output of CRReLU in the backward pass instead of storing it:
            less memory, the same gradients bit for bit. Other activations do not change.
        layers: Which layers to patch, counted from 0: `"all"`, or numbers and ranges such as `"0-5,8"`. The others
            keep their activation.
        every: Patch only every nth of these layers, starting with the first.
        parts: Which part of a model to patch: `"main"` (the decoder of a language model, the encoder of an image
            model), `"vision"` (the vision tower of a multimodal model) or `"all"`.
        calibration_images: How many images to use for an image model.
    """

    activation: str = "crrelu"
    epsilon_init: float = 0.01
    epsilon_per: str = "layer"
    calibration: str = "fit"
    calibration_data: str = "builtin:docstrings"
    calibration_tokens: int = 8192
    density: str = "standard"
    recompute_activation: bool = False
    layers: str = "all"
    every: int = 1
    parts: str = "main"
    calibration_images: int = 256

    def __post_init__(self) -> None:
        """Raises InputError for the first field with an invalid value."""
        self.activation = mixture.text_of(self.activation)
        mixture.check(self.activation)
        choices_of = {"epsilon_per": EPSILON_PER, "calibration": CALIBRATIONS, "density": DENSITIES, "parts": PARTS}
        for key, allowed in choices_of.items():
            if getattr(self, key) not in allowed:
                quoted = [f'"{value}"' for value in allowed]
                choices = f"{', '.join(quoted[:-1])} or {quoted[-1]}"
                raise InputError(f'{key} must be {choices}, not "{getattr(self, key)}"')
        for key in ("calibration_tokens", "calibration_images"):
            if getattr(self, key) <= 0:
                raise InputError(f"{key} must be positive, not {getattr(self, key)}")
        if not abs(self.epsilon_init) < float("inf"):
            raise InputError(f"epsilon_init must be a finite number, not {self.epsilon_init}")
        self.layers = str(self.layers)  # a recipe may give a number
        if self.layers != "all" and not _LAYERS.fullmatch(self.layers):
            raise InputError(f'layers must be "all", or numbers and ranges as "0-5,8", not "{self.layers}"')
        if self.every < 1:
            raise InputError(f"every must be 1 or more, not {self.every}")
        if self.is_mixture and self.selects:
            raise InputError("an activation per layer already selects the layers to patch; omit layers and every")
        if self.parts != "main" and self.calibrates:
            raise InputError(
                f"parts: {self.parts} goes with calibration: none (and density: standard): no calibration text "
                "reaches a vision tower"
            )
        if self.fits_density and self.activation != "crrelu":
            none = "has none in every layer" if self.is_mixture else "has none"
            raise InputError(
                f"density: fitted gives crrelu a centre and a width, and {self.activation} {none}; leave "
                "density out, or set activation: crrelu"
            )

    def by_layer(self, count: int) -> dict[int, str]:
        """The activation of each layer to patch, by number, in a model with `count` layers.

        Raises:
            InputError: The model lacks a requested layer.
        """
        if self.is_mixture:
            return mixture.by_layer(self.activation, count)
        return dict.fromkeys(self._selected(count), self.activation)

    def _selected(self, count: int) -> list[int]:
        if self.layers == "all":
            return list(range(0, count, self.every))
        numbers: set[int] = set()
        for part in self.layers.split(","):
            first, _, last = part.partition("-")
            numbers |= set(range(int(first), int(last or first) + 1))
        if not numbers:
            raise InputError(f"layers: {self.layers} names no layer")
        if max(numbers) >= count:
            raise InputError(f"layers: {self.layers}: the model has {count} layers, 0 to {count - 1}")
        return sorted(numbers)[:: self.every]

    @property
    def is_mixture(self) -> bool:
        """Whether `activation` names different activations for different layers."""
        return mixture.is_mixture(self.activation)

    @property
    def uses_crrelu(self) -> bool:
        """Whether some layer gets CRReLU."""
        return "crrelu" in mixture.names_of(self.activation)

    @property
    def selects(self) -> bool:
        """Whether `layers` or `every` select some layers."""
        return self.layers != "all" or self.every > 1

    def as_dict(self) -> dict[str, Any]:
        """All fields, except those that earlier versions lacked, where the value means what those versions did."""
        values = asdict(self)
        new = {"parts": "main", "calibration_images": 256} | ({} if self.selects else {"layers": "all", "every": 1})
        return {key: value for key, value in values.items() if key not in new or value != new[key]}

    @property
    def calibrates(self) -> bool:
        """Whether calibration text will be read."""
        return self.fits or self.fits_density

    @property
    def fits(self) -> bool:
        """Whether each site gets scale, shift, gain and offset."""
        return self.calibration != "none"

    @property
    def fits_density(self) -> bool:
        """Whether each site gets its own centre and width."""
        return self.density == "fitted"
