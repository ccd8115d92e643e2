"""Fits ε to calibration text: weighted least squares, in closed form, one forward pass for all layers."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from crrelu_llm.patching.sites import Site

_MULTIPLICATIONS = {torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}


BLOCK_SIZE = 512
_PRIOR = 1e-2  # weight of the layer's ε in a channel's fit, as a share of an average channel's own evidence


def calibration_blocks(data: str, tokenizer: Any, tokens: int, config: Any) -> Tensor:
    """Calibration text as token ids, `(blocks, tokens of a block)`: `builtin:` data, a local file, or a hub name."""
    from crrelu_llm.data import language_modelling_blocks

    return language_modelling_blocks(data, tokenizer, tokens, block_size(config), split="calibration")


def block_size(config: Any) -> int:
    """Tokens in a block of text: 512, or what the model of this config can read, if that is less."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(BLOCK_SIZE, limit) if isinstance(limit, int) and limit > 0 else BLOCK_SIZE


@dataclass
class Fit:
    """ε of one site, float32, `(1,)` or `(channels,)`, and the relative error that it leaves."""

    epsilon: Tensor
    relative_error: float


def fit_epsilon(
    model: nn.Module, sites: list[Site], blocks: Tensor, epsilon_per: str, batch_size: int = 4
) -> dict[str, Fit]:
    """Fits ε of every site so that CRReLU comes closest to the site's own activation.

    Minimises Σ u²·(act(x) − relu(x) − ε·g(x))² with g(x) = x·exp(−x²/2), over the tokens of `blocks`; u is what the
    MLP multiplies the activation by (the up-projection of a gated MLP), and 1 in a plain one. Only sums per channel
    are kept, so memory does not grow with the text.

    Args:
        model: The unpatched model.
        sites: Its sites.
        blocks: Token ids, `(blocks, tokens)`, int64.
        epsilon_per: `"layer"` or `"channel"`.
        batch_size: Blocks in a forward pass.

    Returns:
        A fit for each site's path.
    """
    from tqdm.auto import tqdm

    recorders = {site.path: _Recorder(model.get_submodule(site.path), site.num_channels) for site in sites}
    backbone = getattr(model, getattr(model, "base_model_prefix", ""), model)  # the sites, without the LM head
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for path, recorder in recorders.items():
            _set(model, path, recorder)
        with torch.no_grad(), _SeeMultiplications() as seen:
            for recorder in recorders.values():
                recorder.seen = seen
            for batch in tqdm(blocks.split(batch_size), desc="Fitting epsilon", unit="batch"):
                backbone(input_ids=batch.to(device), use_cache=False)
                seen.flush()
    finally:
        for path, recorder in recorders.items():
            _set(model, path, recorder.original)
        model.train(was_training)
    return {path: recorder.solve(epsilon_per) for path, recorder in recorders.items()}


class _Recorder(nn.Module):
    """Stands in for a site's activation and keeps the sums of the least-squares problem, float64, per channel."""

    seen: "_SeeMultiplications"

    def __init__(self, original: nn.Module, num_channels: int):
        super().__init__()
        self.original = original
        # Σ w·g·g, Σ w·g·r, Σ w·r·r and Σ w·act², with r = act(x) − relu(x)
        self.sums = torch.zeros(4, num_channels, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.original(x)
        self.seen.flush()
        self.seen.pending = (self, x, y)
        return y

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None) -> None:
        x, y = x.flatten(0, -2).float(), y.flatten(0, -2).float()
        residual = y - x.relu()
        bump = x * torch.exp(-0.5 * x * x)
        w = torch.ones_like(x) if weight is None else weight.flatten(0, -2).float().square()
        terms = (w * bump * bump, w * bump * residual, w * residual * residual, w * y * y)
        self.sums += torch.stack([term.sum(0) for term in terms]).to("cpu", torch.float64)

    def solve(self, epsilon_per: str) -> Fit:
        gg, gr, rr, yy = self.sums
        whole = gr.sum() / gg.sum() if gg.sum() > 0 else gr.new_zeros(())
        if epsilon_per == "channel":
            # A channel whose inputs stay away from 0 says nothing about its ε: it is drawn to the layer's.
            prior = _PRIOR * gg.mean()
            epsilon = torch.where(gg + prior > 0, (gr + prior * whole) / (gg + prior), whole)
        else:
            epsilon = whole.reshape(1)
        left = (rr - 2 * epsilon * gr + epsilon * epsilon * gg).clamp_min(0).sum()
        total = yy.sum()
        return Fit(epsilon.float(), float((left / total).sqrt()) if total > 0 else 0.0)


class _SeeMultiplications(TorchFunctionMode):
    """Watches for the product `activation(gate) * up`, whatever module or fused expert computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: tuple[_Recorder, Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.pending is not None and func in _MULTIPLICATIONS and len(args) == 2:
            y = self.pending[2]
            other = args[1] if args[0] is y else args[0] if args[1] is y else None
            if isinstance(other, Tensor) and other.shape == y.shape:
                self.flush(other)
        return func(*args, **(kwargs or {}))

    def flush(self, weight: Tensor | None = None) -> None:
        """Counts the activation that is pending, with `weight` as what it is multiplied by."""
        if self.pending is not None:
            recorder, x, y = self.pending
            self.pending = None
            recorder.add(x, y, weight)


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)
