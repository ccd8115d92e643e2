"""Measures the peak memory of real training runs on the CPU, and compares `crrelu plan --use_cpu` with it.

    python eval/results/2026-11-24-plan/measure.py --smollm2 DIRECTORY --output measured.json

Each case trains two steps by `crrelu sft|dpo`'s own trainer in a process of its own; the second step has AdamW's
moments. Measured is what torch allocates (every allocation, from torch's profiler), the model's weights included;
and, in another process without the profiler, for the plainest cases, the peak of the resident memory above what it was
before the libraries and the model were loaded.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_SHAPES = {
    "nano": (
        {"per_device_train_batch_size": 8, "max_length": 256},
        {"per_device_train_batch_size": 2, "max_length": 512},
    ),
    "SmolLM2-135M": (
        {"per_device_train_batch_size": 4, "max_length": 128},
        {"per_device_train_batch_size": 2, "max_length": 512},
    ),
}
_OPTIONS: list[dict[str, Any]] = [
    {"gradient_checkpointing": False},
    {"gradient_checkpointing": False, "recompute_activation": True},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "recompute_activation": True},
    {"gradient_checkpointing": False, "activation": "native"},
    {"gradient_checkpointing": False, "bf16": True},
    {"gradient_checkpointing": True, "bf16": True},
    {"gradient_checkpointing": False, "gradient_accumulation_steps": 2},
    {"gradient_checkpointing": False, "use_peft": True},
    {"gradient_checkpointing": True, "use_peft": True},
    {"gradient_checkpointing": True, "trainer": "dpo"},
    {"gradient_checkpointing": False, "trainer": "dpo", "use_peft": True},
]
CASES = [
    {"model": model} | shape | options
    for model, shapes in _SHAPES.items()
    for shape, chosen in zip(shapes, (_OPTIONS, (_OPTIONS[0], _OPTIONS[2])), strict=True)
    for options in chosen
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--smollm2", help="directory with SmolLM2-135M-Instruct; without it, nano alone")
    parser.add_argument("--output", default="measured.json")
    parser.add_argument("--case", help="one case as JSON, in this process")
    parser.add_argument("--how", choices=("allocated", "resident", "planned"))
    args = parser.parse_args()
    if args.case:
        print("RESULT", json.dumps(_one(json.loads(args.case), args.how)))
        return
    from crrelu_llm.environment import environment

    rows = []
    for case in CASES:
        if case["model"] == "nano" or args.smollm2:
            path = "builtin:nano" if case["model"] == "nano" else args.smollm2
            hows = ("planned", "allocated", "resident") if len(case) == 4 else ("planned", "allocated")
            row = {"case": case} | {how: _in_a_process(case | {"model": path}, how) for how in hows}
            print(_line(row), flush=True)
            rows.append({"case": case} | {f"{how}_mib": round(row[how] / 2**20, 1) for how in hows})
            rows[-1]["error_percent"] = round(100 * (row["planned"] / row["allocated"] - 1), 1)
            Path(args.output).write_text(json.dumps({"environment": environment(), "cases": rows}, indent=2) + "\n")


def _line(row: dict[str, Any]) -> str:
    case = row["case"]
    words = [case.get("trainer", "sft"), f"{case['per_device_train_batch_size']}x{case['max_length']}"]
    words += [key for key in ("gradient_checkpointing", "recompute_activation", "use_peft", "bf16") if case.get(key)]
    words += ["native"] if "activation" in case else []
    words += ["accumulation"] if "gradient_accumulation_steps" in case else []
    sizes = " | ".join(f"{row[how] / 2**20:.1f}" if how in row else "" for how in ("planned", "allocated", "resident"))
    return f"| {case['model']} | {', '.join(words)} | {sizes} | {row['planned'] / row['allocated'] - 1:+.1%} |"


def _in_a_process(case: dict[str, Any], how: str) -> int:
    command = [sys.executable, __file__, "--case", json.dumps(case), "--how", how]
    done = subprocess.run(command, capture_output=True, text=True)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not results:
        raise SystemExit(f"{case} {how}: {done.stderr[-2000:]}")
    return json.loads(results[-1].removeprefix("RESULT "))


def _one(case: dict[str, Any], how: str) -> int:
    if how == "planned":
        from dataclasses import fields

        from crrelu_llm.planning.job import Job, load_config
        from crrelu_llm.planning.plan import plan

        options = {"use_cpu": True, "bf16": False} | {key: value for key, value in case.items() if key != "model"}
        assert options.keys() <= {entry.name for entry in fields(Job)}
        return plan(load_config(case["model"]), Job(**options), 1, 8, 80)["configs"][0]["total"]
    import psutil
    import torch

    from crrelu_llm.bench.allocations import peak_memory
    from crrelu_llm.memory import PeakMemory

    with tempfile.TemporaryDirectory() as folder:
        before = psutil.Process().memory_info().rss
        trainer = _trainer(case, Path(folder))
        if how == "resident":
            with PeakMemory() as peak:
                trainer.train()
            return peak.bytes - before
        models = [trainer.model, *([trainer.ref_model] if getattr(trainer, "ref_model", None) else [])]
        held = {t.untyped_storage() for model in models for t in (*model.parameters(), *model.buffers())}
        return sum(storage.nbytes() for storage in held) + peak_memory(trainer.train, torch.device("cpu"))


def _trainer(case: dict[str, Any], folder: Path) -> Any:
    """The trainer of a recipe whose every batch has rows of max_length and shorter ones, so that it is padded."""
    import yaml

    from crrelu_llm.training.arguments import parse
    from crrelu_llm.training.prepare import datasets_of, starting_checkpoint
    from crrelu_llm.training.trainers import build_trainer

    case = dict(case)
    kind, model, activation = case.pop("trainer", "sft"), case.pop("model"), case.pop("activation", "crrelu")
    count = case["per_device_train_batch_size"] * case.get("gradient_accumulation_steps", 1)
    long = " ".join(f"number {index}" for index in range(case["max_length"]))
    texts = [long if index % 2 == 0 else long[: len(long) // 12] for index in range(count)]
    rows = [{"text": text} for text in texts]
    if kind == "dpo":
        rows = [
            {"prompt": "Count.", "chosen": " " + text, "rejected": " " + text[: len(text) // 12]} for text in texts
        ]
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model_name_or_path": model, "dataset_name": str(folder / "data"), "output_dir": str(folder / "out"),
        "max_steps": 2, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "lora_target_modules": "all-linear", "calibration": "none", "dtype": "float32",
    } | case | ({} if activation == "native" else {"activation": activation})  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    recipe = parse(kind, ["--config", str(folder / "recipe.yaml")])
    train, _ = datasets_of(recipe)
    start = starting_checkpoint(model, recipe.activation.patch_config(), folder / "patched")
    return build_trainer(recipe, start, train, None)


if __name__ == "__main__":
    main()
