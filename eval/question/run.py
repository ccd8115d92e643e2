"""Runs the study: each model on each task, as one `crrelu compare`. Run it again to continue: finished runs are kept.

    python run.py DATA OUTPUT_DIR --models nano=builtin:nano smollm2=PATH gemma=PATH [--only smollm2/dolly] [--list]

DATA is the output of prepare.py. `--list` only prints the commands.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).resolve().parent))
SFT, DPO = ("dolly", "oasst", "gsm8k"), ("hh", "pandalm", "alpaca")
PLAIN = "crrelu:calibration=none:epsilon_per=layer"  # the paper's swap


@dataclass(frozen=True)
class Setting:
    """The settings that a model's size allows.

    Attributes:
        arms: The arms; all are calibrated in the same way, except the unpatched model and the paper's swap.
        seeds: The number of seeds, for SFT and for DPO.
        steps: The number of steps, for SFT and for DPO.
        rates: Candidate learning rates of each arm, for SFT and for DPO.
        options: Further keys of the recipe.
    """

    arms: tuple[str, ...]
    seeds: tuple[int, int]
    steps: tuple[int, int]
    rates: tuple[str, str]
    options: dict[str, str] = field(default_factory=dict)


# The nano GPT-2 and Gemma are GELU models: their native arm is GELU. Gemma, a base model, has no chat template: copy
# chat_template.jinja into its directory.
SETTINGS = {
    "nano": Setting(
        ("native", "relu", "crrelu", PLAIN), (5, 3), (40, 20), ("1e-3,3e-3,1e-2", "3e-5,1e-4,3e-4"),
        {"calibration_tokens": "8192"},
    ),
    "smollm2": Setting(
        ("native", "gelu", "relu", "crrelu"), (3, 3), (20, 20), ("1e-4,3e-4,1e-3", "1e-5,3e-5"),
        {"calibration_tokens": "16384", "per_device_train_batch_size": "4"},
    ),
    "gemma": Setting(
        ("native", "relu", "crrelu"), (3, 3), (12, 12), ("1e-5,3e-5,1e-4", "3e-6,1e-5,3e-5"),
        {"calibration_tokens": "8192", "per_device_train_batch_size": "4"},
    ),
}  # fmt: skip
BETAS = "0.1,1"
# Questions about the swap itself, answered with the nano GPT-2 on Dolly (damage: on PandaLM) or with Gemma, with one
# learning rate for all arms: task -> arms.
_FROZEN = ":epsilon_learning_rate=0"
EXTRAS = {
    "epsilon": (
        *("native", "crrelu", f"crrelu{_FROZEN}", "crrelu:epsilon_per=layer", "crrelu:epsilon_learning_rate=0.01"),
        *(PLAIN, PLAIN + _FROZEN, "crrelu:calibration=none", f"{PLAIN}:epsilon_init=0.3"),
    ),
    "rates": ("native", "crrelu"),
    "layers": ("native", "crrelu", *(f"crrelu:layers={layer}" for layer in range(4))),
    "learned": (  # minus a frozen ε
        *(f"crrelu{_FROZEN}", "crrelu", "crrelu:epsilon_learning_rate=0.01", "crrelu:epsilon_learning_rate=0.1"),
        f"{PLAIN}:epsilon_learning_rate=0.1",
    ),
    "shape": ("native", "crrelu", "crrelu:affine_learning_rate=1e-3", "crrelu:density=fitted"),
    "long": ("native", "relu", "crrelu", PLAIN),
    "copies": ("native", "crrelu", "silu"),  # is a difference CRReLU's, or that of any fitted copy?
    "answers": ("native", "crrelu"),  # a loss over the answers alone, without the chat template
    "damage": ("native", PLAIN, f"{PLAIN}:epsilon_init=0.3"),  # DPO of a model that the swap damages more or less
    "activations": ("native", "relu", "leaky_relu", "prelu", "gelu", "silu", "mish", "relu2", "crrelu"),
}

OF_GEMMA = ("copies", "answers")


def main() -> int:
    """Runs the requested comparisons; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=PATH", help=", ".join(SETTINGS))
    parser.add_argument("--only", nargs="+", default=[], metavar="MODEL[/TASK]")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    models = dict(text.partition("=")[::2] for text in args.models)
    if not models.keys() <= SETTINGS.keys() or not all(models.values()):
        parser.error(f"--models {' '.join(args.models)}: write NAME=PATH, with the names {', '.join(SETTINGS)}")
    if not args.list and not args.data.is_dir():
        parser.error(f"{args.data} is not a directory; make it with prepare.py")
    failed = False
    for name, path in models.items():
        for task in tasks(name):
            if args.only and name not in args.only and f"{name}/{task}" not in args.only:
                continue
            words = command(name, path, task, args.data, args.output_dir)
            print(shlex.join(["crrelu", *words]), flush=True)
            if args.list:
                continue
            started = time.monotonic()
            failed |= subprocess.run([sys.executable, "-m", "crrelu_llm", *words]).returncode != 0
            print(f"{name}/{task}: {time.monotonic() - started:.0f} s", flush=True)
    return int(failed)


def tasks(name: str) -> tuple[str, ...]:
    """The tasks of a model."""
    extras = (task for task in EXTRAS if name == ("gemma" if task in OF_GEMMA else "nano"))
    return (*SFT, *DPO, *extras)


def command(name: str, path: str, task: str, data: Path, output_dir: Path) -> list[str]:
    """The words of one comparison."""
    data_set = {"damage": "pandalm", "answers": "answers"}.get(task, "dolly" if task in EXTRAS else task)
    kind = "dpo" if data_set in DPO else "sft"
    index, setting = int(kind == "dpo"), SETTINGS[name]
    arms = EXTRAS.get(task, setting.arms)
    options = {
        "model_name_or_path": path,
        "dataset_name": str(data / data_set),
        "calibration_data": str(data / "calibration.jsonl"),
        "max_steps": str(setting.steps[index]),
        **setting.options,
    }
    values, seeds = ["--tune", f"learning_rate={setting.rates[index]}"], setting.seeds[index]
    if index:
        values += ["--grid", f"beta={BETAS}"]
    if task in EXTRAS:
        values, seeds = [], 5 if task == "damage" else 3
        options["learning_rate"] = "3e-5" if task in ("damage", *OF_GEMMA) else "3e-3"
    if task == "damage":
        options["beta"] = "0.1"
    if task == "rates":
        values = ["--grid", f"learning_rate={setting.rates[index]}"]
        del options["learning_rate"]
    if task == "long":
        options |= {"max_steps": "200", "eval_strategy": "steps", "eval_steps": "25"}
    words = ["compare", kind, "--config", str(HERE / f"{kind}.yaml")]
    words += [word for key, value in options.items() for word in (f"--{key}", value)]
    words += ["--arms", *arms, "--seeds", *map(str, range(seeds))]
    words += ["--baseline", arms[0] if task in EXTRAS or "gelu" not in setting.arms else "gelu"]
    words += [*values, "--discard_models", "--patched_dir", str(output_dir / name / "patched")]
    return [*words, "--output_dir", str(output_dir / name / task)]


if __name__ == "__main__":
    sys.exit(main())
