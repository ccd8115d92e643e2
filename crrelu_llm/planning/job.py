"""The job to plan: a model, and the options of a training run that determine its memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crrelu_llm.errors import InputError
from crrelu_llm.patching import loading, mixture

if TYPE_CHECKING:
    from crrelu_llm.training.kinds.kind import Kind

NATIVE = "native"  # the model's own activation, as in a comparison's arms


@dataclass(frozen=True)
class Job:
    """The options of a run that determine its memory, with the names and defaults of TRL and of our recipes.

    Attributes:
        trainer: Name of the kind of training: `"sft"`, `"dpo"`, ...
        max_length: Tokens per row; for sampled answers, the prompt included.
        activation: `crrelu`, a name of transformers' ACT2FN, or `native`.
        calibration: Calibrated activations, above all those other than CRReLU, need more memory than a plain swap.
        affine_learning_rate: Above 0, the calibrated scale, shift, gain and offset are trained.
        use_cpu: Plan for a CPU: its kernels have other temporaries, and nothing is cast to bf16 unless `bf16` is set.
    """

    trainer: str = "sft"
    activation: str = "crrelu"
    epsilon_per: str = "layer"
    calibration: str = "fit"
    affine_learning_rate: float = 0.0
    recompute_activation: bool = False
    per_device_train_batch_size: int = 8
    max_length: int = 1024
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = True
    dtype: str = "float32"
    bf16: bool = True
    use_peft: bool = False
    lora_r: int = 16
    load_in_4bit: bool = False
    precompute_ref_log_probs: bool = False
    use_cpu: bool = False

    def __post_init__(self) -> None:
        """Raises InputError for incompatible options."""
        if self.trainer == "image":
            raise InputError("crrelu plan counts tokens, and does not support image models: leave --trainer image out")
        for key in ("per_device_train_batch_size", "max_length", "gradient_accumulation_steps", "lora_r"):
            if getattr(self, key) < 1:
                raise InputError(f"{key} must be 1 or more, not {getattr(self, key)}")
        if self.load_in_4bit and not self.use_peft:
            raise InputError("load_in_4bit: 4-bit weights cannot be trained directly; add --use_peft")
        if self.precompute_ref_log_probs and not self.may_precompute:
            raise InputError(f"precompute_ref_log_probs: {self.trainer} has no such option; add --trainer dpo, or kto")
        if self.recompute_activation and not {"crrelu", NATIVE} & {*mixture.names_of(self.activation)}:
            raise InputError(f"recompute_activation is for CRReLU; it has no effect on {self.activation}")

    @property
    def kind(self) -> "Kind":
        """The kind of training."""
        from crrelu_llm.training.kinds import kind_of

        return kind_of(self.trainer)

    @property
    def may_precompute(self) -> bool:
        """Whether the reference's log-probabilities may be computed before training."""
        return hasattr(self.kind.config, "precompute_ref_log_probs")

    @property
    def has_reference(self) -> bool:
        """Whether training holds a second model; with adapters, the reference is the model without them."""
        return self.kind.reference and not self.use_peft and not self.precompute_ref_log_probs

    @property
    def rows(self) -> int:
        """Sequences in one forward pass; the chosen and rejected answers of a pair share a pass."""
        return self.per_device_train_batch_size * self.kind.sequences


def load_config(model: str, trust_remote_code: bool = False) -> Any:
    """The config of a MODEL, or a single `config.json` file of any name.

    Raises:
        InputError: The model does not exist, or has no config.
    """
    if not model.endswith(".json"):
        return loading.load_config(model, trust_remote_code=trust_remote_code)
    if not Path(model).expanduser().is_file():
        raise InputError(f"no such file: {model}")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(Path(model).expanduser()), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{model}: not the config of a model: {first.strip()}") from error
