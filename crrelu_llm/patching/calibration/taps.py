"""Observes the activations of a model while it runs: the input, the output and the factor of each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from crrelu_llm.patching.sites import Site

_MULTIPLICATIONS = {torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}

# (path of the site, its input, its output, the other factor or None, the product, or the output without a factor)
Seen = Callable[[str, Tensor, Tensor, Tensor | None, Tensor], None]


@contextlib.contextmanager
def tapped(model: nn.Module, sites: list[Site], seen: Seen) -> Iterator[Callable[[], None]]:
    """Calls `seen` for every use of the sites' activations; sites that share one module are reported as the first.

    The product `activation(gate) * up` is found in whichever module or fused expert computes it. For this, a use is
    reported only at the next use, or at the end.

    Yields:
        A function that reports the last use immediately.
    """
    owners: dict[int, tuple[nn.Module, str, nn.Module, str]] = {}
    for site in sites:
        owner = model.get_submodule(site.owner)
        owners.setdefault(id(owner), (owner, site.attribute, getattr(owner, site.attribute), site.path))
    products = _Products(seen)
    try:
        for owner, attribute, activation, path in owners.values():
            setattr(owner, attribute, _Tap(activation, path, products))
        with products:
            yield products.flush
        products.flush()
    finally:
        for owner, attribute, activation, _ in owners.values():
            setattr(owner, attribute, activation)


class _Tap(nn.Module):
    """Stands in for an activation and reports its inputs and outputs."""

    def __init__(self, activation: nn.Module, path: str, products: _Products):
        super().__init__()
        self.activation, self.path, self.products = activation, path, products

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        y = self.activation(x)
        self.products.flush()
        self.products.pending = (self.path, x, y)
        return y if up is None else y * up


class _Products(TorchFunctionMode):
    """Looks for the multiplication of a pending activation."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen
        self.pending: tuple[str, Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.pending is not None and func in _MULTIPLICATIONS and len(args) == 2:
            path, x, y = self.pending
            other = args[1] if args[0] is y else args[0] if args[1] is y else None
            if isinstance(other, Tensor) and other.shape == y.shape:
                self.pending = None
                self.seen(path, x, y, other, result)
        return result

    def flush(self) -> None:
        """Reports an activation that was not multiplied by anything."""
        if self.pending is not None:
            path, x, y = self.pending
            self.pending = None
            self.seen(path, x, y, None, y)
