"""The level `refit`: shapes that were planted are found again, and folding and regression are exact algebra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from crrelu_llm import CRReLU
from crrelu_llm.patching.calibration.anatomy import Weights
from crrelu_llm.patching.calibration.refit import constant_direction, fold, relative_error, ridge
from crrelu_llm.patching.calibration.shape import LARGEST_EPSILON, Histogram, Shape, fit_shape


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Planted(nn.Module):
    """gain·f(scale·(x + shift)) + constant, f a CRReLU."""

    def __init__(self, epsilon, scale, shift, gain, constant=0.0):
        super().__init__()
        self.epsilon, self.scale, self.shift, self.gain, self.constant = epsilon, scale, shift, gain, constant

    def forward(self, x):
        t = self.scale * (x + self.shift)
        return self.gain * (t.relu() + self.epsilon * t * torch.exp(-t * t / 2)) + self.constant


def shaped(shape, activation):
    """What an activation computes with a shape's factors around it, `(tokens, channels)` in and out."""

    def compute(x):
        return shape.gain * activation(shape.scale * (x + shape.shift)) + shape.constant

    return compute


def fitted(original, x, target=None, epsilon_per="channel", shift=True, constant=False, factor=None):
    """The relative error that a fitted shape leaves, and the shape."""
    channels = x.shape[1]
    target = target or CRReLU(channels if epsilon_per == "channel" else None)
    blur = torch.zeros(channels) if shift else None
    shape = fit_shape(original, target, Histogram(x, factor), epsilon_per, torch.ones(channels), blur, constant)
    if shape.epsilon is not None:
        with torch.no_grad():
            target.epsilon.copy_(shape.epsilon)
    u = 1 if factor is None else factor
    with torch.no_grad():
        wanted = original(x) * u
        return ((shaped(shape, target)(x.float()) * u - wanted).norm() / wanted.norm()).item(), shape


@settings(max_examples=15)
@given(
    epsilon=st.floats(-3, 3),
    power=st.integers(-4, 2),
    sign=st.sampled_from([1, -1]),
    shift=st.integers(-8, 8),
    gain=st.floats(0.1, 3),
    constant=st.floats(-1, 1),
    epsilon_per=st.sampled_from(["layer", "channel"]),
)
def test_a_planted_shape_is_found_again(epsilon, power, sign, shift, gain, constant, epsilon_per):
    original = Planted(epsilon, sign * 2.0 ** (power / 2), shift / 4, gain, constant)
    error, _ = fitted(original, normal(4096, 3), epsilon_per=epsilon_per, constant=True)
    # One ε for all channels is sought on a grid, with every fourth shift.
    assert error < (0.03 if epsilon_per == "channel" else 0.15)


@settings(max_examples=15)
@given(
    name=st.sampled_from(["silu", "gelu"]), mean=st.floats(-1, 1), spread=st.floats(0.2, 3), seed=st.integers(0, 99)
)
def test_every_freedom_makes_it_better(name, mean, spread, seed):
    original = {"silu": nn.SiLU(), "gelu": nn.GELU()}[name]
    x = mean + spread * normal(4096, 4, seed=seed)
    factor = normal(4096, 4, seed=seed + 1)
    wanted = original(x) * factor
    plain = ((CRReLU()(x) * factor - wanted).norm() / wanted.norm()).item()
    options = [{"shift": False}, {}, {"constant": True}]
    errors = [plain] + [fitted(original, x, factor=None if "constant" in o else factor, **o)[0] for o in options]
    assert errors[1] < errors[0]
    assert errors[2] <= errors[1] + 0.01
    assert errors[3] < 0.1  # a plain MLP with biases: little is left


def test_a_target_without_epsilon_is_fitted_by_the_same_freedoms():
    error, shape = fitted(nn.SiLU(), 2 * normal(4096, 3), target=nn.GELU())
    assert shape.epsilon is None
    assert error < 0.05  # GELU is SiLU at another scale, nearly
    alone, _ = fitted(nn.SiLU(), 2 * normal(4096, 3), target=nn.ReLU(), shift=False)
    assert 0.05 < alone < 0.2


def test_the_own_activation_is_left_alone():
    error, shape = fitted(nn.SiLU(), normal(4096, 3), target=nn.SiLU())
    assert error < 1e-3
    torch.testing.assert_close(shape.scale * shape.gain, torch.ones(3), atol=1e-2, rtol=0)


def test_channels_without_evidence_follow_the_layer():
    x = normal(4096, 6)
    factor = torch.ones(4096, 6)
    factor[:, 0] = 0  # never seen by the MLP
    _, shape = fitted(nn.SiLU(), x, factor=factor)
    assert torch.isfinite(shape.gain).all() and torch.isfinite(shape.epsilon).all()
    near = shape.gain[1:].mean() * shape.scale[1:].mean()
    assert shape.gain[0] * shape.scale[0] == pytest.approx(near.item(), rel=0.5)
    assert shape.epsilon.abs().max() <= LARGEST_EPSILON


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e6])
def test_degenerate_inputs_give_finite_shapes(value):
    for per in ("layer", "channel"):
        _, shape = fitted(nn.SiLU(), torch.full((64, 3), value), epsilon_per=per)
        for part in vars(shape).values():
            assert torch.isfinite(part).all()


def mlp(gated, biased, hidden=7, width=11):
    """An MLP in float64."""
    bias = {
        name: normal(size, seed=i) if biased else None
        for i, (name, size) in enumerate({"gate_bias": width, "up_bias": width, "down_bias": hidden}.items())
    }
    if not gated:
        bias["up_bias"] = None
    up = normal(width, hidden, seed=4) if gated else None
    return Weights(normal(width, hidden, seed=3), up, normal(hidden, width, seed=5), **bias)


@settings(max_examples=20)
@given(gated=st.booleans(), biased=st.booleans(), seed=st.integers(0, 999))
def test_folding_is_exact(gated, biased, seed):
    before = mlp(gated, biased)
    x = normal(13, 7, seed=seed)
    x[:, -1] = 1  # what all inputs have in common
    one = torch.eye(7, dtype=torch.float64)[-1]
    signs = normal(11, seed=seed + 1).sign()
    scale, gain = signs * normal(11, seed=seed + 2).exp(), normal(11, seed=seed + 3)
    constant = normal(11, seed=seed + 4) if biased and not gated else torch.zeros(11)
    shape = Shape(None, *(part.double() for part in (scale, normal(11, seed=seed + 5), gain, constant)))
    activation = nn.Tanh()
    after = fold(before, shape, None if biased else one)
    torch.testing.assert_close(after.output(x, activation), before.output(x, shaped(shape, activation)))


def test_inputs_that_are_alike_in_one_direction_have_a_constant_direction():
    x = (normal(500, 9) + torch.tensor([0.0] * 8 + [30.0])).float()
    one = constant_direction(x)
    assert (x @ one - 1).square().mean().sqrt() < 0.05
    torch.testing.assert_close(constant_direction(x * 2), one / 2, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_ridge_is_least_squares_with_added_rows(gated, biased):
    before, activation = mlp(gated, biased), nn.Tanh()
    x = normal(200, 7, seed=8)
    target = before.output(x, nn.SiLU())
    features = before.features(x, activation)
    unit = (features**2).sum(0).mean()
    for penalty, found in zip((1e-3, 1e-2, 1e-1, 1.0, 10.0), ridge(before, activation, x, target), strict=True):
        rows = (penalty * unit).sqrt() * torch.eye(11, dtype=torch.float64)
        columns = torch.cat([features, rows])
        if biased:
            one = torch.cat([torch.ones(200, 1), torch.zeros(11, 1)]).double()
            columns = torch.cat([columns, one], 1)
        wanted = torch.cat([target - before.output(x, activation), torch.zeros(11, 7).double()])
        change = torch.linalg.lstsq(columns, wanted).solution
        torch.testing.assert_close(found.down, before.down + change[:11].T, rtol=1e-4, atol=1e-5)
        if biased:
            torch.testing.assert_close(found.down_bias, before.down_bias + change[11], rtol=1e-4, atol=1e-5)


def test_ridge_on_a_handful_of_tokens_changes_little():
    before, x = mlp(True, False, width=64), normal(3, 7)
    target = before.output(x, nn.SiLU())
    for found in ridge(before, nn.ReLU(), x, target):
        assert (found.down - before.down).norm() < before.down.norm()
        assert torch.isfinite(found.down).all()
    assert ridge(before, nn.ReLU(), torch.zeros(3, 7).double(), torch.zeros(3, 7).double()) == []


def test_relative_error():
    weights, x = mlp(True, False), normal(10, 7)
    exact = weights.output(x, nn.SiLU())
    assert relative_error(weights, nn.SiLU(), x, exact) == 0
    wrong = weights.output(x, nn.ReLU())
    expected = ((wrong - exact).norm() / exact.norm()).item()
    assert relative_error(weights, nn.ReLU(), x, exact) == pytest.approx(expected)
