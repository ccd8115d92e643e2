"""Synthetic comparisons with a known truth: differences of seeds crossed with items, as runs of two arms give them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

from crrelu_llm.statistics.intervals import Part
from crrelu_llm.statistics.paired import Unit, compare_metric

SHAPES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "heavy": lambda rng, shape: rng.standard_t(3, size=shape) / np.sqrt(3),
    "skewed": lambda rng, shape: rng.exponential(size=shape) - 1,
}


EASE = 0.4  # latent easiness of an average right/wrong item


@dataclass(frozen=True)
class Draw:
    """One comparison: both arms, shape `(seeds, items)`, and the truth that each unit of pairs asks for."""

    baseline: np.ndarray
    candidate: np.ndarray
    truths: dict[str, float]

    @property
    def agree(self) -> bool:
        """Whether all seeds have a difference of the same sign."""
        signs = np.sign((self.candidate - self.baseline).mean(axis=1))
        return bool((signs == signs[0]).all() and signs[0] != 0)

    def compare(self, unit: Unit, binary: bool = False, margin: float | None = None) -> dict[str, Any]:
        """What `compare_metric` says, and whether its interval `covers` the truth."""
        sides = [self.baseline, self.candidate]
        if unit != "both":
            sides = [side.mean(axis=1 if unit == "seed" else 0) for side in sides]
        names = {"baseline_name": "gelu", "candidate_name": "crrelu"}
        row = compare_metric("metric", True, *sides, unit, binary, margin=margin, **names)
        return row.as_dict() | {"covers": row.ci_low <= self.truths[unit] <= row.ci_high}


@dataclass(frozen=True)
class World:
    """A world of comparisons; every source of difference has the standard deviation given, in one arm's favour or not.

    Binary outcomes come from a latent number above 0, whose difference between the arms is what the others describe.
    """

    seeds: int
    items: int = 200
    shift: float = 0.0
    seed_sd: float = 0.0
    item_sd: float = 1.0
    rest_sd: float = 0.5
    seed_shape: str = "normal"
    item_shape: str = "normal"
    binary: bool = False

    @property
    def truth(self) -> float:
        """The mean difference over all seeds and items there could be."""
        return float(self._mean(np.array(self.shift), 2 + self.item_sd**2 + self.rest_sd**2 + self.seed_sd**2, 0.0, 2))

    def draw(self, rng: np.random.Generator) -> Draw:
        """One comparison."""
        seeds = self.shift + self.seed_sd * SHAPES[self.seed_shape](rng, (self.seeds, 1))
        items = self.item_sd * SHAPES[self.item_shape](rng, (1, self.items))
        difficulty = rng.normal(size=(1, self.items))
        rest = self.rest_sd * SHAPES[self.item_shape](rng, (self.seeds, self.items))
        truths = {
            "both": self.truth,
            "item": float(self._mean(seeds, 2 + self.item_sd**2 + self.rest_sd**2, 0.0, 2)),
            "seed": float(self._mean(self.shift + items, 1 + self.rest_sd**2 + self.seed_sd**2, difficulty, 1)),
        }
        if not self.binary:
            return Draw(np.broadcast_to(difficulty, rest.shape), difficulty + seeds + items + rest, truths)
        baseline = difficulty + EASE + rng.normal(size=rest.shape) > 0
        candidate = difficulty + self._ease() + seeds + items + rest + rng.normal(size=rest.shape) > 0
        return Draw(baseline.astype(float), candidate.astype(float), truths)

    def _ease(self) -> float:
        """The candidate's easiness of an average item: without a shift the arms are right equally often."""
        return EASE * float(np.sqrt((2 + self.seed_sd**2 + self.item_sd**2 + self.rest_sd**2) / 2))

    def _mean(self, known: np.ndarray, variance: float, difficulty: np.ndarray | float, noise: float) -> np.floating:
        """The mean difference where `known` and `difficulty` are given and the rest varies with these variances."""
        if not self.binary:
            return np.mean(known)
        right = norm.cdf((difficulty + self._ease() + known) / np.sqrt(variance))
        return np.mean(right) - np.mean(norm.cdf((difficulty + EASE) / np.sqrt(noise)))

    def parts(self) -> list[Part]:
        """The true sources of error of a mean over seeds and items, as `intervals.parts` estimates them."""
        seeds = (self.seed_sd**2 + self.rest_sd**2 / self.items) / self.seeds
        items = (self.item_sd**2 + self.rest_sd**2 / self.seeds) / self.items
        return [Part(seeds, self.seeds - 1), Part(items, self.items - 1)]

    def draws(self, trials: int) -> Iterator[Draw]:
        """Comparisons, always the same ones."""
        rng = np.random.default_rng([self.seeds, self.items, trials])
        return (self.draw(rng) for _ in range(trials))

    def comparisons(self, trials: int, unit: Unit, margin: float | None = None) -> Iterator[dict[str, Any]]:
        """What `compare_metric` says of `draws`."""
        return (drawn.compare(unit, self.binary, margin) for drawn in self.draws(trials))


def decided(comparison: dict[str, Any]) -> bool:
    """Whether the verdict names a winner."""
    return comparison["verdict"] != "undecided"
