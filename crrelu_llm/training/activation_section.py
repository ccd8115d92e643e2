"""The activation section of a recipe: its keys and their allowed values."""

from dataclasses import dataclass, field, fields

from crrelu_llm.errors import InputError
from crrelu_llm.patching import PatchConfig
from crrelu_llm.patching.blend import SCHEDULES
from crrelu_llm.patching.config import DENSITIES
from crrelu_llm.patching.mixture import names_of, text_of


@dataclass
class ActivationArguments:
    """The activation section of a recipe.

    Parameters:
        activation (`str`, *optional*):
            Activation to patch every MLP to: `crrelu`, or any name of transformers' ACT2FN. Different layers, counted
            from 0, may get different activations: `{0-5: relu, 6-: crrelu}`, on the command line `0-5=relu,6-=crrelu`;
            layers that are not named keep their activation. If not set, the model is trained without a patch.
        epsilon_init (`float`, *optional*, defaults to `0.01`):
            Start value of ε where no calibration sets it.
        epsilon_per (`str`, *optional*, defaults to `"layer"`):
            One ε per `"layer"` or per `"channel"`.
        epsilon_learning_rate (`float`, *optional*, defaults to `1e-3`):
            Learning rate of ε, on the recipe's own schedule. 0 freezes ε at its start value.
        epsilon_weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay of ε.
        affine_learning_rate (`float`, *optional*, defaults to `0.0`):
            Learning rate of scale, shift, gain and offset of each channel, which calibration sets inside any
            activation; on the recipe's own schedule, without weight decay. 0 keeps the calibrated values. Above 0,
            training stores more of each activation for the backward pass.
        calibration (`str`, *optional*, defaults to `"fit"`):
            How the patch is fitted to the original model before training: `"none"` (a plain swap, as in the paper),
            `"fit"` (fits ε, and scale, shift, gain and offset of each channel, inside the activation; no weight
            changes) or `"refit"` (then also changes the projection after it, in closed form).
        calibration_data (`str`, *optional*, defaults to `"builtin:docstrings"`):
            Hub name, local file or directory, or `builtin:docstrings`.
        calibration_tokens (`int`, *optional*, defaults to `8192`):
            Number of calibration tokens.
        density (`str`, *optional*, defaults to `"standard"`):
            The density for which CRReLU is the correction: `"standard"`, N(0, 1), as in the paper, or `"fitted"`,
            N(μ, σ²) with the moments of each site's pre-activations on the calibration text.
        density_update_steps (`int`, *optional*, defaults to `0`):
            With `density: fitted`: the number of optimiser steps between updates of each site's μ and σ to the running
            mean and standard deviation of the pre-activations in training. 0 keeps the values set by the patch. The
            other calibrated numbers, fitted to the first μ and σ, change only if they are trained.
        density_momentum (`float`, *optional*, defaults to `0.9`):
            Share of the running moments that each optimiser step keeps; the rest comes from the tokens of the step.
        recompute_activation (`bool`, *optional*, defaults to `False`):
            Recompute the output of CRReLU in the backward pass instead of storing it: less memory, the same gradients
            bit for bit, one more elementwise pass. A checkpoint patched with this option keeps it.
        layers (`str`, *optional*, defaults to `"all"`):
            Which layers to patch, counted from 0: `"all"`, or numbers and ranges such as `"0-5,8"`.
        every (`int`, *optional*, defaults to `1`):
            Patch only every nth of these layers, starting with the first.
        parts (`str`, *optional*, defaults to `"main"`):
            Which part of a model to patch: `"main"`, the `"vision"` tower of a multimodal model, or `"all"`.
        calibration_images (`int`, *optional*, defaults to `256`):
            Number of calibration images, for an image model.
        blend_steps (`int`, *optional*, defaults to `0`):
            Gradual swap: over this many optimiser steps, train (1 − λ)·original + λ·new with λ from 0 to 1. Evaluation
            and all saved checkpoints use only the new activation. DPO's reference is then the model at the start of
            training: the patched checkpoint with the original activation.
        blend_schedule (`str`, *optional*, defaults to `"linear"`):
            How λ increases: `"linear"` or `"cosine"`.
        distill_weight (`float`, *optional*, defaults to `0.0`):
            SFT: weight of a term added to the loss, the KL divergence from the original (unpatched) model's
            predictions, per trained token. Evaluation measures only the cross-entropy.
        activation_l1 (`float`, *optional*, defaults to `0.0`):
            Weight of a term added to the loss, the mean absolute output of the swapped activations over sites, tokens
            and channels. It draws the outputs towards 0: with `activation: relu` and `calibration: none`, more of them
            become exactly 0. The unweighted term is logged as `activation_l1`. Evaluation measures only the task's
            loss.
    """

    activation: str | None = field(
        default=None, metadata={"help": "Activation to patch every MLP to. If not set, the model is not patched."}
    )
    epsilon_init: float = field(default=0.01, metadata={"help": "Start value of epsilon without calibration."})
    epsilon_per: str = field(default="layer", metadata={"help": "One epsilon per `layer` or per `channel`."})
    epsilon_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of epsilon, on the recipe's schedule. 0 freezes it."}
    )
    epsilon_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of epsilon."})
    affine_learning_rate: float = field(
        default=0.0,
        metadata={"help": "Learning rate of calibrated scale, shift, gain and offset. 0 keeps them as calibrated."},
    )
    calibration: str = field(
        default="fit",
        metadata={"help": "How the patch is fitted before training: `none`, `fit` or `refit`."},
    )
    calibration_data: str = field(
        default="builtin:docstrings", metadata={"help": "Hub name, local file or directory, or builtin:docstrings."}
    )
    calibration_tokens: int = field(default=8192, metadata={"help": "Number of calibration tokens."})
    density: str = field(
        default="standard",
        metadata={"help": "`standard` (the paper's N(0, 1)) or `fitted` to the pre-activations of each site."},
    )
    density_update_steps: int = field(
        default=0,
        metadata={"help": "With density: fitted, steps between updates of centre and width to running moments."},
    )
    density_momentum: float = field(
        default=0.9, metadata={"help": "Share of the running moments that each optimiser step keeps."}
    )
    recompute_activation: bool = field(
        default=False,
        metadata={"help": "Recompute CRReLU's output in the backward pass: less memory, the same gradients."},
    )
    layers: str = field(default="all", metadata={"help": "Layers to patch: `all`, or numbers and ranges (0-5,8)."})
    every: int = field(default=1, metadata={"help": "Patch every nth of these layers, starting with the first."})
    parts: str = field(default="main", metadata={"help": "`main`, the `vision` tower, or `all`."})
    calibration_images: int = field(default=256, metadata={"help": "Number of calibration images."})
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
        """Converts a mapping of layers to activations into text."""
        self.activation = text_of(self.activation)

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
