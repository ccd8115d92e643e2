"""The paper's study in one command: SFT, then DPO on two data sets with four penalties, arms and seeds, with reports.

    python recipes/paper/run.py --output_dir outputs/paper [--model M] [--dry_run] [OPTIONS OF THE RECIPES]

Each arm's DPO starts from its own SFT, seed by seed. Finished runs are kept: the same command continues. `--dry_run`
runs every step with the embedded small GPT-2, a few made-up rows and two steps per run, on a CPU.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARMS = [
    "native",
    "gelu",
    "relu",
    "crrelu",
    "crrelu:calibration=none:epsilon_per=layer",
]  # the last is the paper's swap
DATA = {"hh": "Anthropic/hh-rlhf", "shp": "stanfordnlp/SHP"}
BETAS = "0.1,1,2,5"


def main() -> int:
    """Runs the three comparisons; the exit status is that of the first failure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model", help="another model: a hub name, a directory or a .gguf file")
    parser.add_argument("--arms", nargs="+", help=f"default: {' '.join(ARMS)}; in a dry run native and crrelu")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--dry_run", action="store_true")
    args, options = parser.parse_known_args()
    data, arms = DATA, ARMS
    if args.dry_run:
        args.model, args.seeds = args.model or "builtin:nano", args.seeds[:1]
        data, arms = made_up(args.output_dir / "data"), ["native", "crrelu"]
        options = [*_DRY, *options]
    args.arms = args.arms or arms
    for command in commands(args, data, options):
        print(shlex.join(["crrelu", *command]), flush=True)
        status = subprocess.run([sys.executable, "-m", "crrelu_llm", *command]).returncode
        if status:
            return status
    return 0


_TINY = {
    **{"max_steps": 2, "max_length": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
    **{"use_cpu": "true", "bf16": "false", "logging_steps": 1, "save_strategy": "no", "calibration_tokens": 512},
}
_DRY = [word for key, value in _TINY.items() for word in (f"--{key}", str(value))]


def commands(args: argparse.Namespace, data: dict[str, str], options: list[str]) -> list[list[str]]:
    """The words of each `crrelu compare`."""
    model = ["--model_name_or_path", args.model] if args.model else []
    runs = ["--arms", *args.arms, "--seeds", *args.seeds, *model, *options]
    sft = args.output_dir / "sft"
    found = [["compare", "sft", "--config", str(HERE / "sft.yaml"), "--dataset_name", data["hh"], *runs]]
    found[0] += ["--output_dir", str(sft)]
    for name, source in data.items():
        words = ["compare", "dpo", "--config", str(HERE / "dpo.yaml"), "--dataset_name", source, *runs]
        words += ["--grid", f"beta={BETAS}", "--after", str(sft), "--discard_models"]
        found.append([*words, "--output_dir", str(args.output_dir / f"dpo-{name}")])
    return found


def made_up(directory: Path) -> dict[str, str]:
    """A few rows in the columns of the two data sets."""
    asked = [f"\n\nHuman: What is thing {i}?\n\nAssistant:" for i in range(12)]
    answers = {"human_ref_A": "Because it is so.", "human_ref_B": "No idea."}
    rows = {
        "hh": [{"chosen": f"{prompt} A good answer.", "rejected": f"{prompt} No."} for prompt in asked],
        "shp": [{"history": f"Why {i}?", "labels": i % 2, **answers} for i in range(12)],
    }
    for name, content in rows.items():
        for split, count in (("train", 8), ("test", 4)):
            path = directory / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in content[:count]), encoding="utf-8")
    return {name: str(directory / name) for name in rows}


if __name__ == "__main__":
    sys.exit(main())
