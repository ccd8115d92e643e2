"""Recovery by distillation: adds the KL divergence from the original model, the teacher, to the SFT loss."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import create_model_from_path

from crrelu_llm.compat.trl import chunked_divergence
from crrelu_llm.errors import InputError
from crrelu_llm.patching import loading, section
from crrelu_llm.patching.transform import read_origin
from crrelu_llm.training.arguments import Recipe
from crrelu_llm.training.prepare import starting_checkpoint

_FORWARD_KL = 0.0  # TRL's beta: KL(teacher ‖ student), an average over the teacher's distribution
_NOT_OF_THE_BACKBONE = ("labels", "shift_labels", "use_cache", "output_router_logits")


class DistillationMixin:
    """Adds `weight` · KL(teacher ‖ student) to the training loss of TRL's SFTTrainer.

    The divergence compares next-token distributions over the whole vocabulary, in float32. It is summed over the same
    tokens as the cross-entropy and divided by the same number, so that gradient accumulation equals a larger batch for
    both. TRL's own kernel computes it from hidden states, tile by tile, without full logits. The student's hidden
    states come from its single forward pass. Evaluation does not change: `eval_loss` is the cross-entropy, comparable
    with every other run.
    """

    model: Any
    accelerator: Any
    args: Any
    teacher: Any = None
    _weight: float = 0.0

    def learn_from(self, teacher: Any, weight: float) -> None:
        """Sets and freezes the teacher: a causal LM of the student's architecture, on the student's device."""
        self.teacher, self._weight = teacher.eval().requires_grad_(False), weight
        self._seen = _LastHiddenState()
        _base(self.model).base_model.register_forward_hook(self._seen)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """TRL's loss, in training plus the weighted divergence; logs `distill_kl`, its mean over this batch."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if self.teacher is None or not self.model.training:
            return result
        labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][:, 1:]
        student, self._seen.value = self._seen.value, None
        assert student is not None
        total = self._divergence(student, inputs, labels != -100)
        tokens = (labels != -100).sum()
        gathered = self.accelerator.gather(torch.stack([total.detach(), tokens.to(total)]).view(1, 2))
        mean = gathered[:, 0].sum() / gathered[:, 1].sum().clamp(min=1)
        self._metrics["train"]["distill_kl"].append(mean.item())  # type: ignore[attr-defined]
        count = torch.as_tensor(tokens if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        loss = self._weight * total / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # num_items_in_batch counts the tokens of all processes, over which DDP averages the gradients.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # type: ignore[attr-defined]
        return (result[0] + loss, result[1]) if return_outputs else result + loss

    def _divergence(self, student_states: Tensor, inputs: Any, mask: Tensor) -> Tensor:
        """The divergence summed over the tokens selected by `mask`, (batch, tokens − 1)."""
        with torch.no_grad():
            kwargs = {key: value for key, value in inputs.items() if key not in _NOT_OF_THE_BACKBONE}
            teacher_states = self.teacher.base_model(**kwargs, use_cache=False).last_hidden_state
        student, teacher = _base(self.model).get_output_embeddings(), self.teacher.get_output_embeddings()
        config = self.teacher.config.get_text_config()
        scale, cap = _logit_scale(config), getattr(config, "final_logit_softcapping", None)
        length = mask.size(1)
        total, _, _ = chunked_divergence(
            student_states[:, :length].to(student.weight.device),
            teacher_states[:, :length].to(student.weight.device),
            student.weight,
            teacher.weight,
            mask.to(student.weight.device),
            _FORWARD_KL,
            num_items_in_batch=1,  # the sum
            student_lm_head_bias=student.bias,
            teacher_lm_head_bias=teacher.bias,
            student_logit_scale=scale,
            teacher_logit_scale=scale,
            student_final_logit_softcapping=cap,
            teacher_final_logit_softcapping=cap,
        )
        return total


class _LastHiddenState:
    """A forward hook on a backbone that keeps the hidden states for the LM head."""

    value: Tensor | None = None

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():  # TRL may run the model again for its metrics
            self.value = output.last_hidden_state


def teacher_source(recipe: Recipe, model: str) -> str:
    """The unpatched checkpoint from which a run's starting checkpoint `model` was made.

    Raises:
        InputError: `model` is patched, and does not name its original, or the original is missing or patched too.
    """
    trust = recipe.training.trust_remote_code
    if section.read(loading.load_config(model, revision=recipe.model.model_revision, trust_remote_code=trust)) is None:
        return model
    origin = read_origin(model) if Path(model).is_dir() else None
    where = f"{recipe.source}: distill_weight: the teacher is the model before the patch, but"
    if origin is None:
        raise InputError(f"{where} {model} does not name the original; start from the original checkpoint")
    try:
        source = starting_checkpoint(
            origin["model"],
            None,
            Path(recipe.training.output_dir) / "teacher",  # used only for a GGUF file, which must be converted
            origin["dtype"],
            revision=origin["revision"],
            trust_remote_code=trust,
        )
        patched = section.read(loading.load_config(source, revision=origin["revision"], trust_remote_code=trust))
    except InputError as error:
        raise InputError(f"{where} the original of {model} is no longer there: {error}") from error
    if patched is not None:
        raise InputError(f"{where} {origin['model']}, which {model} was made from, is patched too")
    return source


def load_teacher(recipe: Recipe, model: str, quantization_config: Any, device: torch.device) -> Any:
    """Loads the teacher of a run that starts from `model`, quantised like the student."""
    source = teacher_source(recipe, model)
    options: dict[str, Any] = {
        **recipe.training.model_init_kwargs,
        "trust_remote_code": recipe.training.trust_remote_code,
        "use_safetensors": loading.needs_safetensors(source),
    }
    origin = read_origin(model) if Path(model).is_dir() else None
    if origin is not None:
        options["revision"] = origin["revision"]
    if quantization_config is not None:  # bitsandbytes chooses the device
        if recipe.training.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            options["device_map"] = None
        return create_model_from_path(source, **options, quantization_config=quantization_config)
    teacher: Any = create_model_from_path(source, **{**options, "device_map": None})
    return teacher.to(device)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _logit_scale(config: Any) -> float:
    """The factor by which a family scales its logits (Cohere, Falcon-H1, Granite, ...); 1 for most."""
    for key in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, key, None) is not None:
            return getattr(config, key)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling
