"""Entropies: closed forms, quadrature and samples against each other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crrelu_llm.eafo import activations, entropy, parsing
from crrelu_llm.eafo import density as densities
from crrelu_llm.errors import InputError

STANDARD = densities.normal()


@pytest.mark.parametrize("text", ["normal(1,3)", "logistic(0,2)", "laplace(1,0.5)", "student_t(5)"])
def test_quadrature_gives_the_closed_form(text):
    density = parsing.density(text)
    alone = densities.mixture([density], [1.0])  # which has no closed form
    assert entropy.of_density(alone) == pytest.approx(entropy.of_density(density), abs=1e-7)


def test_a_normal_s_entropy_is_half_log_two_pi_e_variance():
    assert entropy.of_density(densities.normal(5, 3)) == pytest.approx(0.5 * np.log(2 * np.pi * np.e * 9))


@given(st.floats(-3, 3), st.floats(0.1, 5), st.floats(0.05, 20))
@settings(max_examples=15, deadline=None)
def test_scale_moves_the_entropy_but_not_the_negentropy(mean, std, factor):
    density = densities.normal(mean, std)
    scaled = entropy.of_output(activations.custom(lambda x: factor * x), density)
    assert scaled.value == pytest.approx(entropy.of_density(density) + np.log(factor), abs=1e-6)
    assert scaled.negentropy == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    "name",
    ["leaky_relu", "elu", "softplus", "tanh", "sigmoid", "gelu", "silu", "mish", "crrelu(0.5)", "crrelu(-0.5)"],
)
def test_the_entropy_of_the_output_is_that_of_samples(name):
    activation = activations.named(name)
    found = entropy.of_output(activation, STANDARD)
    samples = activation.value(np.random.default_rng(3).normal(size=100_000))
    estimate = entropy.from_samples(samples)
    assert found.atoms == estimate.atoms == ()
    allowed = 4 * estimate.standard_error + 2 * abs(estimate.bias) + 0.002
    assert found.value == pytest.approx(estimate.value, abs=allowed)
    assert found.std == pytest.approx(estimate.std, rel=0.01)
    assert found.at_resolution == pytest.approx(estimate.at_resolution, abs=0.02)
    assert found.negentropy >= 0


def test_the_output_density_of_three_branches_is_the_histogram_s():
    activation = activations.crrelu(-0.8)
    branches, flat = entropy.branches_of(activation, STANDARD)
    assert [branch[2] for branch in branches] == [1, -1, 1]
    assert branches[0][1] == pytest.approx(-1) and branches[1][1] == 0 and flat == []
    samples = activation.value(np.random.default_rng(0).normal(size=400_000))
    counts, edges = np.histogram(samples, bins=4000)
    share = counts[counts > 0] / samples.size
    coarse = -(share * np.log(share / np.diff(edges)[0])).sum()
    assert entropy.of_output(activation, STANDARD).value == pytest.approx(coarse, abs=0.05)


def test_a_flat_stretch_is_an_atom_and_the_entropy_minus_infinity():
    found = entropy.of_output(activations.named("relu"), densities.normal(0.5, 1))
    assert found.value == -np.inf
    assert found.atoms == ((0.0, pytest.approx(0.3085375, abs=1e-6)),)
    samples = np.maximum(np.random.default_rng(0).normal(0.5, 1, 50_000), 0)
    estimate = entropy.from_samples(samples)
    assert estimate.value == -np.inf and estimate.atoms[0] == (0.0, pytest.approx(0.3085, abs=0.01))
    assert np.isfinite(found.at_resolution)
    assert found.at_resolution == pytest.approx(estimate.at_resolution, abs=0.02)


def test_the_estimate_covers_the_truth_and_its_error_shrinks():
    rng = np.random.default_rng(0)
    hits, errors = 0, []
    for n in (1000, 16_000):
        found = [entropy.from_samples(rng.normal(size=n)) for _ in range(20)]
        hits += sum(abs(one.value - one.bias - entropy.OF_A_NORMAL) < 3 * one.standard_error for one in found)
        errors.append(np.mean([one.standard_error for one in found]))
    assert hits >= 34
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.4)


@pytest.mark.parametrize(
    ("samples", "message"),
    [(np.arange(99), "99 samples are too few"), (np.ones(200), "constant has no density"), ([np.inf] * 200, "NaN or")],
)
def test_samples_that_have_no_entropy_are_one_line(samples, message):
    with pytest.raises(InputError, match=message):
        entropy.from_samples(samples)


def test_a_constant_output_is_one_line():
    with pytest.raises(InputError, match=r"relu of normal\(-30,1\) is constant"):
        entropy.of_output(activations.named("relu"), densities.normal(-30, 1))
