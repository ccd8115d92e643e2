"""Prints the table "Scale" of recipes/README.md: `crrelu plan` for models that are nothing but a config.

python eval/results/2026-11-24-plan/scale.py

The sizes are those that the models' own config.json files have.
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from crrelu_llm.cli.main import main

_LLAMA3 = {"vocab_size": 128256, "max_position_embeddings": 8192, "num_key_value_heads": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M": ("llama", {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}),
    "Qwen3-0.6B": ("qwen3", {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": True}),
    "Llama-3.2-1B": ("llama", _LLAMA3 | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "head_dim": 64, "tie_word_embeddings": True}),
    "Llama-3-8B": ("llama", _LLAMA3 | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32}),
    "Llama-3-70B": ("llama", _LLAMA3 | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64}),
}  # fmt: skip
FULL, LORA, QLORA = (), ("--use_peft",), ("--use_peft", "--load_in_4bit", "--dtype", "bfloat16")
DPO = ("--trainer", "dpo", "--per_device_train_batch_size", "4")
CASES: list[tuple[str, int, str, tuple[str, ...]]] = [
    ("SmolLM2-135M", 1, "SFT", FULL), ("SmolLM2-135M", 8, "SFT", FULL),
    ("Qwen3-0.6B", 1, "SFT", FULL), ("Qwen3-0.6B", 1, "DPO", DPO), ("Qwen3-0.6B", 8, "SFT", FULL),
    ("Llama-3.2-1B", 1, "SFT", FULL), ("Llama-3.2-1B", 8, "SFT", FULL), ("Llama-3.2-1B", 8, "DPO", DPO),
    ("Llama-3-8B", 1, "SFT, LoRA", LORA), ("Llama-3-8B", 1, "SFT, QLoRA", QLORA), ("Llama-3-8B", 8, "SFT", FULL),
    ("Llama-3-8B", 8, "DPO", DPO), ("Llama-3-8B", 16, "SFT", FULL),
    ("Llama-3-70B", 1, "SFT, QLoRA", QLORA), ("Llama-3-70B", 8, "SFT, LoRA", LORA), ("Llama-3-70B", 16, "SFT", FULL),
    ("Llama-3-70B", 64, "SFT", FULL), ("Llama-3-70B", 64, "DPO", DPO),
]  # fmt: skip


def table() -> None:
    print("| model | GPUs | what | config | weights | gradients | optimiser | reference | buffers | activations | "
          "total | without checkpointing: activations | … with recompute |\n|" + "---|" * 13)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name, gpus, what, options in CASES:
            path = Path(folder) / f"{name}.json"
            kind, sizes = MODELS[name]
            AutoConfig.for_model(kind, **sizes).to_json_file(path)
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                status = main(["plan", str(path), "--gpus", str(gpus), "--json", *options])
            if status:
                sys.exit(status)
            print(_row(name, what, json.loads(printed.getvalue())), flush=True)


def _row(name: str, what: str, plan: dict[str, Any]) -> str:
    chosen = plan["recommended"]
    row = next((row for row in plan["configs"] if row["config"] == chosen), None)
    row = row or min(plan["configs"], key=lambda row: row["total"])
    config = f"`{row['config']}`" + ("" if chosen else " (nothing leaves a tenth free)")
    parts = ("weights", "gradients", "optimizer", "reference", "buffers", "activations", "total")
    free = {entry["recompute_activation"]: entry["bytes"] for entry in plan["activations"]
            if not entry["gradient_checkpointing"]}  # fmt: skip
    sizes = [_gib(row[part]) for part in parts] + [_gib(free[False]), _gib(free[True])]
    return f"| {name} | {plan['gpus']} | {what} | {config} | {' | '.join(sizes)} |"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


if __name__ == "__main__":
    table()
