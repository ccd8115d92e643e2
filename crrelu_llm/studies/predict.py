"""Tests whether the entropy of an activation predicts its loss after fine-tuning: rank correlation over the arms of a
comparison, with an interval and a test."""

from pathlib import Path
from typing import Any

import numpy as np

from crrelu_llm.comparison.results import build_report
from crrelu_llm.eafo.density import Array
from crrelu_llm.errors import InputError
from crrelu_llm.report.contents import everything

MIN_ARMS = 4
"""With fewer arms no order is rare enough to be significant: 3 arms have 6 orders."""
PREDICTORS = ("at_resolution", "standardised", "entropy", "distance")
_RESAMPLES = 2000
_CONFIDENCE = 0.95


def read_losses(directory: Path) -> dict[str, Any]:
    """The losses of a finished comparison whose arms are activations.

    Args:
        directory: The output directory of `crrelu compare`.

    Returns:
        `directory`; `calibration`: the level of every arm, or None if the recipe does not set it; `seeds`; `arms`:
        `arm`, `activation`, `losses` (one per seed, in the order of `seeds`) each; `left_out`: arms that were not
        swapped, or have unfinished runs.

    Raises:
        InputError: There is no comparison, it has a grid or too few finished arms, or arms are calibrated differently.
    """
    report = build_report(directory)
    arms, left_out = [], []
    seeds: list[int] = sorted({run.seed for run in everything(report)})
    levels = {}
    for arm in report.arms:
        runs = {run.seed: run for run in arm.runs}
        if any(run.grid for run in arm.runs):
            raise InputError(
                f"{directory}: a comparison over a grid; give one without a grid, so that arms differ in one way"
            )
        losses = [runs[seed].metrics.get("loss") for seed in seeds if seed in runs]
        if arm.activation == "native":
            left_out.append({"arm": arm.arm, "reason": "not swapped"})
        elif len(losses) < len(seeds) or None in losses:
            left_out.append({"arm": arm.arm, "reason": "runs that are not finished"})
        else:
            arms.append({"arm": arm.arm, "activation": arm.activation, "losses": losses})
            more = {key: value for key, value in arm.options.items() if not key.startswith("calibration")}
            if more:
                raise InputError(
                    f"{directory}: the arm {arm.arm} differs from others of its activation in {', '.join(more)}; "
                    "compare activations, and leave other options to the recipe"
                )
            levels[arm.arm] = arm.options.get("calibration", report.recipe.get("calibration"))
    if len(arms) < MIN_ARMS:
        raise InputError(
            f"{directory}: {len(arms)} arms with finished runs of a swapped activation, but a rank correlation needs "
            f"{MIN_ARMS}; compare more, as recipes/eafo/rank.yaml says"
        )
    if len(set(levels.values())) > 1:
        found = ", ".join(f"{arm} {level}" for arm, level in levels.items())
        raise InputError(f"{directory}: the arms are calibrated differently ({found}); compare them at one level")
    level = next(iter(levels.values()))
    return {"directory": str(directory), "calibration": level, "seeds": seeds, "arms": arms, "left_out": left_out}


def predict(means: list[dict[str, Any]], comparison: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Correlates the measurements before training with the loss after it.

    Args:
        means: From `rank.rank`, one entry for every activation of the comparison.
        comparison: From `read_losses`.
        seed: The seed of the resampling.

    Returns:
        The comparison with `predictors`, one for each of `PREDICTORS`: `n` (the number of arms where it is finite),
        and `spearman`, `kendall`: `value`, `low`, `high`, `p_value`; None if fewer than `MIN_ARMS` are finite. EAFO
        predicts values above 0 for the entropies. `distance` is the control: the distance of the activation from the
        one with which the model was trained.
    """
    by_name = {entry["activation"]: entry for entry in means}
    arms = [arm | {key: by_name[arm["activation"]][key] for key in PREDICTORS} for arm in comparison["arms"]]
    losses = np.array([arm["losses"] for arm in arms])
    found = []
    for key in PREDICTORS:
        values = np.array([np.nan if arm[key] is None else arm[key] for arm in arms], dtype=np.float64)
        kept = np.isfinite(values)
        entry: dict[str, Any] = {"predictor": key, "n": int(kept.sum()), "spearman": None, "kendall": None}
        if entry["n"] >= MIN_ARMS and np.ptp(values[kept]) > 0:
            entry |= correlate(values[kept], losses[kept], seed)
        found.append(entry)
    return comparison | {"arms": arms, "confidence": _CONFIDENCE, "predictors": found}


def correlate(values: Array, losses: Array, seed: int = 0) -> dict[str, dict[str, float]]:
    """Spearman's and Kendall's rank correlation of one number per arm with the mean loss of the arm.

    The interval is a percentile bootstrap that resamples arms and, for all arms alike, seeds. Spearman's p-value comes
    from a two-sided permutation of the arms (exact up to 8 arms), Kendall's from scipy (exact without ties).

    Args:
        values: `(arms,)`.
        losses: `(arms, seeds)`.
        seed: The seed of the resampling.
    """
    from scipy import stats

    mean = losses.mean(axis=1)
    ranks = stats.rankdata(values)

    def statistic(x: Array, axis: int = -1) -> Array:
        return _pearson(x, np.broadcast_to(stats.rankdata(mean), x.shape))

    test = stats.permutation_test(
        (ranks,), statistic, permutation_type="pairings", vectorized=True, n_resamples=50_000, batch=5000, rng=seed
    )
    tau = stats.kendalltau(values, mean)
    intervals = _bootstrap(values, losses, seed)
    return {
        "spearman": {"value": float(test.statistic), **intervals["spearman"], "p_value": float(test.pvalue)},
        "kendall": {"value": float(tau.statistic), **intervals["kendall"], "p_value": float(tau.pvalue)},
    }


def _bootstrap(values: Array, losses: Array, seed: int) -> dict[str, dict[str, float]]:
    from scipy import stats

    random = np.random.default_rng(seed)
    arms = random.integers(values.size, size=(_RESAMPLES, values.size))
    seeds = random.integers(losses.shape[1], size=(_RESAMPLES, losses.shape[1]))
    x = values[arms]
    y = losses[arms[:, :, None], seeds[:, None, :]].mean(axis=2)
    found = {
        "spearman": _pearson(stats.rankdata(x, axis=1), stats.rankdata(y, axis=1)),
        "kendall": _tau(x, y),
    }
    tails = [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2]
    # A resample with a single distinct arm has no correlation.
    return {
        key: dict(zip(("low", "high"), np.nanquantile(r, tails).tolist(), strict=True)) for key, r in found.items()
    }


def _pearson(x: Array, y: Array) -> Array:
    x, y = x - x.mean(axis=-1, keepdims=True), y - y.mean(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sum(x * y, axis=-1) / np.sqrt(np.sum(x * x, axis=-1) * np.sum(y * y, axis=-1))


def _tau(x: Array, y: Array) -> Array:
    """Kendall's τ-b of each row."""
    one, two = (np.sign(z[:, :, None] - z[:, None, :]).reshape(len(z), -1) for z in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sum(one * two, axis=1) / np.sqrt(np.sum(one * one, axis=1) * np.sum(two * two, axis=1))
