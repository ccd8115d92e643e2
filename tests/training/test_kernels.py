"""Training with kernels and with compilation: the swapped activation is what is trained."""

import kernel_fakes
import pytest
import transformers
from runs import losses, trainers_and_methods
from transformers import modeling_utils

from crrelu_llm.errors import InputError
from crrelu_llm.training.arguments import parse

LIGER = {"use_liger_kernel": True, "epsilon_learning_rate": 0.01}


@pytest.fixture
def llama(workshop, tiny_llama_checkpoint):
    """A workshop with the tiny Llama, whose MLPs the stand-in for Liger replaces."""
    workshop.model = str(tiny_llama_checkpoint)
    return workshop


@trainers_and_methods
def test_liger_does_not_undo_the_swap(llama, kind, options, monkeypatch):
    expected = llama.run(kind, "plain", **options, epsilon_learning_rate=0.01)
    calls = kernel_fakes.install_liger(monkeypatch)
    record = llama.run(kind, "liger", **options, **LIGER)
    assert [call["swiglu"] for call in calls] == [False]
    assert losses(record) == losses(expected)
    assert record["epsilon"] == expected["epsilon"]
    assert all(value != record["epsilon_start"][path] for path, value in record["epsilon"].items())


def test_a_checkpoint_patched_earlier_is_guarded_too(llama, monkeypatch):
    llama.run("sft", "first", max_steps=1)
    llama.model = str(llama.folder / "first" / "patched")
    calls = kernel_fakes.install_liger(monkeypatch)
    record = llama.run("sft", "second", **LIGER, activation=None)
    assert [call["swiglu"] for call in calls] == [False]
    assert len(record["epsilon"]) == 2


def test_native_models_get_all_of_liger(llama, monkeypatch):
    calls = kernel_fakes.install_liger(monkeypatch)
    llama.run("sft", "run", use_liger_kernel=True, activation=None)
    assert [call["swiglu"] for call in calls] == [True]


def test_liger_mlp_kernels_are_refused_with_the_recipe(llama):
    argv = llama.argv("sft", "run", use_liger_kernel=True, liger_kernel_config={"swiglu": True})
    with pytest.raises(InputError, match=r"run\.yaml: liger_kernel_config: swiglu: true replaces the MLPs") as caught:
        parse("sft", argv)
    assert "\n" not in str(caught.value)


def test_hub_kernels_for_mlps_are_refused_before_training(llama, monkeypatch):
    if not hasattr(modeling_utils, "kernelize"):
        pytest.skip(f"transformers {transformers.__version__} puts kernels into a model by another function")
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr("transformers.integrations.hub_kernels.register_kernel_mapping_transformers", lambda: None)
    monkeypatch.setattr(modeling_utils, "kernelize", lambda model, mode=None: kernel_fakes.replace_mlps(model))
    with pytest.raises(InputError, match="a kernel library has replaced the forward of LlamaMLP"):
        llama.run("sft", "run", model_init_kwargs={"use_kernels": True})
    assert not (llama.folder / "run" / "run.json").exists()


@pytest.mark.slow  # half a minute or more of a busy core
def test_torch_compile(llama):
    expected = llama.run("sft", "plain", epsilon_learning_rate=0.01)
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    record = llama.run("sft", "compiled", **compiled, epsilon_learning_rate=0.01)
    assert losses(record) == pytest.approx(losses(expected), abs=1e-5)
    assert record["epsilon"] == pytest.approx(expected["epsilon"], abs=1e-6)
    assert all(value != record["epsilon_start"][path] for path, value in record["epsilon"].items())
