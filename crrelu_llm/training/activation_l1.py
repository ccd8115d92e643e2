"""An L1 term on activations in a trainer's loss: it draws the outputs of the sites towards 0."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from crrelu_llm.compat.peft import site_path
from crrelu_llm.errors import InputError
from crrelu_llm.patching import section
from crrelu_llm.patching.activations import is_ours
from crrelu_llm.patching.modules import fused

_OWN_EXPERT = re.compile(r"experts\.\d+\.")  # a module for each expert, to which a batch may send nothing


class ActivationL1:
    """The mean absolute output of the patched sites of a model while it trains.

    Works by forward hooks. Counted is what a forward pass in training mode with gradients gives within `collecting`:
    neither evaluation, nor a reference under `no_grad`, nor the repeated passes of gradient checkpointing, which run
    while gradients are computed. The output is the activation's own: a gated CRReLU is multiplied by the other
    projection in a step of its own as long as this is there. Under a gradual swap it is the mixture.

    Args:
        model: As a trainer holds it, patched; under PEFT the trained copies are watched too.
    """

    def __init__(self, model: nn.Module):
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        found = section.read(base.config)
        assert found is not None
        self._kinds = {site["path"]: site.get("kind") for site in found["sites"]}
        paths = [section.local_path(base, path) for path in self._kinds]
        fused.fuse(base, [path for path in paths if path is not None], product=False)
        self._outputs: dict[str, list[tuple[Tensor, Tensor | None, int]]] = {}
        self._mask: Tensor | None = None
        self._collects = self._looked = False
        # The decoder: some losses call it, and not the model around it. It gets all options by name.
        decoder = base.get_decoder() or base.base_model
        decoder.register_forward_pre_hook(self._keep_mask, with_kwargs=True)
        for name, module in model.named_modules():
            path = self._site(site_path(name))
            if path is not None and is_ours(module):
                module.register_forward_hook(self._keeper(path))

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Within it, outputs are counted."""
        self._outputs.clear()
        self._collects = True
        try:
            yield
        finally:
            self._collects, self._mask = False, None

    def mean(self) -> Tensor:
        """The mean of |output| over tokens and channels of each site, and of that over the sites; float32, with its
        gradient.

        Tokens that a two-dimensional attention mask excludes do not count, except where a model routes tokens to
        experts.

        Raises:
            InputError: Of some site no output came by, so that it would not be drawn to 0.
        """
        if not self._looked:
            self._looked = True
            self._require_all()
        means = []
        for path, parts in self._outputs.items():
            total, count = None, 0
            for per_token, mask, width in parts:
                kept = None if self._kinds[path] == "experts" else _mask_of(per_token, mask)
                value = (per_token if kept is None else per_token * kept).sum()
                total = value if total is None else total + value
                count = count + width * (per_token.numel() if kept is None else kept.sum())
            assert total is not None
            means.append(total / torch.as_tensor(count, device=total.device).clamp(min=1))
        self._outputs.clear()
        return torch.stack([value.to(means[0].device) for value in means]).mean()

    def _site(self, path: str) -> str | None:
        """The site of the section at a path; a head on the base model has a prefix more or less."""
        return next(
            (site for site in self._kinds if f".{site}".endswith(f".{path}") or path.endswith(f".{site}")), None
        )

    def _require_all(self) -> None:
        lost = [path for path in self._kinds if path not in self._outputs and not _OWN_EXPERT.search(path)]
        if lost or not self._outputs:
            raise InputError(
                f"activation_l1: no output of {len(lost)} of {len(self._kinds)} sites came by in training (first: "
                f"{(lost or list(self._kinds))[0]}): a kernel computes the activation in its own way, or nothing of "
                "it is trained; leave activation_l1 out"
            )

    def _keep_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._collects and torch.is_grad_enabled():
            mask = kwargs.get("attention_mask")
            self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _keeper(self, path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not (module.training and torch.is_grad_enabled()):
                return
            # Also in a repeated pass, which must keep the same tensors for the gradients as the first one did. A norm,
            # so that no second tensor of the size of the output is made.
            wide = None if output.dtype == torch.float64 else torch.float32
            per_token = torch.linalg.vector_norm(output, ord=1, dim=-1, dtype=wide)
            if self._collects:
                self._outputs.setdefault(path, []).append((per_token, self._mask, output.shape[-1]))

        return keep


def _mask_of(per_token: Tensor, mask: Tensor | None) -> Tensor | None:
    """Which of the tokens count; None where all do. Some models flatten batch and tokens before the site (OPT)."""
    if mask is None or mask.numel() != per_token.numel() or (per_token.dim() > 1 and mask.shape != per_token.shape):
        return None
    return (mask != 0).to(per_token).view(per_token.shape)


class ActivationL1Mixin:
    """Adds `activation_l1` · the mean absolute activation to a trainer's loss in training, and logs the mean.

    Every micro-batch of every process counts alike in a step, so that gradient accumulation is a larger batch where
    micro-batches have as many tokens. Evaluation is left alone: `eval_loss` stays the task's.
    """

    args: Any
    model: Any
    accelerator: Any
    activation_args: Any
    l1: ActivationL1 | None = None

    def install_activation_l1(self) -> None:
        """Watches the sites, where the recipe asks for it and the model is patched.

        Raises:
            InputError: Gradient checkpointing is of the kind through which no gradient comes from inside a layer.
        """
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if not self.activation_args.activation_l1 or section.read(base.config) is None:
            return
        if self.args.gradient_checkpointing and (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise InputError(
                "activation_l1 needs the gradients of single layers, which gradient_checkpointing with use_reentrant: "
                "true does not give (TRL sets it for adapters under ZeRO-3); set gradient_checkpointing_kwargs: "
                "{use_reentrant: false}, or leave activation_l1 out"
            )
        self.l1 = ActivationL1(self.model)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loss, in training plus the weighted mean; logs `activation_l1`, the mean alone."""
        if self.l1 is None or not self.model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        with self.l1.collecting():
            result = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        mean = self.l1.mean()
        logged = self.accelerator.gather(mean.detach().view(1)).mean().item()
        self._metrics["train"]["activation_l1"].append(logged)  # type: ignore[attr-defined]
        loss = result[0] if isinstance(result, tuple) else result
        loss = loss + (self.activation_args.activation_l1 * mean / self._micro_batches(args, kwargs)).to(loss)
        return (loss, *result[1:]) if isinstance(result, tuple) else loss

    def _micro_batches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """What the term is divided by: a Trainer divides by the micro-batches of a step only what it takes for a mean
        of one (see `Trainer.training_step`)."""
        items = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        whole: Any = getattr(self, "loss_is_scaled_for_ga", None)
        if whole is None:
            whole = (self.model_accepts_loss_kwargs and items is not None) or (  # type: ignore[attr-defined]
                self.compute_loss_func is not None  # type: ignore[attr-defined]
            )
        return self.current_gradient_accumulation_steps if whole else 1  # type: ignore[attr-defined]
