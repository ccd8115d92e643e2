"""Kernels that replace whole MLPs: a swap is never lost silently."""

import subprocess
import sys
from types import MethodType

import kernel_fakes
import pytest
import torch
import transformers
from families import family_model
from kernel_fakes import replace_mlps
from peft import LoraConfig, get_peft_model
from tiny import logits, tiny_model
from transformers import AutoModelForCausalLM, modeling_utils
from transformers.integrations import liger

from crrelu_llm import patch
from crrelu_llm.errors import InputError
from crrelu_llm.patching import guard


def refused(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_model_with_such_kernels_is_not_patched():
    model = tiny_model("llama")
    replace_mlps(model)
    before = logits(model)
    refused(
        lambda: patch(model, calibration="none"),
        r"model\.layers\.0\.mlp: a kernel library has replaced the forward of LlamaMLP",
    )
    assert not hasattr(model.config, "crrelu")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("adapters", [False, True])
def test_such_kernels_in_a_patched_model_are_noticed(adapters):
    base = tiny_model("llama")
    patch(base, calibration="none")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2)) if adapters else base
    guard.check(model)
    replace_mlps(base)
    refused(lambda: guard.check(model), "kernel library has replaced the forward of LlamaMLP")


def test_a_replaced_layer_counts_too_and_other_modules_do_not():
    model = tiny_model("llama")
    patch(model, calibration="none")
    norm = model.model.norm
    norm.forward = MethodType(lambda self, x: x, norm)
    layer_norm = model.model.layers[0].input_layernorm
    layer_norm.forward = MethodType(lambda self, x: x, layer_norm)
    guard.check(model)
    layer = model.model.layers[1]
    layer.forward = MethodType(lambda self, x, *args, **kwargs: x, layer)
    refused(lambda: guard.check(model), r"model\.layers\.1: a kernel library has replaced the forward of LlamaDecoder")


def test_unpatched_models_may_have_any_kernel():
    model = tiny_model("llama")
    replace_mlps(model)
    guard.check(model)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_that_choose_their_activation_by_name_are_refused(family):
    model = family_model(family)
    for name in ("eager", "batched_mm", "grouped_mm"):
        model.config._experts_implementation_internal = name
        guard.check_forwards(model, ["model.layers.0.mlp.experts.act_fn"])
    model.config._experts_implementation_internal = "sonicmoe"
    refused(
        lambda: patch(model, calibration="none"),
        "the experts implementation sonicmoe does not call the activation module",
    )


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "hy_v4"])
def test_every_other_experts_implementation_computes_the_new_activation(family):
    model = family_model(family)
    patch(model, epsilon_init=0.5, calibration="none")
    found = {}
    for name in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(name)
        found[name] = logits(model, torch.arange(3, 19)[None])
    for name in ("batched_mm", "grouped_mm"):
        torch.testing.assert_close(found[name], found["eager"], rtol=1e-4, atol=1e-5)


@pytest.fixture
def hub_kernels(monkeypatch):
    """transformers' `use_kernels` with a kernel for whole MLPs, without the kernels package and without a hub."""
    if not hasattr(modeling_utils, "kernelize"):
        pytest.skip(f"transformers {transformers.__version__} puts kernels into a model by another function")
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr("transformers.integrations.hub_kernels.register_kernel_mapping_transformers", lambda: None)
    monkeypatch.setattr(modeling_utils, "kernelize", lambda model, mode=None: replace_mlps(model))


def test_use_kernels_is_refused_where_it_replaces_mlps(hub_kernels, tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "native")
    patch(model, calibration="none")
    model.save_pretrained(tmp_path / "patched")
    AutoModelForCausalLM.from_pretrained(tmp_path / "native", use_kernels=True)
    refused(
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "patched", use_kernels=True),
        "kernel library has replaced",
    )
    refused(lambda: model.set_use_kernels(True), "kernel library has replaced")


@pytest.fixture
def fake_liger(monkeypatch):
    """The calls of a stand-in for Liger."""
    return kernel_fakes.install_liger(monkeypatch)


@pytest.mark.parametrize("adapters", [False, True])
def test_liger_leaves_the_mlps_of_a_patched_model_alone(adapters, fake_liger, caplog):
    model = tiny_model("llama")
    patch(model, epsilon_init=0.3, calibration="none")
    before = logits(model)
    if adapters:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).eval()
    liger.apply_liger_kernel(model, {"rms_norm": False})
    assert fake_liger == [{"rms_norm": False, "swiglu": False, "geglu": False, "relu_squared": False}]
    assert torch.equal(logits(model), before)
    assert "the MLPs keep their swapped activation" in caplog.text


def test_liger_is_used_whole_on_other_models(fake_liger):
    liger.apply_liger_kernel(tiny_model("llama"), None)
    assert fake_liger == [{"swiglu": True, "rms_norm": True}]


def test_liger_mlp_kernels_that_are_asked_for_are_refused(fake_liger):
    model = tiny_model("llama")
    patch(model, calibration="none")
    refused(
        lambda: liger.apply_liger_kernel(model, {"swiglu": True}),
        "liger_kernel_config: swiglu: true replaces the MLPs",
    )
    assert fake_liger == []


def test_liger_kernels_under_another_name_are_noticed(fake_liger, monkeypatch):
    """A later Liger may call its option something else."""
    package = sys.modules["liger_kernel.transformers"]
    monkeypatch.setattr(package, "_apply_liger_kernel_to_instance", lambda model, **options: replace_mlps(model))
    model = tiny_model("llama")
    patch(model, calibration="none")
    refused(lambda: liger.apply_liger_kernel(model, None), "kernel library has replaced")


def test_the_trainer_uses_the_guarded_function():
    import transformers.trainer

    assert transformers.trainer.apply_liger_kernel is liger.apply_liger_kernel
    assert hasattr(liger.apply_liger_kernel, "__wrapped__")


@pytest.mark.slow
def test_a_trainer_that_was_imported_earlier_uses_it_too():
    code = "import transformers.trainer as t, crrelu_llm; print(hasattr(t.apply_liger_kernel, '__wrapped__'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
