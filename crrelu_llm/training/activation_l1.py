"""An L1 term on activations in a trainer's loss, which draws the outputs of the sites towards 0."""

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

_OWN_EXPERT = re.compile(r"experts\.\d+\.")  # one module per expert; a batch may route no token to it


class ActivationL1:
    """The mean absolute output of a model's patched sites in training.

    Forward hooks collect the outputs of forward passes in training mode with gradients, inside `collecting`. Not
    counted are evaluation, a reference under `no_grad`, and the repeated passes of gradient checkpointing, which run
    during the backward pass. The output is that of the activation alone: these hooks disable the fused gated product
    of CRReLU. During a gradual swap the output is the mixture.

    Args:
        model: The trainer's patched model; under PEFT the trained copies of the sites are observed too.
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
        # Hooked on the decoder, because some losses call only the decoder. All its options are passed by keyword.
        decoder = base.get_decoder() or base.base_model
        decoder.register_forward_pre_hook(self._keep_mask, with_kwargs=True)
        for name, module in model.named_modules():
            path = self._site(site_path(name))
            if path is not None and is_ours(module):
                module.register_forward_hook(self._keeper(path))

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """A context in which outputs are counted."""
        self._outputs.clear()
        self._collects = True
        try:
            yield
        finally:
            self._collects, self._mask = False, None

    def mean(self) -> Tensor:
        """The mean of |output| over each site's tokens and channels, averaged over the sites; float32, with gradient.

        Tokens that a two-dimensional attention mask excludes do not count, except where a model routes tokens to
        experts.

        Raises:
            InputError: A site had no output, so the term would not act on it.
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
        """The section's site at a path; with another head on the base model, the prefix may differ."""
        return next(
            (site for site in self._kinds if f".{site}".endswith(f".{path}") or path.endswith(f".{site}")), None
        )

    def _require_all(self) -> None:
        lost = [path for path in self._kinds if path not in self._outputs and not _OWN_EXPERT.search(path)]
        if lost or not self._outputs:
            raise InputError(
                f"activation_l1: {len(lost)} of {len(self._kinds)} sites had no output in training (first: "
                f"{(lost or list(self._kinds))[0]}): a kernel replaces the activation, or the site is not "
                "trained; leave activation_l1 out"
            )

    def _keep_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._collects and torch.is_grad_enabled():
            mask = kwargs.get("attention_mask")
            self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _keeper(self, path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not (module.training and torch.is_grad_enabled()):
                return
            # Computed in repeated passes too, which must save the same tensors for the gradients as the first pass. A
            # norm avoids a second tensor of the size of the output.
            wide = None if output.dtype == torch.float64 else torch.float32
            per_token = torch.linalg.vector_norm(output, ord=1, dim=-1, dtype=wide)
            if self._collects:
                self._outputs.setdefault(path, []).append((per_token, self._mask, output.shape[-1]))

        return keep


def _mask_of(per_token: Tensor, mask: Tensor | None) -> Tensor | None:
    """A mask of the tokens that count; None if all do. Some models (OPT) flatten batch and tokens before the site."""
    if mask is None or mask.numel() != per_token.numel() or (per_token.dim() > 1 and mask.shape != per_token.shape):
        return None
    return (mask != 0).to(per_token).view(per_token.shape)


class ActivationL1Mixin:
    """Adds `activation_l1` · the mean absolute activation to a trainer's loss in training, and logs the mean.

    Every micro-batch of every process has the same weight in a step, so that gradient accumulation equals a larger
    batch if micro-batches have equal numbers of tokens. Evaluation does not change: `eval_loss` is the task's loss.
    """

    args: Any
    model: Any
    accelerator: Any
    activation_args: Any
    l1: ActivationL1 | None = None

    def install_activation_l1(self) -> None:
        """Installs the hooks on the sites if the recipe sets `activation_l1` and the model is patched.

        Raises:
            InputError: Gradient checkpointing is of the kind that gives no gradient for tensors inside a layer.
        """
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if not self.activation_args.activation_l1 or section.read(base.config) is None:
            return
        if self.args.gradient_checkpointing and (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise InputError(
                "activation_l1 needs the gradients inside layers, which gradient_checkpointing with use_reentrant: "
                "true does not give (TRL sets it for adapters under ZeRO-3); set gradient_checkpointing_kwargs: "
                "{use_reentrant: false}, or leave activation_l1 out"
            )
        self.l1 = ActivationL1(self.model)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loss, in training plus the weighted mean; logs the unweighted mean as `activation_l1`."""
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
        """The divisor of the term: a Trainer divides a loss by the number of micro-batches in a step only if it takes
        the loss for the mean of one micro-batch (see `Trainer.training_step`)."""
        items = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        whole: Any = getattr(self, "loss_is_scaled_for_ga", None)
        if whole is None:
            whole = (self.model_accepts_loss_kwargs and items is not None) or (  # type: ignore[attr-defined]
                self.compute_loss_func is not None  # type: ignore[attr-defined]
            )
        return self.current_gradient_accumulation_steps if whole else 1  # type: ignore[attr-defined]
