"""Coverage, false positives, power and equivalence of the report's statistics on data with a known truth."""

import argparse

import numpy as np
from scipy import stats
from worlds import World, decided

from crrelu_llm.statistics import paired
from crrelu_llm.statistics.intervals import attainable_level, smallest_detectable

SPREADS = {"none": 0.0, "small": 0.1, "large": 0.5}
WORLDS = {
    **{
        f"{seeds} seeds, seed effect {name}": World(seeds, seed_sd=sd)
        for seeds in (2, 3, 5)
        for name, sd in SPREADS.items()
    },
    "10 seeds, seed effect large": World(10, seed_sd=0.5),
    "3 seeds, seed effect small, 3000 items": World(3, 3000, seed_sd=0.1),
    "3 seeds, seed effect small, 20 items": World(3, 20, seed_sd=0.1),
    "2 seeds, right/wrong": World(2, seed_sd=0.3, binary=True),
    "3 seeds, right/wrong": World(3, seed_sd=0.3, binary=True),
    "5 seeds, right/wrong": World(5, seed_sd=0.3, binary=True),
    "3 seeds, right/wrong, a true difference": World(3, seed_sd=0.3, shift=0.5, binary=True),
    "3 seeds, heavy-tailed items": World(3, seed_sd=0.1, item_shape="heavy"),
    "3 seeds, skewed items": World(3, seed_sd=0.1, item_shape="skewed"),
    "3 seeds, large heavy-tailed seed effect": World(3, seed_sd=0.5, seed_shape="heavy"),
    "5 seeds, large heavy-tailed seed effect": World(5, seed_sd=0.5, seed_shape="heavy"),
    "3 seeds, large skewed seed effect": World(3, seed_sd=0.5, seed_shape="skewed"),
    "5 seeds, large skewed seed effect": World(5, seed_sd=0.5, seed_shape="skewed"),
}
MODELS = {
    "200 items": World(1),
    "20 items": World(1, 20),
    "200 heavy-tailed items": World(1, item_shape="heavy"),
    "200 skewed items": World(1, item_shape="skewed"),
    "200 right/wrong items (McNemar)": World(1, item_sd=0.3, binary=True),
    "3000 right/wrong items (McNemar)": World(1, 3000, item_sd=0.3, binary=True),
}


def over_runs(name: str, world: World, trials: int) -> str:
    """Coverage and false verdicts of what the report uses (both, seeds, items) and used or could use instead."""
    columns = ("both", "both, false", "seed", "item", "item and agreement, false", "bootstrap of seeds", "two levels")
    found: dict[str, list[bool]] = {column: [] for column in columns}
    rng = np.random.default_rng(trials)
    for trial, drawn in enumerate(world.draws(2 * trials)):
        both, seed = drawn.compare("both", world.binary), drawn.compare("seed", world.binary)
        found["both"].append(both["covers"])
        found["both, false"].append(decided(both))
        found["seed"].append(seed["covers"])
        if trial >= trials:
            continue
        item, differences = drawn.compare("item", world.binary), drawn.candidate - drawn.baseline
        found["item"].append(item["covers"])
        found["item and agreement, false"].append(decided(item) and drawn.agree)
        of_seeds = _bootstrap_of_seeds(differences.mean(axis=1), rng)
        found["bootstrap of seeds"].append(_within(of_seeds, drawn.truths["seed"]))
        found["two levels"].append(_within(_two_level(differences, rng), world.truth))
    shares = {column: f"{np.mean(values):.1%}" for column, values in found.items()}
    if world.truth:
        shares["both, false"] = shares["item and agreement, false"] = "–"
    return _row(name, *shares.values())


def over_items(name: str, world: World, trials: int) -> str:
    """The rows over items, of one pair of models."""
    rows = list(world.comparisons(trials, "item"))
    shares = (sum(row["covers"] for row in rows), sum(decided(row) for row in rows))
    return _row(name, *(f"{count / trials:.1%}" for count in shares))


def power(name: str, world: World, unit: str, trials: int) -> str:
    """How often the difference that should be found four times in five is found."""
    if unit == "item":
        # Of right/wrong items the true shares of disagreement have no closed form: the mean of what is reported.
        size = float(np.mean([row["smallest_detectable"] for row in world.comparisons(100, unit)]))
        shift = size
        for _ in range(5):  # the latent shift that gives this difference
            shift *= size / World(**vars(world) | {"shift": shift}).truth if world.binary else 1
    else:
        sources = world.parts()[: 2 if unit == "both" else 1]
        level = 0.05 if unit == "both" else attainable_level(world.seeds, 0.05)
        shift = size = smallest_detectable(sources, level)
    rows = list(World(**vars(world) | {"shift": shift}).comparisons(trials, unit))
    reported = np.quantile([row["smallest_detectable"] for row in rows], [0.1, 0.9])
    found = sum(decided(row) for row in rows) / trials
    return _row(name, f"{size:.3f}", f"{found:.1%}", " to ".join(f"{value:.3f}" for value in reported))


def equivalence(name: str, world: World, margin: float, trials: int) -> str:
    """How often two arms are called equivalent: at a difference of exactly the margin, and at none."""
    shares = []
    for shift in (margin, -margin, 0.0):
        rows = list(World(**vars(world) | {"shift": shift}).comparisons(trials, "both", margin))
        shares += [sum(row[field] for row in rows) / trials for field in ("equivalent", "no_worse")]
    return _row(name, f"{margin:g}", f"{shares[0]:.1%}", f"{shares[3]:.1%}", f"{shares[4]:.1%}", f"{shares[5]:.1%}")


def _bootstrap_of_seeds(means: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    result = stats.bootstrap((means,), np.mean, n_resamples=999, method="percentile", rng=rng).confidence_interval
    return float(result.low), float(result.high)


def _two_level(differences: np.ndarray, rng: np.random.Generator, resamples: int = 399) -> np.ndarray:
    """Percentile interval from seeds and items drawn with replacement."""
    seeds, items = (rng.multinomial(n, np.full(n, 1 / n), resamples) / n for n in differences.shape)
    return np.quantile(np.sum((seeds @ differences) * items, axis=1), [0.025, 0.975])


def _within(interval: tuple[float, float] | np.ndarray, truth: float) -> bool:
    return bool(interval[0] <= truth <= interval[1])


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(*cells: str) -> str:
    return "\n".join(("", _row(*cells), "|---|" + "---:|" * (len(cells) - 1)))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--trials", type=int, default=1000, help="comparisons in each world; twice as many of those without resampling"
    )
    trials = parser.parse_args().trials
    paired.RESAMPLES = 399  # the number of resamples moves an interval's ends, hardly its coverage
    columns = ("both", "both: false verdicts", "seeds", "items", "items and agreement: false verdicts")
    print(_head("runs", *columns, "not used: bootstrap of seeds", "not used: two-level bootstrap"))
    for name, world in WORLDS.items():
        print(over_runs(name, world, trials), flush=True)
    print(_head("one pair of models", "coverage", "false verdicts"))
    for name, world in MODELS.items():
        print(over_items(name, world, trials), flush=True)
    print(_head("power", "true difference", "found", "reported as detectable (80 % of the reports)"))
    for seeds in (2, 3, 5):
        print(power(f"both, {seeds} seeds", World(seeds, seed_sd=0.1), "both", 2 * trials), flush=True)
    for seeds in (6, 7, 8, 10):
        print(
            power(f"over seeds, {seeds} seeds", World(seeds, seed_sd=0.1, item_sd=0), "seed", 2 * trials), flush=True
        )
    print(power("over items", World(1), "item", trials), flush=True)
    print(power("over right/wrong items", World(1, item_sd=0.3, binary=True), "item", trials), flush=True)
    said = ("equivalent at +margin", "no worse at −margin", "equivalent at 0", "no worse at 0")
    print(_head("equivalence", "margin", *said))
    for seeds in (2, 3, 5):
        print(equivalence(f"{seeds} seeds", World(seeds, seed_sd=0.1), 0.5, 2 * trials), flush=True)


if __name__ == "__main__":
    main()
