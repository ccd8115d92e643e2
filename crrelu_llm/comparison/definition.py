"""The definition of a comparison: arms × grid points × seeds of one recipe, and the paths of its files."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from crrelu_llm.comparison import tuning
from crrelu_llm.comparison.arms import Arm, arm_dir, grid_argv, grid_name
from crrelu_llm.training.arguments import Recipe, parse

BEFORE = "before.json"


@dataclass
class Comparison:
    """The runs of a comparison, and its directories.

    Attributes:
        kind: The name of the kind of training: `"sft"`, `"dpo"`, ...
        argv: The recipe's own options (`--config R.yaml ...`).
        arms: The arms.
        seeds: The seeds; every arm has one run for each.
        points: The grid points; without a grid, one empty point.
        baseline: The name of the baseline arm, if the user chose one.
        output_dir: The directory of the comparison.
        command: The exact command, for the report.
        keep_models: Whether the trained models are saved.
        tune: Recipe options to try with each arm; the best ones on held-out training rows are used.
        patched_dir: The directory of the patched copies, if shared with other comparisons; else `output_dir`.
        tuned: The options that tuning chose, by arm and grid point.
        after: The directory of a comparison whose trained models the runs start from, by arm and seed.
        after_seed: The seed of the model that every run starts from, if it is not the run's own seed.
        calm: Whether each run prints one line instead of its logs.
    """

    kind: str
    argv: list[str]
    arms: list[Arm]
    seeds: list[int]
    points: list[dict[str, str]]
    baseline: str | None
    output_dir: Path
    command: str
    keep_models: bool = True
    tune: list[dict[str, str]] = field(default_factory=list)
    patched_dir: Path | None = None
    tuned: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    after: Path | None = None
    after_seed: int | None = None
    calm: bool = False

    def recipe(self, arm: Arm, point: dict[str, str], seed: int) -> Recipe:
        """The recipe of one run; arms differ only in the activation section."""
        directory = self.run_dir(arm.name, point, seed)
        chosen = self.tuned.get((arm.name, grid_name(point)), {})
        argv = [*self.argv, *grid_argv(point), *grid_argv(chosen), *arm.argv]
        argv += ["--seed", str(seed), "--output_dir", str(directory)]
        recipe = parse(self.kind, argv)
        if arm.activation is None:
            recipe.activation.activation = None
        if getattr(recipe.training, "eval_packing", False) is None:
            recipe.training.eval_packing = False  # so that an item is one document, the same in every arm
        return recipe

    def run_dir(self, arm: str, point: dict[str, str], seed: int) -> Path:
        """The directory of a run: `D/<arm>/<grid point>/seed-<n>`; without a grid, `D/<arm>/seed-<n>`."""
        return arm_dir(self.output_dir, arm, point) / f"seed-{seed}"

    def patched(self, arm: str, point: dict[str, str]) -> Path:
        """The patched copy that an arm starts from at a grid point."""
        return patched_copy(self.patched_dir or self.output_dir, arm, point)

    def trained_before(self, arm: str, seed: int) -> Path | None:
        """The trained model that a run starts from; None without `after`."""
        if self.after is None:
            return None
        return arm_dir(self.after, arm, {}) / f"seed-{seed if self.after_seed is None else self.after_seed}"

    def tries(self) -> "Comparison":
        """The comparison that runs the tries, in its own directory, from the same patched copies."""
        return replace(
            self,
            points=[point | attempt for point in self.points for attempt in self.tune],
            seeds=[tuning.SEED],
            output_dir=self.output_dir / tuning.TUNING,
            keep_models=False,
            tune=[],
            patched_dir=self.patched_dir or self.output_dir,
            after_seed=self.seeds[0],
        )


def patched_copy(directory: Path, arm: str, point: dict[str, str]) -> Path:
    """The directory of a patched copy; grid keys that affect only the training are not part of its name."""
    earlier = arm_dir(directory, arm, point) / "patched"
    return earlier if earlier.is_dir() else arm_dir(directory, arm, tuning.starting_point(point)) / "patched"


def before_training(directory: Path, arm: str, point: dict[str, str]) -> Path:
    """The file with the metrics of an arm before training."""
    earlier = arm_dir(directory, arm, point) / BEFORE
    return earlier if earlier.is_file() else arm_dir(directory, arm, tuning.starting_point(point)) / BEFORE
