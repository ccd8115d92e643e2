"""Fit and rank on samples of a known density, where the right answers are known."""

import math

import numpy as np
import pytest

from crrelu_llm.eafo import activations, density, entropy, estimates
from crrelu_llm.eafo.models import fit, rank
from crrelu_llm.eafo.models.densities import smooth
from crrelu_llm.eafo.models.preactivations import Preactivations
from crrelu_llm.errors import InputError

MEAN, STD = -0.6, 1.5


def site(x, path="here", original="gelu"):
    x = np.asarray(x, dtype=np.float64)
    z = (x - x.mean()) / x.std()
    moments = [float(value) for value in (x.mean(), x.std(), (z**3).mean(), (z**4).mean() - 3)]
    return Preactivations(path, original, x.size, *moments, np.array([x.mean()]), np.array([x.std()]), x)


@pytest.fixture(scope="module")
def normal():
    return site(np.random.default_rng(0).normal(MEAN, STD, 20_000))


def test_the_table_is_the_kernel_estimate(normal):
    table, exact = smooth(normal), estimates.from_samples(normal.samples)
    x = np.linspace(-9, 8, 997)
    assert np.allclose(table.pdf(x), exact.pdf(x), atol=1e-6)
    assert np.allclose(table.derivative(x), exact.derivative(x), atol=1e-5)
    assert table.pdf(np.array([-1e3, 1e3])).tolist() == [0, 0]


def test_a_normal_site_is_told_by_two_moments(normal):
    (found,) = fit.fit([normal])
    assert found["entropy"] == pytest.approx(entropy.OF_A_NORMAL + math.log(STD), abs=0.02)
    assert found["negentropy"] == pytest.approx(0, abs=0.003)
    assert (found["center"], found["width"]) == pytest.approx((MEAN, STD), abs=0.03)
    assert min(found["agreement"]["fitted"].values()) > 0.985
    assert fit.of_a_normal(20_000) == pytest.approx(found["agreement"]["fitted"]["whole"], abs=0.01)
    assert fit.of_a_normal(300) < fit.of_a_normal(20_000) < 1
    # Of N(0, 1) against N(μ, σ²): ∫ p·p′·q′ over the norms, by sums of the exact functions.
    x = np.linspace(-9, 8, 20_001)
    p, q = density.normal(MEAN, STD), density.normal()
    weight, one, two = p.pdf(x), p.derivative(x), q.derivative(x)
    expected = (weight * one * two).sum() / math.sqrt((weight * one**2).sum() * (weight * two**2).sum())
    assert found["agreement"]["standard"]["whole"] == pytest.approx(expected, abs=0.04)


def test_two_bumps_are_not_told_by_two_moments():
    random = np.random.default_rng(0)
    (found,) = fit.fit([site(np.concatenate([random.normal(-3, 0.5, 5000), random.normal(3, 0.5, 5000)]))])
    assert found["agreement"]["fitted"]["whole"] < 0.6
    assert found["negentropy"] > 0.5


def test_a_site_that_is_never_positive_has_no_agreement_there():
    (found,) = fit.fit([site(np.random.default_rng(0).normal(-30, 1, 1000))])
    assert found["agreement"]["fitted"]["positive"] is None
    assert found["positive"] == 0


def test_entropies_are_those_by_quadrature(normal):
    names = ("gelu", "silu", "softplus", "prelu", "crrelu", "relu")
    found = {entry["activation"]: entry for entry in rank.rank([normal], names)["means"]}
    for name in names:
        exact = entropy.of_output(activations.named(name), density.normal(MEAN, STD))
        assert found[name]["at_resolution"] == pytest.approx(exact.at_resolution, abs=0.06), name
        if name == "relu":
            assert found[name]["entropy"] == exact.value == -math.inf
            assert found[name]["atoms"] == pytest.approx(exact.atoms[0][1], abs=0.02)
        else:
            spread = 5 * found[name]["standard_error"] + 2 * abs(found[name]["bias"])
            assert found[name]["entropy"] == pytest.approx(exact.value, abs=spread + 0.02), name
    # CRReLU's 0.01 is far below the resolution.
    assert {entry["activation"] for entry in found.values() if entry["rank"] <= 2} == {"relu", "crrelu"}
    assert found["gelu"]["distance"] == 0
    assert found["relu"]["distance"] > 0


def test_relus_correction_for_a_normal_is_fitted_crrelus_bump(normal):
    exact = density.normal(normal.mean, normal.std)
    output = rank.corrected(activations.named("relu"), exact, normal, epsilon=0.1)
    # The direction that lowers the entropy, p′, is the bump with a negative sign; the true height is reached nearly.
    expected = activations.crrelu(-0.1, normal.mean, normal.std).value(normal.samples)
    assert np.allclose(output, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["silu", "gelu", "elu", "softplus"])
def test_the_correction_lowers_the_entropy(normal, name):
    plain, corrected = rank.rank([normal], (name, f"{name}+eafo"), epsilon=0.05)["means"]
    assert corrected["entropy"] < plain["entropy"]


def test_means_are_over_sites(normal):
    other = site(np.random.default_rng(1).normal(1, 0.5, 2000), "there")
    found = rank.rank([normal, other], ("gelu", "silu"))
    cells = [entry["activations"][1] for entry in found["sites"]]
    mean = found["means"][1]
    assert mean["entropy"] == pytest.approx((cells[0]["entropy"] + cells[1]["entropy"]) / 2)
    assert mean["standard_error"] == pytest.approx(
        math.hypot(cells[0]["standard_error"], cells[1]["standard_error"]) / 2
    )


def test_names_of_the_library_and_unknown_ones(normal):
    assert rank.rank([normal], ("quick_gelu",))["means"][0]["distance"] < 0.01
    for name in ("nope", "tanh+eafo"):
        with pytest.raises(InputError, match=f"no activation '{name.replace('+', '.')}'"):
            rank.rank([normal], (name,))
    with pytest.raises(InputError, match=r"relu at low: entropy: all 1000 samples are 0"):
        rank.rank([site(np.random.default_rng(0).normal(-30, 1, 1000), "low")], ("relu",))
