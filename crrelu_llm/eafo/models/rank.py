"""The output entropy of many activations at each site, all on the same pre-activations, as right after a swap."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from crrelu_llm.eafo import activations, entropy
from crrelu_llm.eafo.correction import correct
from crrelu_llm.eafo.density import Array, Density
from crrelu_llm.eafo.models.densities import smooth
from crrelu_llm.eafo.models.preactivations import Preactivations
from crrelu_llm.errors import InputError

DOCUMENT = "eafo_rank.json"
SUFFIX = "+eafo"
CORRECTED = tuple(f"{name}{SUFFIX}" for name in ("relu", "leaky_relu", "elu", "silu", "gelu", "softplus"))
ACTIVATIONS = (
    *("relu", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "relu2", "crrelu"),
    *CORRECTED,
)
MEASURES = ("entropy", "standardised", "negentropy", "at_resolution")
_PARTS = 10

Function = Callable[[Array], Array]


def rank(sites: list[Preactivations], names: Sequence[str] = ACTIVATIONS, epsilon: float = 0.01) -> dict[str, Any]:
    """Measures and ranks activations on the pre-activations of a model.

    Args:
        sites: From `preactivations.measure`.
        names: Activations of `eafo.activations` or of transformers' ACT2FN, or one of `CORRECTED`: the activation plus
            its own correction for the site's smooth density, where ε > 0 lowers the entropy to first order.
        epsilon: Size of the correction: ε of the CRReLU with a bump of the same height, ε·σ·e^(−1/2).

    Returns:
        `sites`: `path`, `original` and `activations`, each with `activation`; `entropy` (nats; −∞ with atoms) with its
        `standard_error` and `bias`; `standardised` (at unit variance) and `negentropy`, which do not depend on scale;
        `at_resolution` with `at_resolution_error`, finite even with atoms, which determines the rank; `atoms`: the
        share of repeated values; `std`; `distance`: mean squared difference from the original activation's output,
        relative to the variance of that output, None if the original is not a named activation. `means`: the same over
        the sites, and `rank`, 1 for the least `at_resolution`. The errors cover the drawing of the samples, not the
        choice of the text.

    Raises:
        InputError: An activation is unknown, or has a constant output at a site.
    """
    functions, bases = check_names(names)
    found = []
    for site in sites:
        original = _original(site)
        density = smooth(site, for_derivative=True) if bases else None
        entries = []
        for name in names:
            if density is not None and name in bases:
                output = corrected(bases[name], density, site, epsilon)
            else:
                output = functions[name](site.samples)
            entries.append({"activation": name} | _measured(output, name, site) | _distance(output, original))
        found.append({"path": site.path, "original": site.original, "activations": entries})
    return {"sites": found, "means": _means(found, names)}


def check_names(names: Sequence[str]) -> tuple[dict[str, Function], dict[str, activations.Activation]]:
    """The plain activations as functions, and the base activations of the corrected ones, by name.

    Raises:
        InputError: A name is unknown.
    """
    plain = {name: _function(name) for name in names if not name.endswith(SUFFIX)}
    return plain, {name: _base(name) for name in names if name.endswith(SUFFIX)}


def corrected(base: activations.Activation, density: Density, site: Preactivations, epsilon: float) -> Array:
    """f + ε·c at a site's samples, with c scaled to the height of CRReLU's bump for the site's width.

    Where f is flat, c is extended by p′, as CRReLU extends ReLU's correction; where f takes a value twice (GELU, SiLU
    at x < 0) the theory does not apply and c is 0.
    """
    x = site.samples
    correction = correct(base, density)
    folded = [stretch for stretch in correction.excluded if stretch.reason.startswith("not monotone")]
    direction = correction.forward(x)
    direction = np.where(np.isnan(direction), density.derivative(x), direction)
    for stretch in folded:
        direction = np.where((x > stretch.low) & (x < stretch.high), 0.0, direction)
    height = float(np.abs(direction).max())
    if not height > 0:
        raise InputError(f"{base.name}{SUFFIX} at {site.path}: the correction is 0 at every sample; leave it out")
    return base.value(x) + epsilon * site.std * math.exp(-0.5) / height * direction


def _base(name: str) -> activations.Activation:
    if name not in CORRECTED:
        raise InputError(f"no activation {name!r}; corrected ones are {', '.join(CORRECTED)}")
    return activations.named(name.removesuffix(SUFFIX))


def _function(name: str) -> Function:
    """A named activation as a float64 function."""
    try:
        return activations.named(name).value
    except InputError:
        function = library_function(name)
        if function is None:
            raise InputError(
                f"no activation {name!r}; there are {', '.join(ACTIVATIONS)}, and the names of transformers' ACT2FN"
            ) from None
        return function


def library_function(name: str) -> Function | None:
    """An activation of transformers' ACT2FN as a float64 function; None for other names, and for CRReLU."""
    import torch
    from transformers.activations import ACT2FN

    if name not in ACT2FN or name == "crrelu":
        return None
    module = ACT2FN[name].double()

    def function(x: Array) -> Array:
        with torch.no_grad():
            return module(torch.as_tensor(x)).numpy()

    return function


def _original(site: Preactivations) -> Array | None:
    function = library_function(site.original)
    return None if function is None else function(site.samples)


def _distance(output: Array, original: Array | None) -> dict[str, float | None]:
    if original is None:
        return {"distance": None}
    return {"distance": float(np.mean((output - original) ** 2) / original.var())}


def _measured(output: Array, name: str, site: Preactivations) -> dict[str, Any]:
    try:
        estimate = entropy.from_samples(output)
    except InputError as error:
        raise InputError(f"{name} at {site.path}: {error}") from error
    mixed = np.random.default_rng(0).permutation(output)
    parts = [cells(part, estimate.std) for part in np.array_split(mixed, _PARTS)]
    return {
        "entropy": estimate.value,
        "standard_error": estimate.standard_error,
        "bias": float(estimate.bias),
        "standardised": estimate.standardised,
        "negentropy": estimate.negentropy,
        "at_resolution": estimate.at_resolution,
        "at_resolution_error": float(np.std(parts, ddof=1) / math.sqrt(_PARTS)),
        "atoms": sum(share for _, share in estimate.atoms),
        "std": estimate.std,
    }


def cells(values: Array, std: float) -> float:
    """The entropy of values rounded to cells of the default resolution, in nats."""
    _, counts = np.unique(np.round(values / (entropy.RESOLUTION * std)), return_counts=True)
    share = counts / values.size
    return float(-(share * np.log(share)).sum())


def _means(sites: list[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Means over the sites; sites are sampled independently, so their squared errors add."""
    means = []
    for index, name in enumerate(names):
        column = [site["activations"][index] for site in sites]
        entry: dict[str, Any] = {"activation": name}
        entry |= {key: float(np.mean([cell[key] for cell in column])) for key in (*MEASURES, "bias", "atoms", "std")}
        for key in ("standard_error", "at_resolution_error"):
            entry[key] = math.sqrt(sum(cell[key] ** 2 for cell in column)) / len(column)
        distances = [cell["distance"] for cell in column]
        entry["distance"] = None if None in distances else float(np.mean(distances))
        means.append(entry)
    order = sorted(range(len(means)), key=lambda index: means[index]["at_resolution"])
    for place, index in enumerate(order):
        means[index]["rank"] = place + 1
    return means
