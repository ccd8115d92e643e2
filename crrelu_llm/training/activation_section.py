"""The activation section of a recipe: its keys and their allowed values."""

from dataclasses import dataclass, field, fields
from typing import Any

from crrelu_llm.errors import InputError
from crrelu_llm.patch_options import OPTIONS
from crrelu_llm.patching import PatchConfig
from crrelu_llm.patching.blend import SCHEDULES
from crrelu_llm.patching.config import DENSITIES
from crrelu_llm.patching.mixture import names_of, text_of


def _of_patch(name: str) -> Any:
    default, text = OPTIONS[name]
    return field(default=default, metadata={"help": f"{text[0].upper()}{text[1:]}."})


@dataclass
class ActivationArguments:
    """The activation section of a recipe: the options of a patch, and what training adds."""

    activation: str | None = field(
        default=None, metadata={"help": "Activation to patch every MLP to. If not set, the model is not patched."}
    )
    epsilon_init: float = _of_patch("epsilon_init")
    epsilon_per: str = _of_patch("epsilon_per")
    epsilon_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of epsilon, on the recipe's schedule. 0 freezes it."}
    )
    epsilon_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of epsilon."})
    affine_learning_rate: float = field(
        default=0.0,
        metadata={"help": "Learning rate of calibrated scale, shift, gain and offset. 0 keeps them as calibrated."},
    )
    calibration: str = _of_patch("calibration")
    calibration_data: str = _of_patch("calibration_data")
    calibration_tokens: int = _of_patch("calibration_tokens")
    density: str = _of_patch("density")
    density_update_steps: int = field(
        default=0,
        metadata={"help": "With density: fitted, steps between updates of centre and width. 0 never updates them."},
    )
    density_momentum: float = field(
        default=0.9, metadata={"help": "Share of the running moments that each optimiser step keeps."}
    )
    recompute_activation: bool = _of_patch("recompute_activation")
    layers: str = _of_patch("layers")
    every: int = _of_patch("every")
    parts: str = _of_patch("parts")
    calibration_images: int = _of_patch("calibration_images")
    blend_steps: int = field(
        default=0,
        metadata={
            "help": "Steps over which training goes from the original activation to the new one. The reference of DPO "
            "then has the original activation, like the model at the first step."
        },
    )
    blend_schedule: str = field(default="linear", metadata={"help": "`linear` or `cosine`."})
    distill_weight: float = field(
        default=0.0, metadata={"help": "SFT: weight of the KL divergence from the original model's predictions."}
    )
    activation_l1: float = field(
        default=0.0, metadata={"help": "Weight of the mean absolute output of the activations, added to the loss."}
    )

    def __post_init__(self) -> None:
        """Converts a mapping of layers into text. `null` on a command line means "not set", as it does in YAML."""
        self.activation = None if self.activation == "null" else text_of(self.activation)

    def patch_config(self, where: str = "") -> PatchConfig | None:
        """The checked patch configuration of this section; None if the model is not patched."""
        positive = ("epsilon_learning_rate", "epsilon_weight_decay", "affine_learning_rate", "blend_steps")
        for key in (*positive, "distill_weight", "density_update_steps", "activation_l1"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise InputError(f"{where}{key} must be 0 or more, not {getattr(self, key)}")
        if not 0 <= self.density_momentum < 1:
            raise InputError(f"{where}density_momentum must be in [0, 1), not {self.density_momentum}")
        if self.blend_schedule not in SCHEDULES:
            choices = " or ".join(f'"{name}"' for name in SCHEDULES)
            raise InputError(f'{where}blend_schedule must be {choices}, not "{self.blend_schedule}"')
        keys = [entry.name for entry in fields(PatchConfig) if entry.name != "activation"]
        options = {key: getattr(self, key) for key in keys}
        try:
            if self.density in DENSITIES and "crrelu" not in names_of(self.activation or "crrelu"):
                options["density"] = "standard"  # an arm of a comparison: all arms share the recipe
            config = PatchConfig("crrelu" if self.activation is None else self.activation, **options)
        except InputError as error:
            raise InputError(f"{where}{error}") from error
        if self.blend_steps and config.calibration == "refit":
            raise InputError(
                f"{where}blend_steps starts from the original activation, but calibration: refit makes the weights "
                "fit the new one; set calibration: fit, or none"
            )
        if self.activation is not None and self.density_update_steps and self.density != "fitted":
            raise InputError(
                f"{where}density_update_steps moves a centre and a width, which density: {self.density} does not "
                "have; set density: fitted, or leave density_update_steps out"
            )
        return None if self.activation is None else config

    def require_activation(self, where: str = "") -> None:
        """Raises InputError for options that have no effect without a swap; not called for the arms of a comparison.

        Args:
            where: The prefix of the message.
        """
        if self.activation is None and self.blend_steps:
            raise InputError(f"{where}blend_steps needs an activation to blend to; set activation: crrelu")
        if self.activation != "crrelu" and self.density_update_steps:
            raise InputError(f"{where}density_update_steps needs activation: crrelu, with density: fitted")
        if self.activation != "crrelu" and self.density != "standard":
            raise InputError(f"{where}density: {self.density} is for CRReLU; set activation: crrelu")
        if self.activation is None and self.distill_weight:
            raise InputError(
                f"{where}distill_weight needs an activation; a model that is not patched would be its own teacher"
            )
        if self.activation is None and self.activation_l1:
            raise InputError(f"{where}activation_l1 is a mean over patched sites; set activation: relu")
