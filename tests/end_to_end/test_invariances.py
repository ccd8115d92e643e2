"""What must not change a training: how a batch is split, what is recomputed or compiled, how an adapter is stored.

`python -m pytest -m slow tests/end_to_end/test_invariances.py` prints the largest differences.
"""

import json
from pathlib import Path

import datasets
import pytest
import torch
from launches import launch
from peft import AutoPeftModelForCausalLM
from runs import LORA, Workshop, losses
from safetensors.torch import load_file
from tiny import logits, tiny_model
from transformers import AutoModelForCausalLM

import crrelu_llm

pytestmark = pytest.mark.slow

# Documents of one length; no dropout, so that a batch is the sum of its parts; a run of its own has a batch of 8.
BASE = {
    "max_length": 8,
    "max_steps": 5,
    "per_device_train_batch_size": 8,
    "epsilon_init": 0.2,
    "epsilon_per": "channel",
}
CHANGES = {
    "8 × accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "2 × 4 accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "recompute_activation": {"recompute_activation": True},
    "torch_compile": {"torch_compile": True},
}
# The same operations in the same order on the same numbers: not one bit may differ.
EXACT = {"gradient checkpointing", "reentrant checkpointing", "recompute_activation"}


@pytest.fixture
def workshop(tiny_llama_checkpoint, tmp_path, monkeypatch):
    """A `Workshop` with the tiny Llama."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return Workshop(tmp_path, tiny_llama_checkpoint)


def options(kind, method):
    """The recipe of a trainer and a method, without the model and the data."""
    lora = LORA | {"lora_dropout": 0.0} if method == "lora" else {}
    return BASE | lora | ({"max_length": 48} if kind == "dpo" else {})


def compare(capsys, title, record, other):
    """Prints and returns the largest difference in losses, ε and weights."""
    weights = []
    for name in (record["recipe"]["output_dir"], other["recipe"]["output_dir"]):
        adapter = Path(name) / "adapter_model.safetensors"
        weights.append(load_file(adapter if adapter.is_file() else Path(name) / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys() and len(losses(record)) == len(losses(other)) == BASE["max_steps"]
    loss = max(abs(a - b) for a, b in zip(losses(record), losses(other), strict=True))
    epsilon = max(abs(record["epsilon"][key] - other["epsilon"][key]) for key in other["epsilon"])
    weight = max((weights[0][key] - weights[1][key]).abs().max().item() for key in weights[1])
    with capsys.disabled():
        print(f"\n{title:36} loss {loss:.1e}  epsilon {epsilon:.1e}  weights {weight:.1e}", end="")
    return loss, epsilon, weight


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_batch_however_it_is_made(workshop, capsys, kind, method):
    whole = workshop.run(kind, "whole", **options(kind, method))
    assert len(set(losses(whole))) == BASE["max_steps"]
    for title, change in CHANGES.items():
        if method == "lora" and title == "reentrant checkpointing":
            continue  # nothing that it is given requires a gradient; TRL's default is the other kind
        changed = workshop.run(kind, title.replace(" ", "-"), **(options(kind, method) | change))
        loss, epsilon, weight = compare(capsys, f"{kind} {method}: {title}", changed, whole)
        tolerance = 0.0 if title in EXACT else 1e-5
        assert loss <= tolerance and epsilon <= tolerance and weight <= 30 * tolerance
    two = options(kind, method) | {"per_device_train_batch_size": 4}
    launch(workshop.folder, "ddp", [[kind, *workshop.argv(kind, "two", **two)]])
    changed = json.loads((workshop.folder / "two" / "run.json").read_text())
    assert changed["environment"]["processes"] == 2
    loss, epsilon, weight = compare(capsys, f"{kind} {method}: 2 processes × 4", changed, whole)
    assert loss <= 1e-5 and epsilon <= 1e-5 and weight <= 3e-4


def test_an_adapter_merged_and_unmerged(workshop, capsys):
    workshop.run("sft", "adapter", **options("sft", "lora"))
    model = AutoPeftModelForCausalLM.from_pretrained(workshop.folder / "adapter", dtype=torch.float32).eval()
    unmerged = logits(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(workshop.folder / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(workshop.folder / "merged", dtype=torch.float32).eval()
    differences = [(logits(each) - unmerged).abs().max().item() for each in (merged, reloaded)]
    with capsys.disabled():
        print(f"\nLoRA: logits merged {differences[0]:.1e}, merged and reloaded {differences[1]:.1e}", end="")
    assert max(differences) < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "mixtral"])
@pytest.mark.parametrize("epsilon_per", ["layer", "channel"])
def test_patched_in_memory_and_reloaded(family, epsilon_per, tmp_path):
    model = tiny_model(family)
    crrelu_llm.patch(model, "crrelu", epsilon_per=epsilon_per, epsilon_init=0.3, calibration="none")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("epsilon"):
                parameter.uniform_(-0.5, 0.5)
    before = logits(model)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for parameter in reloaded.parameters():  # read from the file they lie unaligned, where BLAS rounds differently
        parameter.data = parameter.data.clone()
    assert torch.equal(logits(reloaded), before)
