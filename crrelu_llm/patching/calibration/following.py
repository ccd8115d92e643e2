"""The level `refit`: finds the projection after a site by running the model, and refits the projection."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from crrelu_llm.patching.calibration.taps import tapped
from crrelu_llm.patching.feeding import run_on
from crrelu_llm.patching.sites import Site

_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # shares of the features' mean square


def find_following(model: nn.Module, sites: list[Site], input_ids: Tensor) -> dict[str, nn.Module]:
    """The linear layer that each site's product feeds, found by matching inputs and outputs in a forward pass.

    Args:
        model: The model before the patch.
        sites: Its sites.
        input_ids: A few tokens, `(1, tokens)`, or the pixels of an image.

    Returns:
        The linear layers by the path of the site. A site is left out if its product goes elsewhere (fused experts, a
        norm in between), or to a layer that is shared, quantised, used more than once, or more than a matrix.
    """
    flow = Flow(model, sites, input_ids)
    found = {}
    for site in sites:
        used = flow.uses.get(site.path, [])
        following = flow.after(used[0].product) if len(used) == 1 and site.kind != "experts" else None
        if following is not None:
            found[site.path] = following
    return found


@dataclass
class Use:
    """The input of one use of a site's activation, and the MLP's product there."""

    x: Tensor
    product: Tensor


class Flow:
    """The inputs and outputs of each linear layer and each site's activation, on a few tokens.

    Args:
        model: The model.
        sites: Its sites.
        input_ids: A few tokens, `(1, tokens)`.
    """

    def __init__(self, model: nn.Module, sites: list[Site], input_ids: Tensor):
        linears = [module for module in model.modules() if isinstance(module, nn.Linear) or _is_conv1d(module)]
        self.uses: dict[str, list[Use]] = {}  # by the path of the site
        self._weights = [id(linear.weight) for linear in linears]
        self._calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        hooks = [linear.register_forward_hook(self._called) for linear in linears]
        try:
            with tapped(model, sites, self._seen), torch.no_grad():
                run_on(model, input_ids, head=False)
        finally:
            for hook in hooks:
                hook.remove()

    def before(self, x: Tensor) -> nn.Module | None:
        """The only linear layer that returned `x`, if it can be changed."""
        return self._only([call for call in self._calls if _equal(call[2], x)])

    def after(self, product: Tensor) -> nn.Module | None:
        """The only linear layer that received `product`, if it can be changed."""
        return self._only([call for call in self._calls if _equal(call[1], product)])

    def _only(self, calls: list[tuple[nn.Module, Tensor, Tensor]]) -> nn.Module | None:
        # Compared by weight: layers may be tied (Zamba), and a change for one would be wrong for the other.
        if len(calls) != 1 or self._weights.count(id(calls[0][0].weight)) != 1 or not _is_a_matrix(*calls[0]):
            return None
        return calls[0][0]

    def _called(self, module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            # Copied because later operations may work in place (Falcon adds the attention's output to the MLP's).
            self._calls.append((module, args[0].detach().clone(), output.detach().clone()))

    def _seen(self, path: str, x: Tensor, y: Tensor, other: Tensor | None, result: Tensor) -> None:
        self.uses.setdefault(path, []).append(Use(x.detach().clone(), result.detach().clone()))


class Refit:
    """Finds the change of a projection that compensates for the remaining error of a new activation.

    Solves argmin ‖(W + ΔW)·h' − W·h‖² + λ‖ΔW‖², where h and h' are the old and the new products; the bias is not
    penalised. Of several λ, and no change, takes the one with the least error on held-back text. Only sums are kept.

    Args:
        linear: The projection, `(outputs, width)`.
        original: The old activation.
        activation: The new one, calibrated.
    """

    def __init__(self, linear: nn.Module, original: nn.Module, activation: nn.Module):
        self.linear, self.original, self.activation = linear, original, activation
        self._fitted: list[Tensor] = []
        self._held_back: list[Tensor] = []

    @torch.no_grad()
    def add(self, x: Tensor, factor: Tensor | None, held_back: bool) -> None:
        """Counts a use of the activation: its inputs, `(…, channels)`, and the factor that its outputs are
        multiplied by."""
        old, new = (activation(x).reshape(-1, x.shape[-1]).float() for activation in (self.original, self.activation))
        if factor is not None:
            factor = factor.reshape(-1, factor.shape[-1]).float()
            old, new = old * factor, new * factor
        wanted = (old - new) @ matrix(self.linear).float().T
        features = new
        if getattr(self.linear, "bias", None) is not None:
            features = torch.cat([new, new.new_ones(len(new), 1)], 1)
        parts = (features.T @ features, features.T @ wanted, wanted.square().sum())
        sums = self._held_back if held_back else self._fitted
        if not sums:
            sums.extend(part.double() for part in parts)
        else:
            for total, part in zip(sums, parts, strict=True):
                total += part.double()

    @torch.no_grad()
    def solve(self) -> bool:
        """Changes the projection where that lowers the error on held-back text; returns whether it was changed."""
        if not self._fitted or not self._held_back:
            return False
        gram, moment, _ = self._fitted
        width = matrix(self.linear).shape[1]
        unit = gram.diagonal()[:width].mean()
        best, change = self._error(torch.zeros_like(moment)), None
        for penalty in _PENALTIES:
            penalised = gram.clone()
            penalised.diagonal()[:width] += penalty * unit
            penalised.diagonal()[width:] += 1e-9 * unit
            factor, failed = torch.linalg.cholesky_ex(penalised)
            if failed or not unit > 0:
                continue
            candidate = torch.cholesky_solve(moment, factor)
            error = self._error(candidate)
            if math.isfinite(error) and error < best:
                best, change = error, candidate
        if change is None:
            return False
        matrix(self.linear).add_(change[:width].T.to(matrix(self.linear)))
        if len(change) > width:
            cast(Tensor, self.linear.bias).add_(change[width].to(matrix(self.linear)))
        return True

    def _error(self, change: Tensor) -> float:
        gram, moment, square = self._held_back
        return float((change * (gram @ change)).sum() - 2 * (change * moment).sum() + square)


def weights_of(linear: nn.Module) -> dict[str, Tensor]:
    """The weight of a projection and, where it has one, its bias; not copied."""
    found = {"weight": linear.weight, "bias": getattr(linear, "bias", None)}
    return {name: cast(Tensor, value).detach() for name, value in found.items() if value is not None}


def _is_a_matrix(module: nn.Module, given: Tensor, output: Tensor) -> bool:
    """Whether a layer only multiplies and adds, with weights that can be changed."""
    weight = cast(Tensor, module.weight)
    if not weight.is_floating_point() or weight.is_meta or type(weight).__module__.startswith("bitsandbytes"):
        return False
    bias = cast(Tensor | None, getattr(module, "bias", None))
    expected = nn.functional.linear(given.float(), matrix(module).float(), None if bias is None else bias.float())
    tolerance = 1e-4 if given.dtype == torch.float32 else 5e-2
    expected = expected.detach()
    return torch.allclose(output.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def matrix(linear: nn.Module) -> Tensor:
    """A view of the weight as `(outputs, inputs)`."""
    weight = cast(Tensor, linear.weight).detach()
    return weight.T if _is_conv1d(linear) else weight


def _equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same rows, whatever their leading dimensions."""
    return (
        first.numel() == second.numel()
        and first.shape[-1] == second.shape[-1]
        and torch.equal(first.reshape(-1, first.shape[-1]), second.reshape(-1, second.shape[-1]))
    )


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"
