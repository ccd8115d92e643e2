"""CRReLU for inputs of another density than N(0, 1): the method's correction for N(μ, σ²)."""

from collections.abc import Callable

import torch
from torch import Tensor

from crrelu_llm import kernels
from crrelu_llm.activation import AFFINE, CRReLU, surrounded
from crrelu_llm.kernels.recompute import note

# The buffers of a fitted CRReLU, in addition to those of any calibrated activation.
MOMENTS = ("center", "width")


class FittedCRReLU(CRReLU):
    """`relu(x) + ε·(x − μ)·exp(−(x − μ)²/2σ²)`: CRReLU with a centre and a width, in several passes.

    The buffers `center` and `width`, float32, `(1,)`, are μ and σ, the measured mean and standard deviation of the
    inputs. They start at 0 and 1, get no gradient, and a cast leaves them float32. If the module is calibrated too, x
    stands for scale·(x + shift), and the result is multiplied by the gain and shifted by the offset.

    Args:
        num_channels: as for `CRReLU`, like the other arguments.
    """

    center: Tensor
    width: Tensor
    _float32 = (*MOMENTS, *AFFINE)

    def __init__(
        self,
        num_channels: int | None = None,
        epsilon_init: float = 0.01,
        device: torch.device | str | None = None,
        calibrated: int | None = None,
    ) -> None:
        super().__init__(num_channels, epsilon_init, device, calibrated)
        self._add_buffers(MOMENTS, 1, device)
        self.reset_parameters(MOMENTS)

    @property
    def start_values(self) -> dict[str, float]:
        """The start values of the parameter and buffers, by name."""
        moments = {"center": 0.0, "width": 1.0} if "center" in self._buffers else {}  # absent during construction
        return super().start_values | moments

    def _compute(self, *inputs: Tensor) -> Tensor:
        function: Callable[..., Tensor] = _fitted if len(inputs) == 1 else _fitted_gated
        # Copied, because the buffers may change between the forward and the backward pass.
        arguments = (*inputs, self.epsilon, self.center.clone(), self.width.clone(), *self._four())
        y = function(*arguments)
        note(y, function, *arguments)
        return y


def _fitted(x: Tensor, epsilon: Tensor, center: Tensor, width: Tensor, *four: Tensor) -> Tensor:
    return _wide(x, epsilon, center, width, four).to(x.dtype)


def _fitted_gated(gate: Tensor, up: Tensor, epsilon: Tensor, center: Tensor, width: Tensor, *four: Tensor) -> Tensor:
    value = _wide(gate, epsilon, center, width, four)
    return (value * up.to(value.dtype)).to(gate.dtype)


def _wide(x: Tensor, epsilon: Tensor, center: Tensor, width: Tensor, four: tuple[Tensor, ...]) -> Tensor:
    def corrected(t: Tensor) -> Tensor:
        sigma = width.to(t.dtype)
        v = (t - center.to(t.dtype)) / sigma
        # The bump is odd, and below 0 CRReLU is only the bump, so there is no cancellation of large numbers.
        bump = kernels.crrelu(torch.where(v > 0, -v, v), epsilon.to(t.dtype) * sigma)
        return torch.relu(t) + torch.where(v > 0, -bump, bump)

    return surrounded(corrected, x, four)
