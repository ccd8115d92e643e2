"""The activation section of a recipe: its keys, and what they may be."""

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
            Activation to patch every MLP to: `crrelu`, or any name of transformers' ACT2FN; or one for some layers and
            another for others, counted from 0: `{0-5: relu, 6-: crrelu}`, on the command line `0-5=relu,6-=crrelu`;
            layers that are not named keep theirs. If not set, the model is trained as it is.
        epsilon_init (`float`, *optional*, defaults to `0.01`):
            Start value of ε where no calibration sets it.
        epsilon_per (`str`, *optional*, defaults to `"layer"`):
            One ε per `"layer"` or per `"channel"`.
        epsilon_learning_rate (`float`, *optional*, defaults to `1e-3`):
            Learning rate of ε, on the recipe's own schedule. 0 keeps ε where it starts.
        epsilon_weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay of ε.
        affine_learning_rate (`float`, *optional*, defaults to `0.0`):
            Learning rate of scale, shift, gain and offset of each channel, which calibration sets inside the
            activation, of whatever name; on the recipe's own schedule, without weight decay. 0 leaves them as they
            are calibrated. Above 0, training keeps more of each activation for the backward pass.
        calibration (`str`, *optional*, defaults to `"fit"`):
            How the patch is fitted to the original model before training: `"none"` (a plain swap, as in the paper),
            `"fit"` (ε, and scale, shift, gain and offset of each channel, inside the activation: no weight is
            touched) or `"refit"` (then also the projection that follows, in closed form).
        calibration_data (`str`, *optional*, defaults to `"builtin:docstrings"`):
            Hub name, local file or directory, or `builtin:docstrings`.
        calibration_tokens (`int`, *optional*, defaults to `8192`):
            Number of calibration tokens.
        density (`str`, *optional*, defaults to `"standard"`):
            The density that CRReLU is the correction for: `"standard"`, N(0, 1), as in the paper, or `"fitted"`,
            N(μ, σ²) with the moments of each site's pre-activations on the calibration text.
        density_update_steps (`int`, *optional*, defaults to `0`):
            With `density: fitted`: every so many optimiser steps, set μ and σ of each site to the running mean and
            standard deviation of the pre-activations in training. 0 keeps them where the patch has put them. What a
            calibration has fitted to the first μ and σ stays, as far as it is not trained.
        density_momentum (`float`, *optional*, defaults to `0.9`):
            Share of the running moments that each optimiser step keeps; the rest comes from its own tokens.
        recompute_activation (`bool`, *optional*, defaults to `False`):
            Keep no output of CRReLU for the backward pass, but compute it again there: less memory, the same gradients
            bit for bit, one more elementwise pass. A checkpoint that was patched so stays so.
        layers (`str`, *optional*, defaults to `"all"`):
            Which layers to patch, counted from 0: `"all"`, or numbers and ranges, as `"0-5,8"`.
        every (`int`, *optional*, defaults to `1`):
            Of these, the first and every so many after it.
        parts (`str`, *optional*, defaults to `"main"`):
            Which part of a model to patch: `"main"`, the `"vision"` tower of a multimodal model, or `"all"`.
        calibration_images (`int`, *optional*, defaults to `256`):
            Number of calibration images, of an image model.
        blend_steps (`int`, *optional*, defaults to `0`):
            Gradual swap: over this many optimiser steps, train (1 − λ)·original + λ·new with λ from 0 to 1. Evaluation
            and everything that is saved have the new activation alone. DPO's reference is then the model that training
            starts from: the original activation in the patched checkpoint.
        blend_schedule (`str`, *optional*, defaults to `"linear"`):
            How λ grows: `"linear"` or `"cosine"`.
        distill_weight (`float`, *optional*, defaults to `0.0`):
            SFT: weight of an added term, the KL divergence from the original (unpatched) model's predictions, per
            trained token. Evaluation measures the cross-entropy alone.
        activation_l1 (`float`, *optional*, defaults to `0.0`):
            Weight of an added term, the mean absolute output of the swapped activations over sites, tokens and
            channels, which draws them to 0: with `activation: relu` and `calibration: none`, more of them become
            exactly 0. Logged as `activation_l1`, without the weight. Evaluation measures the task's loss alone.
    """

    activation: str | None = field(
        default=None, metadata={"help": "Activation to patch every MLP to. Not set: train the model as it is."}
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
        metadata={"help": "With density: fitted, set centre and width to running moments every so many steps."},
    )
    density_momentum: float = field(
        default=0.9, metadata={"help": "Share of the running moments that each optimiser step keeps."}
    )
    recompute_activation: bool = field(
        default=False,
        metadata={"help": "Keep no output of CRReLU for the backward pass: less memory, the same gradients."},
    )
    layers: str = field(default="all", metadata={"help": "Layers to patch: `all`, or numbers and ranges (0-5,8)."})
    every: int = field(default=1, metadata={"help": "Of these layers, the first and every so many after it."})
    parts: str = field(default="main", metadata={"help": "`main`, the `vision` tower, or `all`."})
    calibration_images: int = field(default=256, metadata={"help": "Number of calibration images."})
    blend_steps: int = field(
        default=0,
        metadata={
            "help": "Steps over which training goes from the original activation to the new one. The reference of DPO "
            "then has the original activation, as the model at the first step."
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
        """Makes one text of an activation for each layer."""
        self.activation = text_of(self.activation)

    def patch_config(self, where: str = "") -> PatchConfig | None:
        """The patch that this section asks for, checked; None where the model is trained as it is."""
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
                options["density"] = "standard"  # an arm of a comparison, whose recipe is for all
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
                "have; set density: fitted, or leave it out"
            )
        return None if self.activation is None else config

    def require_activation(self, where: str = "") -> None:
        """Raises InputError for options that do nothing without a swap; a comparison's arms share them, one run not.

        Args:
            where: Put before the message.
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
