"""A folder as `crrelu compare` leaves it, without its runs."""

import json

ARMS = ("relu", "gelu", "silu", "mish", "crrelu")


def write_comparison(directory, arms=ARMS, seeds=(0, 1), points=({},), losses=None, **recipe):
    """The files of a comparison that `crrelu compare` would have left, with losses that are made up."""
    from crrelu_llm.comparison.arms import arm_dir, grid_name
    from crrelu_llm.comparison.settings import SETTINGS

    asked = [[arm, grid_name(point), seed] for arm in arms for point in points for seed in seeds]
    settings = {
        "kind": "sft", "arms": list(arms), "seeds": list(seeds), "points": list(points), "asked": asked,
        "baseline": arms[0], "recipe": {"calibration": "none"} | recipe, "identity": {}, "data": [], "created": "",
        "commands": ["crrelu compare sft"],
    }  # fmt: skip
    directory.mkdir(parents=True)
    (directory / SETTINGS).write_text(json.dumps(settings))
    for index, arm in enumerate(arms):
        for point in points:
            for seed in seeds:
                place = arm_dir(directory, arm, point) / f"seed-{seed}"
                place.mkdir(parents=True)
                loss = (losses or {}).get(arm, 2 + index + seed / 10)
                content = {"status": "done", "metrics": {"loss": loss}} if loss is not None else {"status": "failed"}
                (place / "run.json").write_text(json.dumps(content))
    return directory
