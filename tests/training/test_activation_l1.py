"""The L1 term on activations: its value and gradient by hand, what does not count, sparsity, resume, and mistakes."""

import random

import pytest
import torch
from runs import LORA, WORDS, losses
from tiny import tiny_model, token_ids

from crrelu_llm import PatchConfig, patch
from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.sparsity import sparsity_of_trainer
from crrelu_llm.patching.activations import is_ours
from crrelu_llm.training.activation_l1 import ActivationL1
from crrelu_llm.training.run import run_recipe, train_and_save

RELU = {"activation": "relu", "activation_l1": 0.5}


@pytest.fixture
def llama(workshop, tiny_llama_checkpoint):
    """A `Workshop` with the tiny Llama: gated MLPs, no dropout."""
    workshop.model = str(tiny_llama_checkpoint)
    return workshop


def first_batch(trainer):
    trainer.model.train()
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def gradients(model):
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def by_hand(model, inputs, mask=None):
    """The mean of |f| from what enters each activation, in float64, with its gradient; by a model of float64."""
    entered, handles = [], []
    for module in model.modules():
        if is_ours(module):
            handles.append(module.register_forward_pre_hook(lambda m, args: entered.append((m, args[0]))))
    model(**inputs)
    for handle in handles:
        handle.remove()
    means = []
    for module, x in entered:
        if hasattr(module, "epsilon"):
            value = torch.relu(x) + module.epsilon.double() * x * torch.exp(-x * x / 2)
        else:
            value = torch.relu(x)
        means.append((value if mask is None else value[mask.bool()]).abs().mean())
    return sum(means) / len(means)


@pytest.mark.parametrize("activation", ["relu", "crrelu"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_value_and_gradient_are_those_computed_by_hand(family, activation):
    model = tiny_model(family).double().train()
    patch(model, PatchConfig(activation, epsilon_init=0.2, calibration="none"))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    ids = token_ids(3, 10)
    mask = torch.ones_like(ids)
    mask[0, 7:], mask[2, 4:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    flat = family == "opt"  # flattens batch and tokens before the site
    wanted = by_hand(model, inputs, mask.flatten() if flat else mask)
    wanted.backward()
    expected = gradients(model)
    model.zero_grad()
    l1 = ActivationL1(model)
    with l1.collecting():
        model(**inputs)
    found = l1.mean()
    found.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    ours = gradients(model)
    assert ours.keys() == expected.keys() and (activation == "relu" or any("epsilon" in name for name in ours))
    for name, value in expected.items():
        tolerance = 1e-6 if "epsilon" in name else 1e-12  # ε is float32
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=1e-15, msg=name)


def test_references_evaluation_and_repeated_passes_do_not_count():
    values, found = [], []
    for saving in (False, True):
        model = tiny_model("llama").train()
        patch(model, PatchConfig("crrelu", epsilon_init=0.2, calibration="none", recompute_activation=saving))
        if saving:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        l1 = ActivationL1(model)
        with l1.collecting():
            with torch.no_grad():
                model(input_ids=token_ids(2, 5))
            model.eval()(input_ids=token_ids(2, 7))
            output = model.train()(input_ids=token_ids(), labels=token_ids(), use_cache=False)
        value = l1.mean()
        (output.loss + value).backward()
        assert not l1._outputs
        values.append(value)
        found.append(gradients(model))
    assert torch.equal(*values) and values[0] > 0
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("options", [{}, LORA | {"lora_dropout": 0.0}], ids=["full", "lora"])
def test_the_loss_of_a_trainer(llama, options):
    _, trainer = llama.trainer("dpo", "run", **options, activation="crrelu", activation_l1=0.5)
    evaluated = trainer.evaluate()
    batch = first_batch(trainer)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    mean = trainer._metrics["train"]["activation_l1"].pop()
    trainer.l1 = None
    assert trainer.evaluate()["eval_loss"] == evaluated["eval_loss"] and "eval_activation_l1" not in evaluated
    trainer.model.train()
    assert loss.item() == pytest.approx(trainer.compute_loss(trainer.model, dict(batch)).item() + 0.5 * mean, rel=1e-5)
    assert mean > 1e-3


def test_zero_is_no_key(llama):
    plain, zero, drawn = (
        llama.run("sft", name, activation="relu", max_steps=2, **more)
        for name, more in (("plain", {}), ("zero", {"activation_l1": 0}), ("drawn", {"activation_l1": 0.5}))
    )
    assert losses(plain) == losses(zero) and "activation_l1" not in zero["history"][0]
    first = drawn["history"][0]
    assert first["loss"] == pytest.approx(plain["history"][0]["loss"] + 0.5 * first["activation_l1"], abs=2e-4)
    assert losses(drawn)[1] != losses(plain)[1]


def test_micro_batches_are_one_batch(llama):
    """Of SFT, whose loss is divided by the tokens of all of them, and of reward models, whose losses are averaged."""
    ends = {"max_grad_norm": 0, "max_steps": 2, "activation_l1": 20.0, "activation": "relu"}
    rows = [{"text": f"the {' '.join(random.Random(row).sample(WORDS[2:9], 7))}"} for row in range(16)]
    data = llama.data("sft", train=rows)  # of as many tokens each
    for kind, more in (("sft", {"dataset_name": data}), ("reward", {})):
        runs = [
            llama.run(kind, f"{kind}-{size}", **ends | more, per_device_train_batch_size=size,
                      gradient_accumulation_steps=4 // size)
            for size in (4, 1)
        ]  # fmt: skip
        tolerance = 1e-5 if kind == "sft" else 0.02  # rows of several lengths: a mean of means
        assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=tolerance)


def test_it_draws_activations_to_zero(llama):
    options = {"activation": "relu", "max_steps": 30, "lr_scheduler_type": "constant", "learning_rate": 3e-3}
    means, zeros = {}, {}
    for weight in (1e-9, 30.0):
        recipe, trainer = llama.trainer("sft", f"{weight}", **options, activation_l1=weight)
        record = train_and_save(trainer, recipe, save_model=False)
        means[weight] = [entry["activation_l1"] for entry in record["history"] if "loss" in entry]
        zeros[weight] = sparsity_of_trainer(trainer).zeros
    assert means[30.0][0] == pytest.approx(means[1e-9][0], rel=1e-5)
    assert means[30.0][-1] < 0.5 * means[1e-9][-1]
    assert all(zeros[30.0][path] > share + 0.1 for path, share in zeros[1e-9].items()) and len(zeros[30.0]) == 2, zeros


@pytest.mark.parametrize("kind", ["kto", "reward", "grpo"])
def test_every_kind(workshop, kind):
    record = workshop.run(kind, "run", **RELU, max_steps=1)
    assert record["history"][0]["activation_l1"] > 0


def test_a_resume_is_exact(workshop):
    options = RELU | {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "logging_steps": 2}
    options["gradient_checkpointing"] = True
    whole = workshop.run("sft", "whole", **options)
    again = workshop.run("sft", "again", **options, resume_from_checkpoint=str(workshop.folder / "whole/checkpoint-1"))
    logs = [[(e["loss"], e["activation_l1"]) for e in run["history"] if "loss" in e] for run in (whole, again)]
    assert logs[0] == logs[1] and len(logs[0]) == 2


class TestMistakes:
    """One line, and nothing is trained."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"activation_l1": -1}, "activation_l1 must be 0 or more, not -1"),
            ({"activation_l1": "much"}, "activation_l1 must be a number, not 'much'"),
            ({"activation": None}, "activation_l1 is a mean over patched sites; set activation: relu"),
            ({"torch_compile": True}, "leave it or torch_compile out"),
        ],
    )
    def test_at_parse_time(self, workshop, options, message):
        with pytest.raises(InputError) as caught:
            run_recipe("sft", workshop.argv("sft", "run", **RELU | options))
        assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1
        assert not (workshop.folder / "run").exists()

    def test_reentrant_checkpointing(self, workshop):
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        with pytest.raises(InputError, match="use_reentrant: true does not give") as caught:
            workshop.trainer("sft", "run", **RELU, **checkpointing)
        assert len(str(caught.value).splitlines()) == 1

    def test_an_activation_that_no_output_comes_from(self):
        model = tiny_model("llama").train()
        patch(model, PatchConfig("relu", calibration="none"))
        mlp = model.model.layers[1].mlp
        # a kernel that computes the activation in its own way
        mlp.forward = lambda x: mlp.down_proj(torch.relu(mlp.gate_proj(x)) * mlp.up_proj(x))
        l1 = ActivationL1(model)
        with l1.collecting():
            model(input_ids=token_ids())
        with pytest.raises(InputError, match="1 of 2 sites had no output") as caught:
            l1.mean()
        assert "model.layers.1.mlp.act_fn" in str(caught.value) and len(str(caught.value).splitlines()) == 1
