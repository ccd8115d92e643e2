"""The gradual swap in a trainer: sets λ at every step, and fixes DPO's reference model."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback

from crrelu_llm.activation import CRReLU
from crrelu_llm.compat.peft import site_path
from crrelu_llm.data import sha256
from crrelu_llm.errors import InputError
from crrelu_llm.patching.blend import Blend, blend_weight

logger = logging.getLogger("crrelu_llm")
# Options that change the log-probabilities of the same rows.
_OF_A_ROW = ("ld_alpha", "max_length", "truncation_mode", "bf16", "fp16")


def blend_of(model: Any, section: dict[str, Any]) -> Blend:
    """The blend of a patched model, at λ = 0.

    Args:
        model: The trainer's model; under PEFT both the trained copy of a site and the original beside it blend.
        section: The `crrelu` section of the model's config.
    """
    originals = {site["path"]: site["original"] for site in section["sites"]}
    activations = []
    for name, module in model.named_modules():
        path = site_path(name)
        if path in originals and (isinstance(module, CRReLU) or "activation_name" in module.__dict__):
            owner = model.get_submodule(name.rpartition(".")[0])
            nearest = next(owner.parameters(), None)
            device = next(model.parameters()).device if nearest is None else nearest.device
            activations.append((module, path, originals[path], device))
    return Blend(activations)


def check_blend_ends(blend_steps: int, max_steps: int, where: str = "") -> None:
    """Raises InputError if λ would not reach 1 by the last step."""
    if max_steps < blend_steps:
        raise InputError(
            f"{where}blend_steps must be at most the number of training steps, {max_steps}, not {blend_steps}"
        )


class BlendCallback(TrainerCallback):
    """Sets λ before every optimiser step, from the number of finished steps only, so that a resume is exact."""

    def __init__(self, blend: Blend, steps: int, schedule: str):
        self.blend, self.steps, self.schedule = blend, steps, schedule

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises InputError if the training is too short for the blend."""
        check_blend_ends(self.steps, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets λ for the next step, the same for all its micro-batches."""
        self.blend.set(blend_weight(state.global_step, self.steps, self.schedule))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the blend: from now on the model uses only the new activation, in training mode too."""
        if state.global_step < self.steps:
            logger.warning(
                "training stopped after %d of %d blend_steps: the model is saved with the new activation alone",
                state.global_step,
                self.steps,
            )
        self.blend.set(1.0)


class BlendedReferenceMixin:
    """DPO's reference with a blend: the model at the start of training.

    At the first step λ is 0, so the policy is the patched checkpoint with the original activation. This model, fixed,
    is the reference, and the first loss is ln 2. The same holds for a separate reference model, for the base model
    with its adapter disabled, and for precomputed log-probabilities.
    """

    model: Any
    ref_model: Any
    blend: Blend | None
    reference_blend: Blend | None = None

    def install_blend(self) -> None:
        """Installs the blend, and fixes the reference."""
        super().install_blend()  # type: ignore[misc]
        if self.blend is None:
            return
        if self.ref_model is not None and self.reference_blend is None:
            self.reference_blend = blend_of(self.ref_model, self.model.config.crrelu)
            self.reference_blend.stay_original()
        if hasattr(self.model, "peft_config") and "disable_adapter" not in self.model.__dict__:
            self.model.disable_adapter = self._disable_adapter(self.model.disable_adapter)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """TRL's own method, on the model at the start of training; also called while the trainer is built."""
        self.install_blend()
        alone = self.blend is None or self.ref_model is not None
        with contextlib.nullcontext() if alone else self.blend.original():  # type: ignore[union-attr]
            return super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        self.install_blend()
        # TRL's cache key covers only the weights and the history of the rows. But arms differ in the activation, which
        # may have no weights, and the history contains all options, such as the seed and the output_dir: without the
        # hash of the tokens themselves, runs on the same rows would not share the cache.
        activation = self.model.config.to_dict().get("crrelu")
        mark = f" {activation}, original: {self.blend is not None}"
        mark += "".join(f", {key}: {getattr(self.args, key, None)}" for key in _OF_A_ROW)  # type: ignore
        if not self._precompute_model_hash.endswith(mark):  # type: ignore
            self._precompute_model_hash += mark  # type: ignore
        names = set(dataset.column_names or ())
        tokens = sorted(name for name in names if name.endswith("_ids"))
        if tokens and not names & {"image", "images"}:
            dataset._fingerprint = sha256(dataset.select_columns(tokens))[:32]
        return super()._precompute_ref_logps(dataset, *args, **kwargs)  # type: ignore[misc]

    def _disable_adapter(self, disable: Any) -> Any:
        @contextlib.contextmanager
        def disable_adapter() -> Iterator[None]:
            with self.blend.original(), disable():  # type: ignore[union-attr]
                yield

        return disable_adapter
