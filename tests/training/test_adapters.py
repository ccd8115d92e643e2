"""LoRA and QLoRA: ε is trained, saved and reloaded with the adapter, and the base model stays what it was."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from runs import LORA, losses
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from crrelu_llm.activation import AFFINE, CRReLU
from crrelu_llm.evaluation.items import evaluate_sft
from crrelu_llm.patching import section
from crrelu_llm.training.optimizer import affine_modules, epsilon_modules
from crrelu_llm.training.run import train_and_save

IDS = torch.arange(6, 30).view(2, 12)
START = torch.tensor([0.01])
QLORA = LORA | {"load_in_4bit": True, "epsilon_learning_rate": 0.01}


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def quantisable(workshop, tokenizer):
    """A workshop with a tiny Llama whose sizes are multiples of 64, as 4-bit layers need."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra: quant")
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, vocab_size=len(tokenizer))
    workshop.model = str(workshop.folder / "llama")
    model.save_pretrained(workshop.model)
    tokenizer.save_pretrained(workshop.model)
    return workshop


@pytest.fixture(params=["sft", "dpo"])
def trained(request, workshop):
    """A trainer after a LoRA run, its base model's logits before the run, and where it was saved."""
    recipe, trainer = workshop.trainer(request.param, "run", **LORA)
    base = logits(AutoModelForCausalLM.from_pretrained(workshop.folder / "run" / "patched"))
    assert torch.equal(logits(trainer.model), base)
    trainer.model.train()
    record = train_and_save(trainer, recipe)
    assert all(abs(value - 0.01) > 1e-5 for value in record["epsilon"].values())
    return trainer, base, workshop.folder / "run"


def test_the_adapter_holds_epsilon_and_reloads(trained):
    trainer, base, output = trained
    saved = load_file(output / "adapter_model.safetensors")
    found = {name: value for name, value in saved.items() if "epsilon" in name}
    modules = epsilon_modules(trainer.model)
    assert sorted(found) == [f"base_model.model.{path}.epsilon" for path in sorted(modules)]
    for path, module in modules.items():
        value = found[f"base_model.model.{path}.epsilon"]
        assert value.dtype == torch.float32
        assert torch.equal(value, module.epsilon.detach())
    reloaded = AutoPeftModelForCausalLM.from_pretrained(output)
    assert torch.equal(logits(reloaded), logits(trainer.model))
    assert not torch.equal(logits(reloaded), base)


def test_without_the_adapter_the_base_model_is_untouched(trained):
    trainer, base, _ = trained
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), base)


def test_merging_keeps_epsilon(trained, tmp_path):
    trainer, _, output = trained
    wanted = logits(trainer.model)
    epsilon = {path: module.epsilon.detach().clone() for path, module in epsilon_modules(trainer.model).items()}
    merged = AutoPeftModelForCausalLM.from_pretrained(output).merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(reloaded), logits(merged))
    assert [site["path"] for site in section.read(reloaded.config)["sites"]] == list(epsilon)
    for path, value in epsilon.items():
        assert type(reloaded.get_submodule(path)) is CRReLU
        assert torch.equal(reloaded.get_submodule(path).epsilon, value)


def test_a_frozen_epsilon_is_left_to_the_base_model(workshop):
    workshop.run("sft", "run", **LORA, epsilon_learning_rate=0)
    saved = load_file(workshop.folder / "run" / "adapter_model.safetensors")
    assert not any("epsilon" in name for name in saved)


def test_lora_without_an_activation(workshop):
    record = workshop.run("sft", "run", **LORA, activation=None)
    assert record["epsilon"] == {}
    assert AutoPeftModelForCausalLM.from_pretrained(workshop.folder / "run") is not None


def test_own_modules_to_save_are_kept(workshop):
    workshop.run("sft", "run", **LORA | {"lora_target_modules": ["c_attn", "c_proj"]}, lora_modules_to_save=["ln_f"])
    saved = load_file(workshop.folder / "run" / "adapter_model.safetensors")
    assert sum("epsilon" in name for name in saved) == 2
    assert any("ln_f" in name for name in saved)


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}], ids=["adapter off", "precomputed"])
def test_dpo_with_lora_starts_at_ln_2(workshop, options):
    record = workshop.run("dpo", "run", **LORA, **options)
    assert losses(record)[0] == pytest.approx(0.6931472, abs=1e-5)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_qlora_trains_epsilon_in_float32(quantisable, kind):
    recipe, trainer = quantisable.trainer(kind, "run", **QLORA)
    modules = epsilon_modules(trainer.model)
    assert len(modules) == 2
    for module in modules.values():
        assert module.epsilon.dtype == torch.float32
        assert torch.equal(module.epsilon.detach(), START)  # bf16 would make it 0.010009766
        assert module.epsilon.requires_grad
    record = train_and_save(trainer, recipe)
    assert {module.epsilon.dtype for module in modules.values()} == {torch.float32}
    assert all(abs(value - 0.01) > 1e-4 for value in record["epsilon"].values())
    saved = load_file(quantisable.folder / "run" / "adapter_model.safetensors")
    for path, module in modules.items():
        assert torch.equal(saved[f"base_model.model.{path}.epsilon"], module.epsilon.detach())


@pytest.mark.slow
def test_qlora_trains_scale_shift_gain_and_offset_in_float32(quantisable, text_file, tmp_path):
    asked = {"calibration": "fit", "calibration_data": str(text_file), "calibration_tokens": 2048}
    recipe, trainer = quantisable.trainer("dpo", "run", **QLORA, **asked, affine_learning_rate=0.02)
    output = quantisable.folder / "run"
    start = load_file(output / "patched" / "model.safetensors")
    for path, module in affine_modules(trainer.model).items():
        for name in AFFINE:  # bf16 would have made them others
            assert torch.equal(getattr(module, name).detach(), start[f"{path}.{name}"])
    train_and_save(trainer, recipe)
    saved = load_file(output / "adapter_model.safetensors")
    for path, module in affine_modules(trainer.model).items():
        for name in AFFINE:
            value = saved[f"base_model.model.{path}.{name}"]
            assert value.dtype == torch.float32 and not torch.equal(value, start[f"{path}.{name}"])
            assert torch.equal(value, getattr(module, name).detach())
    merged = AutoPeftModelForCausalLM.from_pretrained(output).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(
        torch.equal(again[key.removeprefix("base_model.model.")], saved[key])
        for key in saved
        if key.rpartition(".")[2] in AFFINE
    )


def test_recompute_changes_no_bit_of_a_qlora_run(quantisable):
    found = [
        losses(quantisable.run("sft", name, recompute_activation=name == "with", **QLORA))
        for name in ("without", "with")
    ]
    saved = [load_file(quantisable.folder / name / "adapter_model.safetensors") for name in ("without", "with")]
    assert found[0] == found[1]
    assert all(torch.equal(saved[1][name], saved[0][name]) for name in saved[0])


def test_qlora_has_gradients_after_an_evaluation(quantisable, monkeypatch):
    """On CPUs with AVX512-BF16, a forward pass in evaluation mode repacks 4-bit weights for good, unless forbidden."""
    from bitsandbytes.nn import modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    _, trainer = quantisable.trainer("sft", "run", **QLORA)
    layers = [module for module in trainer.model.modules() if isinstance(module, modules.Linear4bit)]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    evaluate_sft(trainer)
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, batch).backward()
    gradients = {
        name: parameter.grad for name, parameter in trainer.model.named_parameters() if parameter.requires_grad
    }
    # LoRA's B is zero at the start, so that A has no gradient yet
    assert all(gradient is not None for gradient in gradients.values())
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items() if "lora_A" not in name)


def test_a_qlora_adapter_reloads_on_the_quantised_base(quantisable, monkeypatch):
    # The kernel that training forbids rounds differently, so the comparison forbids it too
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    recipe, trainer = quantisable.trainer("sft", "run", **QLORA)
    train_and_save(trainer, recipe)
    config = trainer.model.get_base_model().config.quantization_config
    assert isinstance(config, BitsAndBytesConfig)
    reloaded = AutoPeftModelForCausalLM.from_pretrained(quantisable.folder / "run", quantization_config=config)
    modules = epsilon_modules(reloaded)
    for path, module in epsilon_modules(trainer.model).items():
        assert torch.equal(modules[path].epsilon, module.epsilon)
        assert modules[path].epsilon.dtype == torch.float32
    for name, parameter in reloaded.named_parameters():
        if "lora_" in name:  # TRL trains them in bf16, PEFT reloads them in float32
            parameter.data = parameter.data.bfloat16()
    assert torch.equal(logits(reloaded), logits(trainer.model))
