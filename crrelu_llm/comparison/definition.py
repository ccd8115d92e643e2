"""What a comparison is: arms × grid points × seeds of one recipe, and where each of its parts is on disk."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from crrelu_llm.comparison import tuning
from crrelu_llm.comparison.arms import Arm, arm_dir, grid_argv, grid_name
from crrelu_llm.training.arguments import Recipe, parse

BEFORE = "before.json"


@dataclass
class Comparison:
    """What is compared, and where.

    Attributes:
        kind: Name of the kind of training: `"sft"`, `"dpo"`, ...
        argv: The recipe's own options (`--config R.yaml ...`).
        arms: The arms.
        seeds: One run of every arm for each.
        points: Grid points; a single empty one without a grid.
        baseline: Name of the arm that the others are compared with, where the user chose one.
        output_dir: Where everything goes.
        command: The exact command, for the report.
        keep_models: Whether the trained models are saved.
        tune: Recipe options to try with each arm, of which the best on held-out training rows is taken.
        patched_dir: Where the patched copies are, by arm, to share them with other comparisons; else in `output_dir`.
        tuned: The options that were taken, by arm and grid point.
        after: A comparison whose trained models the runs start from, each from that of its own arm and seed.
        after_seed: The seed of the model that every run starts from, where it is not its own.
        calm: Whether each run is one line, without its logs.
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
        """The recipe of one run; arms differ in the activation section only."""
        directory = self.run_dir(arm.name, point, seed)
        chosen = self.tuned.get((arm.name, grid_name(point)), {})
        argv = [*self.argv, *grid_argv(point), *grid_argv(chosen), *arm.argv]
        argv += ["--seed", str(seed), "--output_dir", str(directory)]
        recipe = parse(self.kind, argv)
        if arm.activation is None:
            recipe.activation.activation = None
        if getattr(recipe.training, "eval_packing", False) is None:
            recipe.training.eval_packing = False  # so that an item is a document, in every arm the same one
        return recipe

    def run_dir(self, arm: str, point: dict[str, str], seed: int) -> Path:
        """`D/<arm>/seed-<n>`, with the grid point between."""
        return arm_dir(self.output_dir, arm, point) / f"seed-{seed}"

    def patched(self, arm: str, point: dict[str, str]) -> Path:
        """The patched copy that an arm starts from at a grid point."""
        return patched_copy(self.patched_dir or self.output_dir, arm, point)

    def trained_before(self, arm: str, seed: int) -> Path | None:
        """The trained model that a run starts from."""
        if self.after is None:
            return None
        return arm_dir(self.after, arm, {}) / f"seed-{seed if self.after_seed is None else self.after_seed}"

    def tries(self) -> "Comparison":
        """The comparison of the tries, in a directory of its own, from the same patched copies."""
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
    """Where the patched copy is; what a run's training alone depends on has no part in its name."""
    earlier = arm_dir(directory, arm, point) / "patched"
    return earlier if earlier.is_dir() else arm_dir(directory, arm, tuning.starting_point(point)) / "patched"


def before_training(directory: Path, arm: str, point: dict[str, str]) -> Path:
    """Where the metrics of an arm before training are."""
    earlier = arm_dir(directory, arm, point) / BEFORE
    return earlier if earlier.is_file() else arm_dir(directory, arm, tuning.starting_point(point)) / BEFORE
