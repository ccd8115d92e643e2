"""The fit: a function that was planted is found again, others come near, and nothing that can be fed breaks it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from crrelu_llm.activation import Calibrated
from crrelu_llm.patching.activations import build_activation
from crrelu_llm.patching.calibration.histogram import Histogram
from crrelu_llm.patching.calibration.parameters import LARGEST_EPSILON, fit, relative_error

FOUR = ("scale", "shift", "gain", "offset")


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


class Planted(nn.Module):
    """gain·f(scale·(x + shift)) + offset, f a CRReLU."""

    def __init__(self, epsilon, scale, shift, gain, offset):
        super().__init__()
        self.epsilon, self.scale, self.shift, self.gain, self.offset = epsilon, scale, shift, gain, offset

    def forward(self, x):
        t = self.scale * (x + self.shift)
        return self.gain * (t.relu() + self.epsilon * t * torch.exp(-t * t / 2)) + self.offset


def seen(original, x, factor=None):
    """The histogram of a text: one token in eight judges."""
    histogram = Histogram(x.shape[1])
    judging = torch.arange(len(x)) % 8 == 7
    with torch.no_grad():
        for some, held_back in ((~judging, False), (judging, True)):
            if some.any():
                u = None if factor is None else factor[some]
                histogram.add(x[some], original(x[some]), u, held_back)
    return histogram


def fitted(original, name, x, epsilon_per="channel", factor=None):
    """The error before, the error after, and the calibrated activation."""
    module = build_activation(name, x.shape[1], epsilon_per, calibrated=True).requires_grad_(False)
    histogram = seen(original, x, factor)
    naive = relative_error(original, module, histogram)
    target = module.activation if isinstance(module, Calibrated) else module
    fit(original, target, histogram, epsilon_per).write(module)
    return naive, relative_error(original, module, histogram), module


def numbers(module):
    return {name: value for name, value in module.state_dict().items() if not name.startswith("activation.")}


@settings(max_examples=8)
@given(
    epsilon=st.floats(-3, 3),
    power=st.integers(-4, 1),
    shift=st.floats(-1.5, 1.5),
    gain=st.sampled_from([-2.0, -0.3, 0.1, 1.0, 5.0]),
    offset=st.floats(0.1, 1),
)
def test_a_planted_crrelu_is_found_again(epsilon, power, shift, gain, offset):
    original = Planted(epsilon, 2.0 ** (power / 2), shift, gain, offset)
    _, error, _ = fitted(original, "crrelu", normal(2048, 2))
    assert error < 0.12  # hardly ever more than 0.001; the search has local minima


@pytest.mark.parametrize(("epsilon", "scale", "shift"), [(0.01, 1.0, 0.0), (-0.8, 1.0, 0.3), (2.5, 0.5, -0.5)])
def test_one_epsilon_for_a_layer_is_found_again(epsilon, scale, shift):
    _, error, module = fitted(Planted(epsilon, scale, shift, 1.0, 0.0), "crrelu", normal(2048, 2), "layer")
    assert module.epsilon.shape == (1,)
    assert error < 0.05


@pytest.mark.parametrize("name", ["gelu", "silu", "relu", "tanh", "prelu"])
def test_the_own_activation_is_the_identity(name):
    original = build_activation(name).requires_grad_(False)
    naive, error, module = fitted(original, name, normal(2048, 3))
    assert naive < 1e-6  # rounding: one is computed in float32, the other in float64
    assert error < 1e-4
    x = torch.linspace(-4, 4, 99)[:, None].expand(-1, 3)
    torch.testing.assert_close(module(x), original(x), atol=2e-3, rtol=0)


ORIGINALS = {"silu": nn.SiLU(), "gelu": nn.GELU()}


@pytest.mark.parametrize(
    ("original", "name", "bound"),
    [
        ("silu", "crrelu", 0.045), ("silu", "relu", 0.16), ("silu", "prelu", 0.22), ("silu", "gelu", 0.015),
        ("gelu", "crrelu", 0.06), ("gelu", "relu", 0.12), ("gelu", "prelu", 0.33), ("gelu", "silu", 0.015),
    ],
)  # fmt: skip
def test_what_each_target_leaves_of_a_smooth_activation(original, name, bound):
    for per in ("layer", "channel") if name == "crrelu" else ("layer",):
        naive, error, module = fitted(ORIGINALS[original], name, normal(2048, 4), per)
        assert error < min(bound, naive)
        if name == "crrelu":
            assert module.epsilon.shape == ((4,) if per == "channel" else (1,))


@settings(max_examples=8)
@given(
    original=st.sampled_from(["silu", "gelu"]), mean=st.floats(-1, 1), spread=st.floats(0.2, 3), gated=st.booleans(),
    name=st.sampled_from(["crrelu", "relu", "prelu", "gelu"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_fit_is_never_worse_than_a_plain_swap(original, mean, spread, gated, name, seed):
    x = mean + spread * normal(1024, 4, seed=seed)
    factor = normal(1024, 4, seed=seed + 1) if gated else None
    naive, error, module = fitted(ORIGINALS[original], name, x, factor=factor)
    assert error < 1.001 * naive + 1e-6  # what rounding leaves
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    if name == "crrelu":
        assert module.epsilon.abs().max() <= LARGEST_EPSILON * 1.001


def test_an_epsilon_is_bounded():
    """A bump alone asks for an ε without bound."""
    original = Planted(500.0, 1.0, 0.0, 0.01, 0.0)
    for per in ("channel", "layer"):
        _, _, module = fitted(original, "crrelu", normal(1024, 2), per)
        assert module.epsilon.abs().max() <= LARGEST_EPSILON * 1.001
        assert torch.isfinite(module(normal(8, 2))).all()


def test_channels_fit_no_worse_than_the_layer():
    x = normal(2048, 4) * torch.tensor([0.2, 0.5, 1.0, 3.0])
    layer, channel = (fitted(nn.SiLU(), "crrelu", x, per)[1] for per in ("layer", "channel"))
    assert channel < layer * 1.05


@pytest.mark.parametrize("name", ["crrelu", "relu", "gelu"])
def test_a_channel_that_saw_nothing_is_drawn_to_the_layers_fit(name):
    x, factor = normal(2048, 5), torch.ones(2048, 5)
    factor[:, 0] = 0  # the MLP multiplies it by nothing
    _, error, module = fitted(nn.SiLU(), name, x, factor=factor)
    assert error < 0.2
    values = torch.linspace(-2, 2, 41)[:, None].expand(-1, 5)
    found, wanted = module(values)[:, 0], nn.functional.silu(values)[:, 0]
    assert (found - wanted).norm() < 0.25 * wanted.norm()  # as good there as the other channels, about


@pytest.mark.parametrize("value", [0.0, 1e-30, -3.0, 1e6])
@pytest.mark.parametrize("name", ["crrelu", "relu"])
def test_a_constant_input_gives_finite_numbers_and_its_value(value, name):
    for per in ("layer", "channel") if name == "crrelu" else ("layer",):
        x = torch.full((64, 3), value)
        _, error, module = fitted(nn.SiLU(), name, x, per)
        assert all(torch.isfinite(part).all() for part in module.state_dict().values())
        assert math.isfinite(error)
        torch.testing.assert_close(module(x), nn.functional.silu(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_a_handful_of_tokens_does_not_run_away(tokens):
    for name in ("crrelu", "gelu"):
        _, _, module = fitted(nn.SiLU(), name, normal(tokens, 4))
        values = torch.linspace(-3, 3, 61)[:, None].expand(-1, 4)
        error = (module(values) - nn.functional.silu(values)).norm() / nn.functional.silu(values).norm()
        assert error < 1


def test_beyond_the_text_it_does_not_run_away():
    """Inputs up to twice as large as any that was seen; a ReLU would be nearly exact there."""
    x = normal(4096, 4)
    values = torch.tensor([-8.0, -5.0, 5.0, 8.0])[:, None].expand(-1, 4)
    for per in ("channel", "layer"):
        _, _, module = fitted(nn.SiLU(), "crrelu", x, per)
        error = (module(values) - nn.functional.silu(values)).norm() / nn.functional.silu(values).norm()
        assert error < 0.8


@pytest.mark.parametrize("name", ["crrelu", "relu"])
def test_the_same_histogram_gives_the_same_bits_whatever_the_threads(name):
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found.append(fitted(nn.GELU(), name, normal(512, 6))[2])
        finally:
            torch.set_num_threads(before)
    one, other = map(numbers, found)
    assert one.keys() == other.keys() >= set(FOUR)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_error_is_the_weighted_one_on_held_back_text():
    x, factor = normal(4000, 3), normal(4000, 3, seed=1)
    module = build_activation("relu", 3, calibrated=True)
    found = relative_error(nn.SiLU(), module, seen(nn.SiLU(), x, factor))
    held = torch.arange(4000) % 8 == 7
    x, factor = x[held].double(), factor[held].double()
    y = nn.functional.silu(x) * factor
    v = y.square().sum(1, keepdim=True)
    weight = 1 / (v + v.median())
    wrong = x.relu() * factor
    wanted = ((weight * (wrong - y).square()).sum() / (weight * y.square()).sum()).sqrt()
    assert found == pytest.approx(wanted.item(), rel=0.02)
    once = Histogram(3)  # nothing held back: the text itself judges
    once.add(x.float(), nn.functional.silu(x.float()), factor.float(), held_back=False)
    assert relative_error(nn.SiLU(), module, once) == pytest.approx(wanted.item(), rel=0.02)
