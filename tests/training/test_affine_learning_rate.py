"""Scale, shift, gain and offset in training: they stay as calibrated or learn, in whole models and in adapters."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from runs import LORA
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from crrelu_llm.activation import AFFINE
from crrelu_llm.errors import InputError
from crrelu_llm.patching import PatchConfig
from crrelu_llm.patching.transform import patch_checkpoint
from crrelu_llm.training.optimizer import affine_modules
from crrelu_llm.training.prepare import starting_checkpoint
from crrelu_llm.training.run import train_and_save

IDS = torch.arange(6, 30).view(2, 12)
STEPS = {"max_steps": 2, "weight_decay": 1.0, "save_strategy": "steps", "save_steps": 1, "calibration": "fit"}
TRAINED = STEPS | {"affine_learning_rate": 0.02}


@pytest.fixture(scope="module")
def calibrated(tiny_checkpoint, text_file, tmp_path_factory):
    """Directories of the tiny GPT-2, calibrated on a little text: by the activation's name."""
    made = {}
    for name in ("crrelu", "prelu"):
        made[name] = tmp_path_factory.mktemp("calibrated") / name
        config = PatchConfig(name, calibration_data=str(text_file), calibration_tokens=2048)
        report = patch_checkpoint(str(tiny_checkpoint), config, made[name])
        assert {site["kept"] for site in report["sites"]} == {"fit"}
    return made


def four(folder, ending="model.safetensors"):
    """Scale, shift, gain and offset in a saved file, by their names without what PEFT puts before them."""
    saved = load_file(folder / ending)
    found = {name.removeprefix("base_model.model."): value for name, value in saved.items()}
    return {name: value for name, value in found.items() if name.rpartition(".")[2] in AFFINE}


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("activation", "options"),
    [
        pytest.param("crrelu", {"gradient_checkpointing": True, "recompute_activation": True}, id="crrelu-full"),
        pytest.param("crrelu", LORA, id="crrelu-lora"),
        pytest.param("prelu", LORA, id="prelu-lora"),
        pytest.param("prelu", {}, id="prelu-full", marks=pytest.mark.slow),
    ],
)
def test_they_learn_are_saved_and_a_resumed_run_repeats_it(activation, options, calibrated, workshop):
    workshop.model = str(calibrated[activation])
    start = four(calibrated[activation])
    recipe, trainer = workshop.trainer("sft", "run", activation=activation, **TRAINED, **options)
    base = logits(trainer.model)
    trainer.model.train()
    train_and_save(trainer, recipe)
    (ours,) = [group for group in trainer.optimizer.param_groups if group["initial_lr"] == 0.02]
    assert ours["weight_decay"] == 0.0
    assert {id(value) for value in ours["params"]} == {
        id(getattr(module, name)) for module in affine_modules(trainer.model).values() for name in AFFINE
    }
    output, weights = workshop.folder / "run", "adapter_model.safetensors" if options is LORA else "model.safetensors"
    saved = four(output, weights)
    assert saved.keys() == start.keys() and len(saved) == 8
    for name, value in saved.items():
        assert value.dtype == torch.float32 and value.shape == (128,)
        assert not torch.equal(value, start[name])
    reloaded = (AutoPeftModelForCausalLM if options is LORA else AutoModelForCausalLM).from_pretrained(output)
    # What learns is computed in several passes, which round as often.
    torch.testing.assert_close(logits(reloaded), logits(trainer.model), atol=1e-5, rtol=1e-5)
    if options is LORA:
        with trainer.model.disable_adapter():  # what DPO compares with
            torch.testing.assert_close(logits(trainer.model), base, atol=1e-5, rtol=1e-5)
        originals = {name.removeprefix("base_model.model."): value for name, value in trainer.model.named_buffers()}
        assert all(torch.equal(originals[name.replace("act.", "act.original_module.")], start[name]) for name in start)
        copies = [name for name, _ in trainer.model.named_parameters() if ".modules_to_save." in name]
        assert not any(name.endswith("activation.weight") for name in copies)  # PReLU's own stays frozen
    resumed = str(output / "checkpoint-1")
    workshop.run("sft", "again", activation=activation, **TRAINED, **options, resume_from_checkpoint=resumed)
    again = load_file(workshop.folder / "again" / weights)
    for name, value in load_file(output / weights).items():
        assert torch.equal(again[name], value)


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_without_a_rate_they_stay_as_calibrated_bit_for_bit(options, calibrated, workshop):
    workshop.model = str(calibrated["crrelu"])
    recipe, trainer = workshop.trainer("sft", "run", **STEPS, **options)
    train_and_save(trainer, recipe)
    modules = affine_modules(trainer.model)
    values = [getattr(module, name) for module in modules.values() for name in AFFINE]
    assert not any(isinstance(value, nn.Parameter) or value.requires_grad for value in values)
    assert all(module.epsilon.requires_grad for module in modules.values())
    start = four(calibrated["crrelu"])
    saved = four(workshop.folder / "run", "adapter_model.safetensors" if options else "model.safetensors")
    assert saved.keys() == start.keys() and len(saved) == 8
    assert all(torch.equal(value, start[name]) for name, value in saved.items())


def test_only_what_is_calibrated_can_learn(workshop, calibrated):
    what = "affine_learning_rate trains scale, shift, gain and offset, which calibration sets, but "
    with pytest.raises(InputError, match=what + "calibration is none; set calibration: fit, or leave"):
        workshop.run("sft", "run", affine_learning_rate=0.01)
    assert not (workshop.folder / "run" / "patched").exists()
    with pytest.raises(InputError, match=what + ".* is not patched; set activation, or leave"):
        workshop.run("sft", "run", affine_learning_rate=0.01, activation=None)
    plain = starting_checkpoint(workshop.model, PatchConfig(calibration="none"), workshop.folder / "plain")
    with pytest.raises(InputError, match=what + ".* was patched with calibration: none; start from the original"):
        starting_checkpoint(plain, PatchConfig(), workshop.folder / "no", trains_affine=True)
    made = str(calibrated["crrelu"])
    for config in (None, PatchConfig(calibration="none")):
        assert starting_checkpoint(made, config, workshop.folder / "no", trains_affine=True) == made


@pytest.mark.parametrize("rate", [-1.0, float("inf")])
def test_a_rate_is_a_number_of_0_or_more(rate, workshop):
    with pytest.raises(InputError, match=f"affine_learning_rate must be 0 or more, not {rate}"):
        workshop.run("sft", "run", affine_learning_rate=rate)


def test_a_reference_that_follows_does_not_go_with_it(workshop):
    with pytest.raises(InputError, match="sync_ref_model does not go with affine_learning_rate"):
        workshop.run("dpo", "run", affine_learning_rate=0.01, calibration="fit", sync_ref_model=True)
