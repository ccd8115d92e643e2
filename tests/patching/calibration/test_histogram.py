"""What a calibration keeps of the text: the histogram is the weighted sum that it stands for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crrelu_llm.patching.calibration.histogram import Histogram


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def histogram(*batches, held_back=False):
    """The histogram of batches `(x, factor or None)`, y their SiLU."""
    found = Histogram(batches[0][0].shape[-1])
    for x, factor in batches:
        found.add(x, torch.nn.functional.silu(x), factor, held_back)
    return found


def importance(x, factor):
    """How much each input counts, by the definition in the class's words, `(tokens, channels)`, float64."""
    y = torch.nn.functional.silu(x.double())
    u = torch.ones_like(y) if factor is None else factor.double()
    v = (y * u).square().sum(1, keepdim=True)
    return u.square() / (v + v.float().median())


@settings(max_examples=20)
@given(
    gated=st.booleans(),
    mean=st.floats(-3, 3),
    spread=st.sampled_from([1e-4, 0.1, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_weighted_sums_over_the_bins_are_those_over_the_tokens(gated, mean, spread, seed):
    x = mean + spread * normal(300, 3, seed=seed)
    factor = normal(300, 3, seed=seed + 1) if gated else None
    found = histogram((x, factor))
    weight = importance(x, factor)
    # The scale of the weights is free: the average channel's total is compared with nothing but its like.
    unit = found.weights.sum() / weight.sum()
    torch.testing.assert_close(found.weights.sum(1), unit * weight.sum(0), rtol=1e-4, atol=0)
    width = 16 / found.weights.shape[1]  # of a bin, in asinh(x/typical)
    for curve in (torch.abs, lambda t: t.clamp(min=0)):
        found_sum = found.weights @ curve(found.points)
        wanted = unit * (weight * curve(x.double())).sum(0)
        size = unit * (weight * (x.double().abs() + float(x.abs().median()))).sum(0)
        assert ((found_sum - wanted).abs() < width * size).all()


def test_every_input_lies_in_the_bin_next_to_it():
    x = torch.tensor([-1e9, -1490.0, -3.0, -1e-3, 0.0, 0.02, 1.0, 700.0, 1e9])[:, None]
    typical = float(x.abs().median())
    for value in x.flatten().tolist():
        found = Histogram(1)
        found.add(x, x, None, held_back=True)  # sets what is typical
        found.add(torch.tensor([[value]]), torch.ones(1, 1), None, held_back=False)
        (at,) = found.weights[0].nonzero().flatten().tolist()
        distances = (torch.asinh(found.points / typical) - math.asinh(value / typical)).abs()
        assert distances[at] < distances.min() + 1e-6  # 0 is as near to two


def test_points_rise_and_are_symmetric():
    points = histogram((normal(50, 2), None)).points
    assert (points.diff() > 0).all()
    torch.testing.assert_close(points, -points.flip(0))


def test_text_that_judges_is_counted_apart():
    one, other = normal(40, 3), normal(30, 3, seed=1)
    found = histogram((one, None))
    before = found.weights.clone()
    found.add(other, other, None, held_back=True)
    assert torch.equal(found.weights, before)
    assert found.held_back.sum() > 0
    assert found.tokens == 40


def test_leading_dimensions_do_not_matter_and_the_same_text_gives_the_same_bits():
    x, factor = normal(60, 5), normal(60, 5, seed=1)
    first, again = histogram((x, factor)), histogram((x.view(3, 4, 5, 5), factor.view(3, 4, 5, 5)))
    assert torch.equal(first.weights, again.weights)
    assert torch.equal(first.points, again.points)
    assert torch.equal(first.weights, histogram((x.clone(), factor.clone())).weights)


def test_a_token_of_massive_activations_counts_by_its_relative_error():
    x, factor = normal(200, 4), torch.ones(200, 4)
    with_one = factor.clone()
    with_one[0] = 1e4
    plain, massive = histogram((x, factor)), histogram((x, with_one))
    assert massive.weights.sum() < 1.2 * plain.weights.sum()  # by its square it would be all there is


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "factor"])
def test_what_is_not_finite_is_noticed_and_not_counted(value, where):
    x, factor = normal(10, 3), normal(10, 3, seed=1)
    good = histogram((x, factor))
    {"x": x, "factor": factor}[where][4, 1] = value
    bad = histogram((normal(10, 3), normal(10, 3, seed=1)), (x, factor))
    assert good.finite and not bad.finite
    assert torch.equal(bad.weights, good.weights)


def test_no_tokens_are_no_error():
    found = histogram((torch.zeros(0, 3), None))
    assert found.finite and found.tokens == 0
    assert not found.weights.any()


@pytest.mark.parametrize("dead", [0.4, 0.6])
def test_channels_without_any_input_do_not_decide_what_is_typical(dead):
    x = normal(100, 10)
    x[:, : int(10 * dead)] = 0
    found = histogram((x, None))
    assert found.points.max() > 100
    assert 0.1 < found.weights[-1] @ found.points.abs() / found.weights[-1].sum() < 2
