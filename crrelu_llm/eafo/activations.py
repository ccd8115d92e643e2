"""Scalar activations in float64: value, first and second derivative, and their formulas piece by piece."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from crrelu_llm.eafo.density import Array
from crrelu_llm.errors import InputError

Pieces = list[tuple[Any, Any, Any]]


@dataclass(frozen=True)
class Activation:
    """A function of a pre-activation; derivatives come from torch's autograd in float64.

    Attributes:
        name: The name on the command line.
        function: Maps a torch tensor to a torch tensor, elementwise.
        kinks: Points where f or f′ has no derivative; autograd's value is used there.
        pieces: For a real sympy symbol, the formula as `(low, high, expression)` between the kinks; None without a
            formula.
    """

    name: str
    function: Callable[[Any], Any]
    kinks: tuple[float, ...] = ()
    pieces: Callable[[Any], Pieces] | None = None

    def value(self, x: Any) -> Array:
        """f(x)."""
        import torch

        with torch.no_grad():
            return self.function(torch.as_tensor(np.asarray(x, dtype=np.float64))).numpy()

    def derivative(self, x: Any) -> Array:
        """f′(x)."""
        return self._derivatives(x)[0]

    def second(self, x: Any) -> Array:
        """f″(x), valid between the kinks."""
        return self._derivatives(x)[1]

    def _derivatives(self, x: Any) -> tuple[Array, Array]:
        import torch

        point = torch.as_tensor(np.array(x, dtype=np.float64)).requires_grad_()
        with torch.enable_grad():
            y = self.function(point)
            if not y.requires_grad:
                raise InputError(
                    f"activation {self.name} has no derivative (autograd does not reach its input); EAFO needs one: "
                    f"give a differentiable function of torch operations."
                )
            (first,) = torch.autograd.grad(y.sum(), point, create_graph=True)
            second = torch.zeros_like(point)
            if first.requires_grad:
                found = torch.autograd.grad(first.sum(), point, allow_unused=True)[0]
                # A sum, because autograd's zeros may have no storage.
                second = second if found is None else second + found
        return (torch.zeros_like(first) + first).detach().numpy(), second.detach().numpy()


def custom(function: Callable[[Any], Any], name: str = "custom", kinks: tuple[float, ...] = ()) -> Activation:
    """An activation from any differentiable function of torch tensors.

    Args:
        function: Elementwise, in float64.
        name: The name in messages and plots.
        kinks: Points without a derivative.

    Raises:
        InputError: The function has no derivative, jumps, or is not finite on [−10, 10].
    """
    activation = Activation(name, function, kinks)
    x = np.linspace(-10, 10, 40001) + 1e-7  # off the points where functions often have kinks
    try:
        value, slope = activation.value(x), activation.derivative(x)
    except InputError:
        raise
    except Exception as error:  # a user's function may raise anything
        why = str(error).partition("\n")[0]
        raise InputError(
            f"activation {name} cannot be computed ({type(error).__name__}: {why}); give a function of a float64 "
            "torch tensor, made of torch operations that change nothing in place."
        ) from error
    if value.shape != x.shape:
        raise InputError(f"activation {name} gives shape {value.shape} for {x.shape}; it must be elementwise.")
    if not (np.isfinite(value).all() and np.isfinite(slope).all()):
        where = x[~(np.isfinite(value) & np.isfinite(slope))][0]
        raise InputError(f"activation {name} or its derivative is not finite at {where:.4g}; EAFO needs both.")
    step = x[1] - x[0]
    jump = np.abs(np.diff(value)) > 20 * step * (np.maximum(np.abs(slope[:-1]), np.abs(slope[1:])) + 0.01)
    if jump.any():
        raise InputError(f"activation {name} jumps at {x[:-1][jump][0]:.4g}, so it has no derivative there.")
    return activation


def crrelu(epsilon: float, center: float = 0.0, width: float = 1.0) -> Activation:
    """relu(x) + ε·(x − center)·exp(−(x − center)²/(2·width²))."""

    if not (np.isfinite([epsilon, center, width]).all() and width > 0):
        raise InputError(
            f"activation crrelu({epsilon:g},{center:g},{width:g}): give finite numbers, and a width above 0."
        )

    def function(x: Any) -> Any:
        z = x - center
        return x.relu() + epsilon * z * (-z * z / (2 * width * width)).exp()

    def pieces(t: Any) -> Pieces:
        import sympy

        e, m, w = (sympy.nsimplify(value, rational=True) for value in (epsilon, center, width))
        bump = e * (t - m) * sympy.exp(-((t - m) ** 2) / (2 * w**2))
        return [(-sympy.oo, 0, bump), (0, sympy.oo, t + bump)]

    name = f"crrelu({epsilon:g})" if (center, width) == (0.0, 1.0) else f"crrelu({epsilon:g},{center:g},{width:g})"
    return Activation(name, function, (0.0,), pieces)


def _torch(name: str, **options: Any) -> Callable[[Any], Any]:
    def function(x: Any) -> Any:
        import torch

        return getattr(torch.nn.functional, name)(x, **options)

    return function


def _two(left: Callable[[Any], Any], right: Callable[[Any], Any]) -> Callable[[Any], Pieces]:
    """The formula left and right of 0."""

    def pieces(t: Any) -> Pieces:
        import sympy

        return [(-sympy.oo, 0, left(t)), (0, sympy.oo, right(t))]

    return pieces


def _one(formula: Callable[[Any, Any], Any]) -> Callable[[Any], Pieces]:
    def pieces(t: Any) -> Pieces:
        import sympy

        return [(-sympy.oo, sympy.oo, formula(sympy, t))]

    return pieces


def _exp(t: Any) -> Any:
    import sympy

    return sympy.exp(t)


_ALPHA, _SCALE = 1.6732632423543772, 1.0507009873554805  # constants of SELU: Klambauer et al. 2017

_REGISTRY: dict[str, Activation] = {
    entry.name: entry
    for entry in (
        Activation("relu", _torch("relu"), (0.0,), _two(lambda t: 0 * t, lambda t: t)),
        Activation("leaky_relu", _torch("leaky_relu"), (0.0,), _two(lambda t: t / 100, lambda t: t)),
        Activation(
            "prelu", partial(_torch("leaky_relu", negative_slope=0.25)), (0.0,), _two(lambda t: t / 4, lambda t: t)
        ),
        Activation("elu", _torch("elu"), (0.0,), _two(lambda t: _exp(t) - 1, lambda t: t)),
        Activation("celu", _torch("celu"), (0.0,), _two(lambda t: _exp(t) - 1, lambda t: t)),
        Activation(
            "selu", _torch("selu"), (0.0,), _two(lambda t: _SCALE * _ALPHA * (_exp(t) - 1), lambda t: _SCALE * t)
        ),
        Activation("gelu", _torch("gelu"), (), _one(lambda s, t: t * (1 + s.erf(t / s.sqrt(2))) / 2)),
        Activation(
            "gelu_tanh",
            _torch("gelu", approximate="tanh"),
            (),
            _one(lambda s, t: t * (1 + s.tanh(s.sqrt(2 / s.pi) * (t + s.Rational("0.044715") * t**3))) / 2),
        ),
        Activation("silu", _torch("silu"), (), _one(lambda s, t: t / (1 + s.exp(-t)))),
        Activation("mish", _torch("mish"), (), _one(lambda s, t: t * s.tanh(s.log(1 + s.exp(t))))),
        Activation("softplus", _torch("softplus", threshold=700), (), _one(lambda s, t: s.log(1 + s.exp(t)))),
        Activation("tanh", _torch("tanh"), (), _one(lambda s, t: s.tanh(t))),
        Activation("sigmoid", _torch("sigmoid"), (), _one(lambda s, t: 1 / (1 + s.exp(-t)))),
        Activation("relu2", lambda x: x.relu().square(), (0.0,), _two(lambda t: 0 * t, lambda t: t**2)),
        crrelu(0.01),
    )
}
NAMES = tuple(name.partition("(")[0] for name in _REGISTRY)


def named(text: str) -> Activation:
    """An activation by name: one of `NAMES`, or `crrelu(ε)`, `crrelu(ε,μ,σ)`.

    Raises:
        InputError: There is no activation of that name.
    """
    name, _, rest = text.strip().partition("(")
    if name == "crrelu":
        try:
            parameters = [float(part) for part in rest.removesuffix(")").split(",")] if rest else [0.01]
            return crrelu(*parameters)
        except InputError:
            raise
        except (TypeError, ValueError):
            raise InputError(f"activation {text!r} cannot be read; write crrelu(epsilon) or crrelu(ε,μ,σ).") from None
    if text.strip() not in _REGISTRY:
        raise InputError(f"no activation {text!r}; there are {', '.join(NAMES)}.")
    return _REGISTRY[text.strip()]
