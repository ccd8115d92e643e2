"""Patch and unpatch in memory: what is swapped, what ε is, what is refused, and that everything can be undone."""

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, logits, tiny_model, token_ids
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from crrelu_llm import CRReLU, PatchConfig, find_sites, patch, unpatch
from crrelu_llm.errors import InputError


def tree(model):
    """Every module's type by its path."""
    return {path: type(module) for path, module in model.named_modules(remove_duplicate=False)}


def activations(model):
    """The activations of a model by their path, in the order of its layers."""
    return {site.path: model.get_submodule(site.path) for site in find_sites(model)}


@pytest.mark.parametrize("epsilon_per", ["layer", "channel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_swapped_and_learns(family, epsilon_per):
    model = tiny_model(family)
    before, sites = logits(model), find_sites(model)
    patch(model, epsilon_per=epsilon_per, epsilon_init=0.25, calibration="none")
    assert not torch.allclose(logits(model), before)
    for site in sites:
        module = model.get_submodule(site.path)
        assert type(module) is CRReLU
        assert module.epsilon.shape == ((site.num_channels,) if epsilon_per == "channel" else (1,))
        assert module.epsilon.dtype == torch.float32
        assert (module.epsilon == 0.25).all()
    epsilons = [parameter for name, parameter in model.named_parameters() if name.endswith("epsilon")]
    assert len(epsilons) == len(sites) == len({id(epsilon) for epsilon in epsilons})
    ids = torch.arange(3, 97).repeat(2, 1)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(epsilon.grad is not None and epsilon.grad.abs().sum() > 0 for epsilon in epsilons)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["crrelu", "gelu", "relu", "prelu"])
def test_unpatch_restores_modules_config_and_logits(family, name):
    model = tiny_model(family)
    config, modules, before = copy.deepcopy(model.config.to_dict()), tree(model), logits(model)
    keys = list(model.state_dict())
    patch(model, name, calibration="none")
    assert {model.get_submodule(path).__class__ for path in activations(model)} == {
        CRReLU if name == "crrelu" else type(ACT2FN[name])
    }
    unpatch(model)
    assert tree(model) == modules
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ACT2FN)
def test_every_activation_of_transformers_can_be_the_target(name):
    model = tiny_model("llama")
    report = patch(model, name, calibration="none")
    assert type(model.model.layers[0].mlp.act_fn) is type(ACT2FN[name])
    assert torch.isfinite(logits(model)).all()
    expected = pytest.approx(0.01) if name == "crrelu" else None
    assert [site["epsilon_mean"] for site in report.sites] == [expected] * 2
    assert model.config.crrelu["activation"] == name


def test_the_formula_is_what_the_model_computes():
    model = tiny_model("gpt2")
    patch(model, epsilon_init=0.3, calibration="none")
    mlp, x = model.transformer.h[1].mlp, torch.randn(2, 5, 32)
    h = mlp.c_fc(x)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), mlp.c_proj(h.relu() + 0.3 * h * torch.exp(-h * h / 2)))


def test_relu_is_crrelu_without_epsilon():
    one, other = tiny_model("llama"), tiny_model("llama")
    patch(one, "relu", calibration="none")
    patch(other, epsilon_init=0.0, calibration="none")
    assert torch.equal(logits(one), logits(other))


def test_a_swap_for_the_own_activation_changes_nothing():
    model = tiny_model("llama")
    before = logits(model)
    patch(model, "silu", calibration="none")
    assert torch.equal(logits(model), before)


def test_report():
    model = tiny_model("llama")
    report = patch(model, epsilon_init=0.2, epsilon_per="channel", calibration="none")
    assert report.model_type == "llama"
    assert report.config == PatchConfig("crrelu", epsilon_init=0.2, epsilon_per="channel", calibration="none")
    assert [site["path"] for site in report.sites] == ["model.layers.0.mlp.act_fn", "model.layers.1.mlp.act_fn"]
    for site in report.sites:
        assert site["original"] == "silu"
        assert site["num_channels"] == 48
        assert site["epsilon_mean"] == pytest.approx(0.2)
        assert site["scale_mean"] == 1.0
        assert site["relative_error"] is None
    assert report.skipped == []


def test_what_is_left_alone_is_untouched_and_reported():
    config = AutoConfig.for_model(
        "bert", vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2,
        is_decoder=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    report = patch(model, calibration="none")
    assert type(model.cls.predictions.transform.transform_act_fn) is type(ACT2FN["gelu"])
    (skipped,) = report.skipped
    assert skipped["path"] == "cls.predictions.transform.transform_act_fn"
    assert skipped["reason"] == "gelu: inside cls: head"
    # the key reaches the head too, so it must keep its value
    assert model.config.hidden_act == "gelu"
    assert model.config.crrelu["config_keys"] == {}


def test_a_shared_instance_becomes_a_module_for_each_layer():
    config = AutoConfig.for_model("openai-gpt", vocab_size=97, n_embd=32, n_layer=3, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    shared = model.transformer.h[0].mlp.act
    assert model.transformer.h[1].mlp.act is shared
    patch(model, calibration="none")
    assert len({id(module.epsilon) for module in activations(model).values()}) == 3
    unpatch(model)
    assert all(block.mlp.act is shared for block in model.transformer.h)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_epsilon_is_float32_in_a_low_precision_model(dtype):
    model = tiny_model("llama").to(dtype)
    patch(model, calibration="none")
    assert {module.epsilon.dtype for module in activations(model).values()} == {torch.float32}
    found = logits(model)
    assert found.dtype == dtype
    assert torch.isfinite(found).all()


def test_modes_follow_the_model():
    for training in (True, False):
        model = tiny_model("llama").train(training)
        patch(model, calibration="none")
        assert all(module.training is training for module in model.modules())
        unpatch(model)
        assert all(module.training is training for module in model.modules())


def test_a_deep_copy_is_independent():
    model = tiny_model("llama")
    native = logits(model)
    patch(model, epsilon_init=0.3, calibration="none")
    twin, before = copy.deepcopy(model), logits(model)
    with torch.no_grad():
        model.model.layers[0].mlp.act_fn.epsilon.fill_(-0.7)
    assert torch.equal(logits(twin), before)
    assert not torch.equal(logits(model), before)
    unpatch(twin)
    assert torch.equal(logits(twin), native)
    assert not torch.equal(logits(model), native)


def test_a_patched_model_compiles():
    model = tiny_model("llama", num_hidden_layers=1)
    patch(model, epsilon_init=0.3, calibration="none")
    compiled = torch.compile(model, backend="eager")
    ids = token_ids()
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
    compiled(input_ids=ids, labels=ids).loss.backward()
    assert all(module.epsilon.grad.abs().sum() > 0 for module in activations(model).values())


def refused(call, *words):
    """Calls what must raise InputError in one line that holds the words."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("options", [{}, {"epsilon_per": "channel", "epsilon_init": 0.3}])
def test_the_same_patch_twice_is_refused(options):
    model = tiny_model("llama")
    patch(model, **options, calibration="none")
    before = logits(model)
    refused(
        lambda: patch(model, **options, calibration="none"), "the model is already patched to crrelu", "nothing to do"
    )
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "mixtral"])
@pytest.mark.parametrize(
    "second", [{"activation": "gelu"}, {"activation": "prelu"}, {"epsilon_per": "channel"}, {"epsilon_init": 0.4}]
)
def test_another_patch_starts_from_the_original(family, second):
    model, fresh = tiny_model(family), tiny_model(family)
    native = logits(model)
    originals = [site.original for site in find_sites(model)]
    patch(model, epsilon_init=0.2, calibration="none")
    report = patch(model, **second, calibration="none")
    assert report.sites == patch(fresh, **second, calibration="none").sites
    assert [site["original"] for site in report.sites] == originals
    assert model.config.to_dict() == fresh.config.to_dict()
    assert tree(model) == tree(fresh)
    assert torch.equal(logits(model), logits(fresh))
    unpatch(model)
    assert torch.equal(logits(model), native)


def test_a_patch_that_fails_leaves_the_earlier_one():
    model = tiny_model("llama")
    patch(model, epsilon_init=0.3, calibration="none")
    before, modules, config = logits(model), tree(model), copy.deepcopy(model.config.to_dict())
    refused(lambda: patch(model, calibration="fit"), "tokenizer")
    assert (tree(model), model.config.to_dict()) == (modules, config)
    assert torch.equal(logits(model), before)
    assert "act_fn.epsilon" in model._keep_in_fp32_modules_strict
    unpatch(model)
    assert torch.equal(logits(model), logits(tiny_model("llama")))


def test_weights_that_a_calibration_changed_allow_no_other_patch():
    model = tiny_model("llama")
    patch(model, calibration="none")
    model.config.crrelu["weights_changed"] = True
    before = logits(model)
    refused(
        lambda: patch(model, "gelu", calibration="none"),
        "weights were fitted to that",
        "start from the original checkpoint",
    )
    assert torch.equal(logits(model), before)


def test_unpatching_what_is_not_patched_is_refused():
    model = tiny_model("llama")
    refused(lambda: unpatch(model), "not patched")
    patch(model, calibration="none")
    unpatch(model)
    refused(lambda: unpatch(model), "not patched")


def test_adapters_are_refused():
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    refused(lambda: patch(model, calibration="none"), "adapters", "base model")
    assert "silu" in {site.original for site in find_sites(model)}
    base = tiny_model("llama")
    patch(base, calibration="none")
    refused(
        lambda: unpatch(get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2))), "adapters", "base model"
    )


def test_calibration_without_a_tokenizer_is_refused_and_changes_nothing():
    model = tiny_model("llama")
    modules, config = tree(model), model.config.to_dict()
    refused(lambda: patch(model), 'calibration="fit" needs the tokenizer', 'or use the plain swap: calibration="none"')
    assert tree(model) == modules
    assert model.config.to_dict() == config


@settings(max_examples=10)
@given(
    epsilon=st.floats(-3, 3, width=32), epsilon_per=st.sampled_from(["layer", "channel"]), seed=st.integers(0, 2**16)
)
def test_patch_then_unpatch_is_the_identity(epsilon, epsilon_per, seed):
    model = tiny_model("gpt2", seed=seed, n_layer=1)
    before = logits(model)
    patch(model, epsilon_init=epsilon, epsilon_per=epsilon_per, calibration="none")
    assert torch.isfinite(logits(model)).all()
    unpatch(model)
    assert torch.equal(logits(model), before)


def test_patching_is_silent(caplog):
    with caplog.at_level(logging.INFO):
        patch(tiny_model("llama"), calibration="none")
    assert [record for record in caplog.records if record.name.startswith("crrelu_llm")] == []
