"""Training a model whose centres and widths are fitted: they stay what they are, float32, and are saved with ε."""

from types import SimpleNamespace

import accelerate.accelerator
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from runs import LORA
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from crrelu_llm import PatchConfig
from crrelu_llm.compat.accelerate import sharding
from crrelu_llm.errors import InputError
from crrelu_llm.fitted_activation import FittedCRReLU
from crrelu_llm.patching import section
from crrelu_llm.training import processes
from crrelu_llm.training.activation_section import ActivationArguments
from crrelu_llm.training.optimizer import epsilon_modules
from crrelu_llm.training.prepare import starting_checkpoint
from crrelu_llm.training.run import train_and_save

IDS = torch.arange(6, 30).view(2, 12)
FITTED = {"density": "fitted", "calibration": "fit", "epsilon_learning_rate": 0.01}


@pytest.fixture
def options(text_file):
    """The activation section of a recipe, with a little text to fit to."""
    return FITTED | {"calibration_data": str(text_file), "calibration_tokens": 256}


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def moments(folder, ending="model.safetensors"):
    """Centres and widths in a saved file, by their names without what PEFT puts before them."""
    saved = load_file(folder / ending)
    found = {name.removeprefix("base_model.model."): value for name, value in saved.items()}
    return {name: value for name, value in found.items() if name.endswith((".center", ".width"))}


def assert_same(one, other):
    assert one.keys() == other.keys() and len(one) == 4
    for name, value in one.items():
        assert value.dtype == other[name].dtype == torch.float32
        assert torch.equal(value, other[name])


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_sft_moves_epsilon_alone_and_the_checkpoint_reloads(dtype, workshop, options):
    recipe, trainer = workshop.trainer("sft", "run", dtype=dtype, **options)
    start = moments(workshop.folder / "run" / "patched")
    assert all(value.item() not in (0.0, 1.0) for value in start.values())
    record = train_and_save(trainer, recipe)
    assert all(abs(value - record["epsilon_start"][path]) > 1e-4 for path, value in record["epsilon"].items())
    assert_same(moments(workshop.folder / "run"), start)
    again = AutoModelForCausalLM.from_pretrained(workshop.folder / "run", dtype=getattr(torch, dtype))
    assert torch.equal(logits(again), logits(trainer.model))


def test_lora_saves_the_moments_beside_epsilon_and_merges_with_them(workshop, options, tmp_path):
    recipe, trainer = workshop.trainer("sft", "run", **options, **LORA)
    output = workshop.folder / "run"
    base = logits(AutoModelForCausalLM.from_pretrained(output / "patched"))
    trainer.model.train()
    train_and_save(trainer, recipe)
    assert_same(moments(output, "adapter_model.safetensors"), moments(output / "patched"))
    wanted = logits(trainer.model)
    reloaded = AutoPeftModelForCausalLM.from_pretrained(output)
    assert torch.equal(logits(reloaded), wanted)
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), base)
    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert_same(moments(tmp_path / "merged"), moments(output / "patched"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged))
    assert section.is_fitted(section.read(again.config))


@pytest.mark.slow
def test_qlora_keeps_all_three_float32(workshop, options):
    recipe, trainer = workshop.trainer("sft", "run", **options, **LORA, load_in_4bit=True)
    start = moments(workshop.folder / "run" / "patched")
    train_and_save(trainer, recipe)
    for path, module in epsilon_modules(trainer.model).items():
        for name in ("epsilon", "center", "width"):
            assert getattr(module, name).dtype == torch.float32
            if name != "epsilon":
                assert torch.equal(getattr(module, name), start[f"{path}.{name}"])
    assert_same(moments(workshop.folder / "run", "adapter_model.safetensors"), start)


def test_it_is_for_crrelu_but_the_arms_of_a_comparison_share_it():
    gelu = ActivationArguments(activation="gelu", density="fitted")
    assert gelu.patch_config().density == "standard"
    assert ActivationArguments(activation="crrelu", density="fitted").patch_config().density == "fitted"
    for section_of_one_run in (gelu, ActivationArguments(density="fitted")):
        with pytest.raises(InputError, match="density: fitted is for CRReLU; set activation: crrelu"):
            section_of_one_run.require_activation("R.yaml: ")
    with pytest.raises(InputError, match='density must be "standard" or "fitted", not "normal"'):
        ActivationArguments(activation="gelu", density="normal").patch_config()


def test_a_checkpoint_of_another_density_is_refused(workshop, options, text_file):
    config = PatchConfig(density="fitted", calibration_data=str(text_file), calibration_tokens=256)
    fitted = starting_checkpoint(workshop.model, config, workshop.folder / "fitted")
    assert starting_checkpoint(fitted, config, workshop.folder / "again") == fitted
    with pytest.raises(InputError, match="already patched with density: fitted; set density to that") as caught:
        starting_checkpoint(fitted, PatchConfig(), workshop.folder / "again")
    assert "\n" not in str(caught.value)


def test_fsdp2_is_given_parameters_alone_and_the_main_process_its_moments(monkeypatch):
    """Accelerate takes whatever is in the state dict for a sharded parameter (tests/distributed runs it)."""
    model, seen = FittedCRReLU(), []

    def prepare(accelerator, model):
        seen.append(sorted(model.state_dict()))
        return model

    monkeypatch.setattr(processes, "fsdp2_prepare_model", prepare)
    monkeypatch.setattr(processes, "broadcast", lambda value: value + 2)  # what the main process has
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    with sharding(processes.shard_fsdp2):
        assert accelerate.accelerator.fsdp2_prepare_model(accelerator, model) is model
    assert accelerate.accelerator.fsdp2_prepare_model is not processes.shard_fsdp2
    assert seen == [["epsilon"]]
    assert sorted(model.state_dict()) == ["center", "epsilon", "width"]
    assert (model.center.item(), model.width.item()) == (2.0, 3.0)
