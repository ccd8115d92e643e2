"""How much the start value of ε matters: the arms of the study, its document from a comparison's report, its text."""

import math
import statistics
from typing import Any

from scipy.optimize import brentq

from crrelu_llm.columns import aligned
from crrelu_llm.comparison.arms import NATIVE
from crrelu_llm.comparison.results import NOT_RUN
from crrelu_llm.errors import InputError
from crrelu_llm.report.schema import Arm, Report, Run

FROZEN, LEARNED_LAYER, LEARNED_CHANNEL = WAYS = ("frozen", "learned per layer", "learned per channel")
# Above the first, CRReLU falls around x = √3; below the second, it also falls right of 0.
_FALLS_RIGHT, _FALLS_AT_ZERO = math.exp(1.5) / 2, -1.0


def arm_names(values: list[float]) -> list[str]:
    """The arms of the study: `native`, then three CRReLU arms for every start value.

    A frozen ε is the same function with the same gradients whether it is stored per layer or per channel, so it has
    one arm.

    Args:
        values: Start values of ε.

    Raises:
        InputError: A value is not finite, or is repeated.
    """
    texts = [f"{value + 0.0:.12g}" for value in values]  # −0 becomes 0
    if not all(map(math.isfinite, values)) or len(set(texts)) != len(texts):
        raise InputError(f"--values: finite numbers, each once, not {' '.join(texts)}")
    plain = [f"crrelu:calibration=none:epsilon_init={text}" for text in texts]
    ways = ("epsilon_per=layer:epsilon_learning_rate=0", "epsilon_per=layer", "epsilon_per=channel")
    return [NATIVE, *(f"{arm}:{way}" for way in ways for arm in plain)]


def check_recipe(values: dict[str, Any], source: str) -> None:
    """Refuses a recipe that would replace the start value, or would not train a learned ε.

    Args:
        values: The recipe's keys, as `Recipe.values`.
        source: The source of the recipe, for the message.

    Raises:
        InputError: `calibration` is not `none`, or `epsilon_learning_rate` is 0.
    """
    calibration = values.get("calibration", "none")
    if calibration != "none":
        raise InputError(
            f"{source}: calibration: {calibration} would overwrite the start value of ε; set calibration: none"
        )
    if float(values.get("epsilon_learning_rate", 1)) == 0:
        raise InputError(
            f"{source}: epsilon_learning_rate: 0 freezes the ε that should be learned (the study has frozen arms "
            "anyway); set it above 0, or leave it out"
        )


def study(report: Report) -> dict[str, Any]:
    """The document of the study, as in epsilon.json.

    Args:
        report: A comparison's report, with the arms that `arm_names` gives.

    Returns:
        `{command, environment, recipe, native: {before, after}, cases, shapes}`. A case is a way and a start value,
        over the seeds: `{way, epsilon_init, before, after, after_low, after_high, epsilon_end, epsilon_low,
        epsilon_high, seeds, missing, failed}`. Losses are in nats per token, ε is over sites and seeds, `missing` has
        the seeds that have not run yet, and `failed` is a list of `{seed, reason}`. A run with a NaN loss counts as
        failed. A value that no run has measured is None.
    """
    cases = [case for arm in report.arms if (case := _case(arm)) is not None]
    cases.sort(key=lambda case: (WAYS.index(case["way"]), case["epsilon_init"]))
    native = next((arm for arm in report.arms if arm.arm == NATIVE), None)
    losses = [] if native is None else _finite(run.metrics.get("loss") for run in native.runs)
    return {
        **{"command": report.command, "environment": report.environment, "recipe": report.recipe},
        "native": {
            "before": None if native is None else native.before.get("loss"),
            "after": statistics.fmean(losses) if losses else None,
        },
        "cases": cases,
        "shapes": [shape(value) for value in sorted({case["epsilon_init"] for case in cases})],
    }


def _case(arm: Arm) -> dict[str, Any] | None:
    """An arm of the study; None for any other."""
    options = arm.options
    if arm.activation != "crrelu" or "epsilon_init" not in options:
        return None
    frozen = float(options.get("epsilon_learning_rate", 1)) == 0
    way = FROZEN if frozen else f"learned per {options.get('epsilon_per', 'layer')}"
    reasons = {run.seed: reason for run in arm.runs if (reason := _why_failed(run))}
    good = [run for run in arm.runs if run.seed not in reasons]
    losses = _finite(run.metrics.get("loss") for run in good)
    epsilons = _finite(value for run in good for value in run.epsilon.values())
    before = _finite([arm.before.get("loss")])
    return {
        "way": way,
        "epsilon_init": float(options["epsilon_init"]),
        "before": before[0] if before else None,
        "after": statistics.fmean(losses) if losses else None,
        "after_low": min(losses, default=None),
        "after_high": max(losses, default=None),
        "epsilon_end": statistics.fmean(epsilons) if epsilons else None,
        "epsilon_low": min(epsilons, default=None),
        "epsilon_high": max(epsilons, default=None),
        "seeds": [run.seed for run in good],
        "missing": [seed for seed, reason in reasons.items() if reason == NOT_RUN],
        "failed": [{"seed": seed, "reason": reason} for seed, reason in reasons.items() if reason != NOT_RUN],
    }


def _why_failed(run: Run) -> str | None:
    if not run.done:
        return run.error or run.status
    return None if _finite([run.metrics.get("loss")]) else "the loss after training is not a number"


def _finite(values: Any) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def shape(epsilon: float) -> dict[str, Any]:
    """The shape of CRReLU for an ε, without any model.

    With x ~ N(0, 1), the mean of f'(x)² is 1/2 + ε/(2√2) + 2ε²/(3√3), by ∫₀^∞ (1 − x²)·exp(−x²) dx = √π/4 and
    ∫ (1 − x²)²·exp(−3x²/2) dx = (2/3)·√(2π/3): the factor by which a layer scales the square of a gradient.

    Returns:
        `{epsilon, slope_left_of_zero, slope_right_of_zero, value_at_minus_one, mean_square_slope, falling}`; the value
        at −1 is the extremum of the left half, and `falling` the intervals on which f' < 0, None for −∞.
    """
    return {
        "epsilon": epsilon,
        "slope_left_of_zero": epsilon,
        "slope_right_of_zero": 1 + epsilon,
        "value_at_minus_one": 0.0 - epsilon * math.exp(-0.5),
        "mean_square_slope": 0.5 + epsilon / (2 * math.sqrt(2)) + 2 * epsilon**2 / (3 * math.sqrt(3)),
        "falling": _falling(epsilon),
    }


def _falling(epsilon: float) -> list[tuple[float | None, float]]:
    def slope(x: float) -> float:  # right of 0
        return 1 + epsilon * (1 - x * x) * math.exp(-x * x / 2)

    if epsilon == 0:
        return []
    if epsilon < 0:
        return [(-1.0, brentq(slope, 0, 1) if epsilon < _FALLS_AT_ZERO else 0.0)]
    if epsilon <= _FALLS_RIGHT:
        return [(None, -1.0)]
    lowest = math.sqrt(3)  # the point of the least slope, which is 1 at x = 1 and again far to the right
    return [(None, -1.0), (brentq(slope, 1, lowest), brentq(slope, lowest, lowest + math.sqrt(2 * epsilon)))]


def text(document: dict[str, Any]) -> str:
    """The document as tables: losses and ε by start value, what failed, and the shapes."""
    native = document["native"]
    rows = [["way", "ε at the start", "loss before", "loss after", "ε at the end", "lowest", "highest", "runs"]]
    rows.append(["native", "", _number(native["before"]), _number(native["after"]), "", "", "", ""])
    for case in document["cases"]:
        numbers = (case[key] for key in ("before", "after", "epsilon_end", "epsilon_low", "epsilon_high"))
        counts = [
            f"{len(case[key])} {word}" for key, word in (("failed", "failed"), ("missing", NOT_RUN)) if case[key]
        ]
        runs = ", ".join([str(len(case["seeds"])), *counts])
        rows.append([case["way"], f"{case['epsilon_init']:g}", *map(_number, numbers), runs])
    lines = aligned(rows)
    for case in document["cases"]:
        name = f"{case['way']}, ε = {case['epsilon_init']:g}"
        lines += [f"failed: {name}, seed {run['seed']}: {run['reason']}" for run in case["failed"]]
    shapes = [["ε", "slope at 0−", "slope at 0+", "f(−1)", "mean f'² under N(0, 1)", "falls on"]]
    keys = ("slope_left_of_zero", "slope_right_of_zero", "value_at_minus_one", "mean_square_slope")
    for entry in document["shapes"]:
        intervals = [f"({'-∞' if low is None else f'{low:.3g}'}, {high:.3g})" for low, high in entry["falling"]]
        shapes.append([f"{entry['epsilon']:g}", *(_number(entry[key]) for key in keys), " ".join(intervals)])
    return "\n".join([*lines, "", *aligned(shapes)])


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
