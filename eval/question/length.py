"""Shows whether DPO's rewards follow the length of the answers: for each arm of a comparison, over its seeds.

    python length.py OUTPUT_DIR/nano/pandalm DATA/pandalm/test.jsonl OUTPUT.json

For each arm and grid value: the loss, the reward accuracy on all pairs, on those whose chosen answer is longer, and on
those whose chosen answer is shorter, and the rank correlation (Spearman) of the reward margin with the difference in
characters. Prints a table and writes it as JSON.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from crrelu_llm.comparison.arms import arm_dir, grid_name
from crrelu_llm.comparison.settings import read_settings
from crrelu_llm.errors import InputError


def main() -> None:
    """Prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("comparison", "data", "output"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    try:
        found = by_arm(args.comparison, [json.loads(line) for line in args.data.read_text().splitlines()])
    except (InputError, OSError) as error:
        parser.error(str(error))
    print("| arm | β | seeds | loss | accuracy | chosen is longer | chosen is shorter | correlation |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for entry in found:
        numbers = [f"{entry[key]:.2f}" for key in ("accuracy", "longer", "shorter", "correlation")]
        cells = [entry["arm"], entry["grid"].removeprefix("beta="), str(entry["seeds"]), f"{entry['loss']:.3f}"]
        print(f"| {' | '.join([*cells, *numbers])} |")
    args.output.write_text(json.dumps(found, indent=2) + "\n")


def by_arm(directory: Path, pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The means over the finished seeds of each arm and grid value.

    Args:
        directory: The directory of the comparison.
        pairs: Its evaluation data, conversational pairs in the order of the data.
    """
    lengths = [
        sum(len(message["content"]) for message in pair[side]) for pair in pairs for side in ("chosen", "rejected")
    ]
    longer = np.array(lengths[::2]) - np.array(lengths[1::2])
    settings = read_settings(directory)
    found = []
    for arm in settings.arms:
        for point in settings.points:
            runs = [json.loads(path.read_text()) for path in arm_dir(directory, arm, point).glob("seed-*/run.json")]
            rows = [_measured(run, longer) for run in runs if run["status"] == "done"]
            if rows:
                means = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
                found.append({"arm": arm, "grid": grid_name(point), "seeds": len(rows), **means})
    return found


def _measured(run: dict[str, Any], longer: np.ndarray) -> dict[str, float]:
    right, margins = (np.array(run["items"][name]) for name in ("reward_accuracy", "reward_margin"))
    if len(margins) != len(longer):
        raise InputError(
            f"the comparison has {len(margins)} pairs and the data {len(longer)}; give its evaluation data"
        )
    return {
        "loss": run["metrics"]["loss"],
        "accuracy": float(right.mean()),
        "longer": float(right[longer > 0].mean()),
        "shorter": float(right[longer < 0].mean()),
        "correlation": float(stats.spearmanr(margins, longer).statistic),
    }


if __name__ == "__main__":
    main()
