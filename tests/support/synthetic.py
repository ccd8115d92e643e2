"""Builds realistic reports, as report.json has them, from a known truth."""

import math
from typing import Any

import numpy as np

from crrelu_llm.report.schema import Report
from crrelu_llm.statistics.paired import Comparison, adjust, compare_metric

SITES = [f"transformer.h.{layer}.mlp.act" for layer in range(6)]
SFT_METRICS = {
    "loss": {"label": "loss", "higher_is_better": False, "format": "{:.4f}", "reference": False},
    "perplexity": {"label": "perplexity", "higher_is_better": False, "format": "{:.2f}", "reference": False},
    "token_accuracy": {"label": "token accuracy", "higher_is_better": True, "format": "{:.1%}", "reference": False},
}
DPO_METRICS = {
    "loss": {"label": "DPO loss", "higher_is_better": False, "format": "{:.4f}", "reference": False},
    "reward_accuracy": {"label": "reward accuracy", "higher_is_better": True, "format": "{:.1%}", "reference": False},
    "reward_margin": {"label": "reward margin", "higher_is_better": True, "format": "{:.3f}", "reference": False},
    "longer_answer_accuracy": {
        "label": "“the longer answer wins”",
        "higher_is_better": True,
        "format": "{:.1%}",
        "reference": True,
    },
}
MARGINS = {"loss": 0.01, "perplexity": 1.0, "reward_accuracy": 0.01}
# arm → (activation, loss after training against GELU's, loss right after the swap, ε before and after)
ARMS: dict[str, tuple[str, float, float, tuple[float, float] | None]] = {
    "gelu": ("gelu", 0.0, 4.554, None),
    "relu": ("relu", 0.071, 9.035, None),
    "crrelu": ("crrelu", 0.062, 8.791, (0.01, 0.085)),
    "crrelu:calibration=fit": ("crrelu", 0.006, 4.558, (0.29, 0.27)),
}


def sft_report(arms: tuple[str, ...] = tuple(ARMS), seeds: int = 3, items: int = 412) -> dict[str, Any]:
    """A supervised comparison with `gelu` as baseline."""
    report = _shell("sft", SFT_METRICS, {"metric": "perplexity", "higher_is_better": False})
    losses = {}
    for arm in arms:
        _, shift, _, _ = ARMS[arm]
        losses[arm] = _item_losses(shift, seeds, items)
        report["arms"].append(_arm(arm, [_sft_metrics(losses[arm][seed]) for seed in range(seeds)], {}))
    for arm in arms[1:]:
        report["comparisons"] += _compare(report, arm, {}, {"loss": losses, "perplexity": losses})
    report["comparisons"] = [entry.as_dict() for entry in adjust(report["comparisons"])]
    return report


def dpo_report(seeds: int = 3, items: int = 300, betas: tuple[float, ...] = ()) -> dict[str, Any]:
    """A preference comparison; with `betas`, a grid."""
    report = _shell("dpo", DPO_METRICS, {"metric": "reward_accuracy", "higher_is_better": True})
    arms = ("gelu", "crrelu:calibration=fit")
    for grid in [{"beta": beta} for beta in betas] or [{}]:
        wins = {}
        for arm in arms:
            rng = np.random.default_rng(len(arm) + round(100 * sum(grid.values())))
            wins[arm] = (rng.random((seeds, items)) < 0.62 + 0.02 * (arm != "gelu")).astype(float)
            metrics = [
                {
                    "loss": 0.66 + 0.01 * rng.random(),
                    "reward_accuracy": float(wins[arm][seed].mean()),
                    "reward_margin": 0.2 + 0.05 * rng.random(),
                    "longer_answer_accuracy": 0.583,
                }
                for seed in range(seeds)
            ]
            _merge(report["arms"], _arm(arm, metrics, grid))
        report["comparisons"] += _compare(report, arms[1], grid, {"reward_accuracy": wins})
    report["comparisons"] = [entry.as_dict() for entry in adjust(report["comparisons"])]
    return report


def report_of(**fields: Any) -> Report:
    """A report of nothing but these fields, as report.json has them."""
    empty: dict[str, Any] = dict.fromkeys(("title", "command", "created", "trainer", "baseline"), "")
    empty |= {key: {} for key in ("recipe", "environment", "headline", "metrics")}
    return Report.of({"schema_version": 1, "arms": [], "comparisons": [], "data": []} | empty | fields)


def fail(report: dict[str, Any], arm: str, seed: int, error: str = "OutOfMemoryError: 2.1 GiB were asked for") -> None:
    """Turns one run into a failed one."""
    for entry in report["arms"]:
        for run in entry["runs"]:
            if entry["arm"] == arm and run["seed"] == seed:
                run |= {"status": "failed", "error": error, "metrics": {}, "history": [], "epsilon": {}}
                run |= {"train_seconds": None, "tokens_per_second": None, "peak_memory_bytes": None}


def _item_losses(shift: float, seeds: int, items: int) -> np.ndarray:
    """Losses of shape `(seeds, items)`: an item's difficulty and a seed's luck are the same in every arm."""
    shared = np.random.default_rng(0)
    difficulty, luck = shared.normal(4.47, 0.5, items), shared.normal(0, 0.008, (seeds, 1))
    own = np.random.default_rng(round(shift * 1e4) + 7)
    return difficulty + luck + shift + own.normal(0, 0.04, (seeds, items))


def _sft_metrics(losses: np.ndarray) -> dict[str, float]:
    loss = float(losses.mean())
    return {"loss": loss, "perplexity": math.exp(loss), "token_accuracy": 0.62 - 0.08 * loss}


def _compare(
    report: dict[str, Any], candidate: str, grid: dict[str, Any], items: dict[str, dict[str, np.ndarray]]
) -> list[Comparison]:
    by_name = {arm["arm"]: arm for arm in report["arms"]}
    comparisons = []
    for metric, description in report["metrics"].items():
        sides = ("gelu", candidate)
        pairs = {"seed": [[r["metrics"][metric] for r in by_name[a]["runs"] if r["grid"] == grid] for a in sides]}
        if metric in items:
            transform = np.exp if metric == "perplexity" else np.asarray
            pairs["item"] = [list(transform(items[metric][arm].mean(axis=0))) for arm in sides]
            if len(items[metric]["gelu"]) > 1:
                pairs["both"] = [transform(items[metric][arm]) for arm in sides]
        for unit, (baseline, treated) in pairs.items():
            comparison = compare_metric(
                metric,
                description["higher_is_better"],
                baseline,
                treated,
                unit,
                metric == "reward_accuracy",
                baseline_name="gelu",
                candidate_name=candidate,
                margin=MARGINS.get(metric),
            )
            comparisons.append(comparison.but(grid=grid))
    return comparisons


def _merge(arms: list[dict[str, Any]], new: dict[str, Any]) -> None:
    for arm in arms:
        if arm["arm"] == new["arm"]:
            arm["runs"] += new["runs"]
            return
    arms.append(new)


def _arm(name: str, metrics: list[dict[str, float]], grid: dict[str, Any]) -> dict[str, Any]:
    activation, shift, swapped, epsilons = ARMS[name]
    options = {"calibration": "fit"} if ":" in name else {}
    patch = None
    if activation != "gelu":
        patch = {
            "model": "assets/nano", "model_type": "gpt2", "activation": activation, "epsilon_per": "layer",
            "options": options,
            "sites": [
                {"path": p, "original": "gelu_new", "num_channels": 768, "epsilon_mean": (epsilons or (0, 0))[0],
                 "scale_mean": 1.6 if options else 1.0, "relative_error": 0.12} for p in SITES
            ],
            "skipped": [{"path": "lm_head", "reason": "no activation"}],
            "perplexity": {"before": 95.02, "after_naive": 6577.4, "after": math.exp(swapped), "tokens": 20480,
                           "data": "builtin:docstrings"},
            "seconds": 8.1, "versions": {"torch": "2.13.0"},
        }  # fmt: skip
    return {
        "arm": name,
        "activation": activation,
        "options": options,
        "patch": patch,
        "before": {"loss": swapped, "perplexity": math.exp(swapped)},
        "runs": [_run(seed, m, shift, swapped, epsilons, grid) for seed, m in enumerate(metrics)],
    }


def _run(
    seed: int,
    metrics: dict[str, float],
    shift: float,
    swapped: float,
    epsilons: tuple[float, float] | None,
    grid: dict[str, Any],
) -> dict[str, Any]:
    rng = np.random.default_rng([seed, round(1000 * shift)])
    curve = [4.42 + shift + (swapped - 4.42) * math.exp(-s / 9) + rng.normal(0, 0.03) for s in range(1, 61)]
    bend = np.linspace(-1, 1, len(SITES)) ** 2 * 0.05
    start, end = epsilons or (0.0, 0.0)
    return {
        "seed": seed,
        "status": "done",
        "error": None,
        "grid": grid,
        "metrics": metrics,
        "train_seconds": 64.0 + 9 * (start > 0) + seed,
        "tokens_per_second": 1920.0 - 210 * (start > 0) - 13 * seed,
        "peak_memory_bytes": 812_000_000 + 34_000_000 * (start > 0),
        "epsilon": {p: end + float(b) + 0.004 * seed for p, b in zip(SITES, bend, strict=True)} if epsilons else {},
        "epsilon_start": {p: start + float(b) * (start > 0.1) for p, b in zip(SITES, bend, strict=True)}
        if epsilons
        else {},
        "curves": {p: np.maximum(np.linspace(-4, 3, 71), 0).tolist() for p in SITES[:3]} if epsilons else {},
        "history": [{"step": step, "loss": loss} for step, loss in enumerate(curve, 1)],
    }


def _shell(trainer: str, metrics: dict[str, Any], headline: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "title": f"CRReLU against GELU: {trainer.upper()} of the nano GPT-2",
        "command": f"crrelu compare {trainer} --config recipes/nano/{trainer}/config_full.yaml \\\n"
        "    --arms gelu relu crrelu crrelu:calibration=fit --seeds 0 1 2 --output_dir runs/nano",
        "created": "2026-03-01T12:30:00+00:00",
        "trainer": trainer,
        "trainer_label": {"sft": "supervised fine-tuning (SFT)", "dpo": "direct preference optimisation (DPO)"}[
            trainer
        ],
        "items": {"sft": "documents", "dpo": "preference pairs"}[trainer],
        "recipe": {
            "model_name_or_path": "nano",
            "dataset_name": "builtin:docstrings",
            "max_steps": 60,
            "per_device_train_batch_size": 8,
            "learning_rate": 5e-4,
            "max_length": 256,
            "lr_scheduler_type": "cosine",
            "bf16": False,
        },
        "environment": {
            "python": "3.11.7",
            "platform": "Linux-6.1-x86_64",
            "processor": "x86_64, 2 cores",
            "device": "cpu",
            "processes": 1,
            "versions": {"torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0", "crrelu_llm": "0.1.0"},
        },
        "arms": [],
        "comparisons": [],
        "data": [
            {"name": "builtin:docstrings", "split": "train", "rows": 4096, "sha256": "ab12" * 16},
            {"name": "builtin:docstrings", "split": "eval", "rows": 412, "sha256": "cd34" * 16},
        ],
        "baseline": "gelu",
        "headline": headline,
        "metrics": metrics,
    }
