"""Distillation: the loss and its gradient by hand, the teacher, gradient accumulation, resume, and mistakes."""

import json
import shutil

import numpy as np
import pytest
import torch
from runs import LORA, losses
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from crrelu_llm.activation import CRReLU
from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.items import evaluate_sft
from crrelu_llm.patching import PatchConfig
from crrelu_llm.patching.transform import ORIGIN, patch_checkpoint
from crrelu_llm.training.run import train_and_save

TURNS = [{"role": "user", "content": "Which tree?"}, {"role": "assistant", "content": "the red one"}]
CHAT = [{"prompt": TURNS[:1], "completion": TURNS[1:]}] * 4


@pytest.fixture
def llama(workshop, tiny_llama_checkpoint):
    """A workshop with a tiny Llama, which has no dropout."""
    workshop.model = str(tiny_llama_checkpoint)
    return workshop


def by_hand(student, teacher, batch, weight):
    """Cross-entropy + weight · KL from full logits, and the KL, means over the labelled tokens, in float64."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    ours = student(**inputs).logits[:, :-1].double().log_softmax(-1)
    with torch.no_grad():
        theirs = teacher(**inputs).logits[:, :-1].double().log_softmax(-1)
    labels = batch["labels"][:, 1:]
    keep = labels != -100
    entropy = -ours.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)[keep].mean()
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)[keep].mean()
    return entropy + weight * divergence, divergence


def first_batch(trainer):
    trainer.model.train()
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def gradients(model):
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("options", [{}, LORA | {"lora_dropout": 0.0}], ids=["full", "lora"])
@pytest.mark.parametrize("data", ["text", "chat"])
def test_loss_and_gradient_are_those_computed_by_hand(llama, options, data):
    if data == "chat":  # only a part of the tokens is trained
        folder = llama.data("sft", train=CHAT, test=CHAT)
        options = options | {"dataset_name": folder}
    _, trainer = llama.trainer("sft", "run", **options, distill_weight=0.7, epsilon_init=0.2)
    teacher = AutoModelForCausalLM.from_pretrained(llama.model)
    batch = first_batch(trainer)
    assert (batch["labels"] == -100).any()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    found = gradients(trainer.model)
    trainer.model.zero_grad()
    wanted, divergence = by_hand(trainer.model, teacher, batch, 0.7)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    # A small sum of differences of logarithms near 6, in float32.
    assert trainer._metrics["train"]["distill_kl"] == [pytest.approx(divergence.item(), rel=1e-4)]
    assert divergence > 1e-4
    expected = gradients(trainer.model)
    assert found.keys() == expected.keys() and any("epsilon" in name for name in found)
    for name, value in expected.items():  # rounding goes with the largest entries
        torch.testing.assert_close(found[name], value, atol=1e-6 * value.abs().max().item(), rtol=1e-4)


def test_a_student_that_is_the_teacher_has_no_divergence(llama):
    """At the first step of a blend the student is the original model."""
    record = llama.run("sft", "run", distill_weight=1.0, blend_steps=2)
    found = [entry["distill_kl"] for entry in record["history"] if "loss" in entry]
    assert found[0] == pytest.approx(0, abs=1e-6) and found[1] > 1e-6
    plain = llama.run("sft", "plain", blend_steps=2)
    assert losses(record)[0] == pytest.approx(losses(plain)[0], abs=1e-6)


def test_the_teacher_is_the_unpatched_model_and_stays_what_it_is(llama):
    recipe, trainer = llama.trainer("sft", "run", distill_weight=1.0, eval_strategy="steps", eval_steps=3)
    teacher = trainer.teacher
    assert not any(isinstance(module, CRReLU) for module in teacher.modules())
    original = AutoModelForCausalLM.from_pretrained(llama.model).state_dict()
    assert not teacher.training
    before, _ = evaluate_sft(trainer)
    record = train_and_save(trainer, recipe)
    assert not teacher.training and not any(value.requires_grad for value in teacher.parameters())
    assert teacher.state_dict().keys() == original.keys()
    assert all(torch.equal(value, original[name]) for name, value in teacher.state_dict().items())
    # Evaluation measures the cross-entropy alone.
    evaluated = next(entry for entry in record["history"] if "eval_loss" in entry)
    assert "eval_distill_kl" not in evaluated
    metrics, _ = evaluate_sft(trainer)
    assert metrics["loss"] != before["loss"]
    saved = load_file(llama.folder / "run" / "model.safetensors")
    plain = llama.run("sft", "plain")
    assert saved.keys() == load_file(llama.folder / "plain" / "model.safetensors").keys()
    assert record["epsilon"] != plain["epsilon"]


def test_distillation_pulls_towards_the_teacher(llama):
    options = {"max_steps": 8, "epsilon_init": 0.2, "lr_scheduler_type": "constant"}
    weak, strong = (llama.run("sft", f"{w}", **options, distill_weight=w) for w in (1e-9, 10.0))
    ends = [run["history"][-1]["distill_kl"] for run in (weak, strong)]
    assert ends[1] < 0.8 * ends[0]


def test_gradient_accumulation_is_a_larger_batch(llama):
    options = {"max_grad_norm": 0, "distill_weight": 2.0, "epsilon_init": 0.2}
    whole = llama.run("sft", "whole", **options, per_device_train_batch_size=8)
    parts = llama.run("sft", "parts", **options, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-5)
    assert parts["epsilon"] == pytest.approx(whole["epsilon"], abs=1e-6)
    ours, theirs = (load_file(llama.folder / name / "model.safetensors") for name in ("whole", "parts"))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_resume(workshop, options):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "distill_weight": 1.0, "blend_steps": 3}
    whole = workshop.run("sft", "whole", **options, **saving)
    checkpoint = str(workshop.folder / "whole" / "checkpoint-2")
    again = workshop.run("sft", "again", **options, **saving, resume_from_checkpoint=checkpoint)
    assert losses(again) == losses(whole)
    assert again["epsilon"] == whole["epsilon"]


@pytest.mark.slow  # half a minute or more of a busy core
def test_packing_gradient_checkpointing_and_compile(llama):
    options = {"distill_weight": 1.0, "max_steps": 2}
    plain = llama.run("sft", "plain", **options)
    for name, extra in (
        ("saving", {"gradient_checkpointing": True}),
        ("compiled", {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    ):
        np.testing.assert_allclose(losses(llama.run("sft", name, **options, **extra)), losses(plain), rtol=1e-5)
    packed = llama.run("sft", "packed", **options, packing=True, packing_strategy="wrapped", eval_packing=False)
    assert all(entry["distill_kl"] > 0 for entry in packed["history"])


def test_label_smoothing_keeps_the_students_hidden_states(llama):
    record = llama.run("sft", "run", distill_weight=1.0, label_smoothing_factor=0.1)
    assert all(entry["distill_kl"] > 0 for entry in record["history"])


class TestTeacherSource:
    """Where the teacher comes from when the run does not start from the original itself."""

    def test_a_patched_checkpoint_names_it(self, llama):
        patch_checkpoint(llama.model, PatchConfig(calibration="none"), llama.folder / "mine")
        plain = llama.run("sft", "plain", distill_weight=1.0)
        record = llama.run("sft", "run", distill_weight=1.0, model_name_or_path=str(llama.folder / "mine"))
        assert losses(record) == losses(plain)

    def test_one_that_does_not_is_refused(self, llama):
        patch_checkpoint(llama.model, PatchConfig(calibration="none"), llama.folder / "mine")
        origin = llama.folder / "mine" / ORIGIN
        named = json.loads(origin.read_text())
        moved = llama.folder / "gone"
        origin.write_text(json.dumps(named | {"model": str(moved)}))
        self.refused(llama, "the original of .* is no longer there: no such directory: .*gone")
        patch_checkpoint(llama.model, PatchConfig(calibration="none"), moved)
        self.refused(llama, "gone, which .*mine was made from, is patched too")
        origin.unlink()
        self.refused(llama, "mine does not name the original; start from the original checkpoint")

    def refused(self, llama, message):
        with pytest.raises(InputError, match=message) as caught:
            llama.run("sft", "run", distill_weight=1.0, model_name_or_path=str(llama.folder / "mine"))
        assert len(str(caught.value).splitlines()) == 1
        shutil.rmtree(llama.folder / "run", ignore_errors=True)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("sft", {"distill_weight": -1.0}, "distill_weight must be 0 or more, not -1.0"),
        ("sft", {"distill_weight": float("nan")}, "distill_weight must be a number, not nan"),
        ("sft", {"distill_weight": 1.0, "activation": None}, "distill_weight needs an activation"),
        ("dpo", {"distill_weight": 1.0}, "distill_weight is for SFT"),
    ],
)
def test_mistakes_are_one_line(workshop, kind, options, message):
    with pytest.raises(InputError, match=message) as caught:
        workshop.run(kind, "run", **options)
    assert len(str(caught.value).splitlines()) == 1
    assert not (workshop.folder / "run").exists()


@pytest.mark.needs("bitsandbytes")
def test_quantised(workshop, tokenizer):
    """The teacher is quantised like the student, so that the divergence is the activation's alone."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, vocab_size=len(tokenizer))
    workshop.model = str(workshop.folder / "llama")
    model.save_pretrained(workshop.model)
    tokenizer.save_pretrained(workshop.model)
    options = LORA | {"load_in_4bit": True, "distill_weight": 1.0, "blend_steps": 2}
    recipe, trainer = workshop.trainer("sft", "run", **options)
    assert trainer.teacher.is_loaded_in_4bit
    record = train_and_save(trainer, recipe)
    found = [entry["distill_kl"] for entry in record["history"]]
    assert found[0] == pytest.approx(0, abs=1e-5) and all(np.isfinite(found))
