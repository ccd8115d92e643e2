"""The weights around a site: the linear layers that feed an activation and the one that follows, found as it runs."""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from crrelu_llm.patching.calibration.taps import tapped
from crrelu_llm.patching.sites import Site


@dataclass
class Rows:
    """Some of the outputs of a linear layer: all of them, or one half of a fused gate and up-projection."""

    linear: nn.Module
    start: int
    stop: int


@dataclass
class Weights:
    """Copies of an MLP's weights, float32: `down(activation(gate(x)) · up(x))`, or without the product in a plain MLP.

    Attributes:
        gate: `(width, hidden)`; what feeds the activation. In a plain MLP, its input projection.
        up: `(width, hidden)`, or None in a plain MLP.
        down: `(hidden, width)`.
        gate_bias: `(width,)` or None; likewise `up_bias`, and `down_bias` `(hidden,)`.
    """

    gate: Tensor
    up: Tensor | None
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None

    def features(self, x: Tensor, activation: nn.Module) -> Tensor:
        """What enters the following projection: `(tokens, width)` for `x` of `(tokens, hidden)`."""
        y = activation(nn.functional.linear(x, self.gate, self.gate_bias))
        return y if self.up is None else y * nn.functional.linear(x, self.up, self.up_bias)

    def output(self, x: Tensor, activation: nn.Module) -> Tensor:
        """The MLP's output: `(tokens, hidden)` for `x` of `(tokens, hidden)`."""
        return nn.functional.linear(self.features(x, activation), self.down, self.down_bias)

    def tensors(self) -> dict[str, Tensor]:
        """Those that exist, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


class Mlp:
    """An MLP whose weights calibration may change: plain linear layers around one activation."""

    def __init__(self, gate: Rows, up: Rows | None, down: nn.Module):
        self.gate, self.up, self.down = gate, up, down

    def rounded(self, weights: Weights) -> Weights:
        """What is left of weights when they have been written."""
        dtype = cast(Tensor, self.down.weight).dtype
        parts = {name: value.to(dtype).float() for name, value in weights.tensors().items()}
        return weights if dtype == torch.float32 else replace(weights, **parts)

    def read(self) -> Weights:
        """Its weights, copied, in float32 on their device."""
        gate, gate_bias = _read(self.gate)
        up, up_bias = _read(self.up) if self.up else (None, None)
        down, down_bias = _read(Rows(self.down, 0, _outputs(self.down)))
        return Weights(gate, up, down, gate_bias, up_bias, down_bias)

    def write(self, weights: Weights) -> None:
        """Puts weights in, rounded to the model's own dtype."""
        _write(self.gate, weights.gate, weights.gate_bias)
        if self.up and weights.up is not None:
            _write(self.up, weights.up, weights.up_bias)
        _write(Rows(self.down, 0, _outputs(self.down)), weights.down, weights.down_bias)


def find_mlps(model: nn.Module, sites: list[Site], input_ids: Tensor) -> dict[str, Mlp]:
    """The MLP of each site, found by what flows where: the numbers that enter and leave the activation.

    Args:
        model: The model, as it is before the patch.
        sites: Its sites.
        input_ids: A few tokens, `(1, tokens)`.

    Returns:
        By the site's path. A site whose MLP is more than linear layers around an activation (fused experts, a norm or
        a factor in between) or is used more than once is not in it.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) or _is_conv1d(module)]
    watch = _Watch([id(linear.weight) for linear in linears])
    hooks = [linear.register_forward_hook(watch.linear) for linear in linears]
    found: dict[str, Mlp] = {}
    backbone = getattr(model, getattr(model, "base_model_prefix", ""), model)
    try:
        with tapped(model, sites, watch.activation), torch.no_grad():
            backbone(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for site in sites:
        mlp = watch.assemble(site)
        if mlp is not None:
            found[site.path] = mlp
    return found


class _Watch:
    """Keeps, for a few tokens, what each linear layer and each activation was given and gave."""

    def __init__(self, weights: list[int]) -> None:
        self.weights = weights
        self.linears: list[tuple[nn.Module, Tensor, Tensor]] = []
        self.activations: dict[str, list[tuple[Tensor, Tensor | None, Tensor]]] = {}

    def linear(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
            return  # a router that is called a linear layer
        # Copied: what follows may work in place (Falcon adds the attention's output to the MLP's).
        self.linears.append((module, args[0].detach().clone(), output.detach().clone()))

    def activation(self, path: str, x: Tensor, y: Tensor, other: Tensor | None, result: Tensor) -> None:
        self.activations.setdefault(path, []).append((x, other, result))

    def assemble(self, site: Site) -> Mlp | None:
        calls = self.activations.get(site.path, [])
        if len(calls) != 1 or site.kind == "experts":
            return None
        x, other, result = calls[0]
        gate = self._source(x, site.num_channels)
        up = None if other is None else self._source(other, site.num_channels)
        down = [module for module, given, _ in self.linears if _equal(given, result)]
        modules = [rows.linear for rows in (gate, up) if rows] + down
        # By the weight: layers may be tied (Zamba), and what is made for one would be wrong for the other.
        used = [self.weights.count(id(module.weight)) for module in modules]
        if gate is None or len(down) != 1 or (other is not None and up is None) or any(n != 1 for n in used):
            return None
        inputs = [given for module, given, _ in self.linears for rows in (gate, up) if rows and module is rows.linear]
        if not all(_equal(given, inputs[0]) for given in inputs[1:]):
            return None
        # A family's own kind of linear layer may do more than multiply and add.
        plain = [self._plain(module, given, output) for module, given, output in self.linears if module in modules]
        return Mlp(gate, up, down[0]) if all(plain) else None

    def _plain(self, module: nn.Module, given: Tensor, output: Tensor) -> bool:
        weight, bias = _read(Rows(module, 0, _outputs(module)))
        tolerance = 1e-4 if given.dtype == torch.float32 else 5e-2
        expected = nn.functional.linear(given.float(), weight, bias)
        return torch.allclose(output.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))

    def _source(self, x: Tensor, width: int) -> Rows | None:
        """The linear layer, and the part of its outputs, that `x` is."""
        for module, _, output in self.linears:
            for start in range(0, output.shape[-1] - width + 1, width):
                if _equal(output[..., start : start + width], x):
                    return Rows(module, start, start + width)
        return None


def _equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same rows, whatever their leading dimensions."""
    return (
        first.numel() == second.numel()
        and first.shape[-1] == second.shape[-1]
        and torch.equal(first.reshape(-1, first.shape[-1]), second.reshape(-1, second.shape[-1]))
    )


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _outputs(linear: Any) -> int:
    return linear.nf if _is_conv1d(linear) else linear.out_features


def _read(rows: Rows) -> tuple[Tensor, Tensor | None]:
    linear: Any = rows.linear
    weight = linear.weight.detach().T if _is_conv1d(linear) else linear.weight.detach()
    part = slice(rows.start, rows.stop)
    bias = None if linear.bias is None else linear.bias.detach()[part].float().clone()
    return weight[part].float().clone(), bias


def _write(rows: Rows, weight: Tensor, bias: Tensor | None) -> None:
    linear: Any = rows.linear
    part = slice(rows.start, rows.stop)
    with torch.no_grad():
        target = linear.weight.T if _is_conv1d(linear) else linear.weight
        target[part].copy_(weight)
        if bias is not None:
            linear.bias[part].copy_(bias)
