"""ε in the optimiser: a group of its own, untouched by the recipe's weight decay, on the recipe's schedule."""

import numpy as np
import pytest
import torch
from runs import LORA, losses, trainers_and_methods
from torch import nn

from crrelu_llm.activation import CRReLU
from crrelu_llm.compat.peft import site_path
from crrelu_llm.training.optimizer import epsilon_modules, split_off_epsilon


def grouped(trainer):
    """The parameters of each group by name, and the group that holds ε."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in trainer.optimizer.param_groups]
    (ours,) = [
        group
        for group, members in zip(trainer.optimizer.param_groups, groups, strict=True)
        if any("epsilon" in name for name in members)
    ]
    return groups, ours


@trainers_and_methods
def test_epsilon_has_a_group_of_its_own(workshop, kind, options):
    _, trainer = workshop.trainer(kind, "run", **options, weight_decay=5.0, epsilon_learning_rate=0.02)
    trainer.create_optimizer()
    groups, ours = grouped(trainer)
    members = sorted(name for group in groups for name in group)
    assert members == sorted(name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad)
    assert {id(parameter) for parameter in ours["params"]} == {
        id(module.epsilon) for module in epsilon_modules(trainer.model).values()
    }
    assert (ours["lr"], ours["weight_decay"]) == (0.02, 0.0)
    assert {group["lr"] for group in trainer.optimizer.param_groups if group is not ours} == {
        trainer.args.learning_rate
    }
    assert max(group["weight_decay"] for group in trainer.optimizer.param_groups) == 5.0


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_weight_decay_of_the_recipe_leaves_epsilon_alone(workshop, decay):
    _, trainer = workshop.trainer(
        "sft", "run", learning_rate=0.1, weight_decay=2.0, epsilon_learning_rate=0.1, epsilon_weight_decay=decay
    )
    optimizer = trainer.create_optimizer()
    weight = trainer.model.transformer.h[0].mlp.c_fc.weight
    epsilon = trainer.model.transformer.h[0].mlp.act.epsilon
    before = weight.detach().clone()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # without a gradient, only the decay acts
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 2.0))
    torch.testing.assert_close(epsilon.detach(), torch.tensor([0.01 * (1 - 0.1 * decay)]))


def test_the_schedule_moves_the_rate_of_epsilon(workshop):
    _, trainer = workshop.trainer("sft", "run", lr_scheduler_type="linear", epsilon_learning_rate=0.02)
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    _, ours = grouped(trainer)
    rates = []
    for _ in range(4):
        rates.append(ours["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    np.testing.assert_allclose(rates, [0.02, 0.015, 0.01, 0.005])


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_rate_zero_leaves_epsilon_exactly_where_it_starts(workshop, options):
    record = workshop.run("sft", "run", **options, epsilon_learning_rate=0, epsilon_init=0.3, weight_decay=1.0)
    assert record["epsilon"] == record["epsilon_start"] == dict.fromkeys(record["epsilon"], np.float32(0.3))
    assert len(record["epsilon"]) == 2
    assert len(set(losses(record))) == 3  # the rest is trained


def test_rate_zero_keeps_epsilon_out_of_the_optimiser(workshop):
    _, trainer = workshop.trainer("sft", "run", epsilon_learning_rate=0)
    trainer.create_optimizer()
    ours = {id(module.epsilon) for module in epsilon_modules(trainer.model).values()}
    assert not ours & {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}


def test_a_model_without_epsilon_keeps_its_groups():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    split_off_epsilon(optimizer, model, 0.1, 0.0)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "wrapped",
    [
        "base_model.model.layers.0.act",
        "module.layers.0.act",
        "_orig_mod.layers.0.act",
        "layers.0._checkpoint_wrapped_module.act",
        "base_model.model.layers.0.act.modules_to_save.default",
        "base_model.model.layers.0.act.original_module",
        "module.base_model.model.layers.0.act.modules_to_save.default",
        "_fsdp_wrapped_module.layers.0._fsdp_wrapped_module.act",
    ],
)
def test_site_paths_without_wrappers(wrapped):
    assert site_path(wrapped) == "layers.0.act"


def test_the_trained_copy_is_found_under_peft():
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(2, 2), CRReLU())
    wrapped = get_peft_model(model, LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    (path, module), *rest = epsilon_modules(wrapped).items()
    assert (path, rest, module.epsilon.requires_grad) == ("1", [], True)
