"""Patched models and what else people do to models: device maps, 4 and 8 bits, adapters, compilation, heads."""

import copy
import logging

import pytest
import torch
from families import IS_RELEASE, family_config, family_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_model, token_ids
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from crrelu_llm import CRReLU, find_sites, patch, unpatch
from crrelu_llm.activation import AFFINE
from crrelu_llm.errors import InputError
from crrelu_llm.patching import guard

IDS = token_ids(2, 16).clamp(max=63)
BLOCKS = token_ids(4, 16, seed=5).clamp(max=63)
# A gated MLP, fused experts, and both kinds of an activation inside a method.
KINDS = ["llama", "mixtral", "lfm2", "gpt_oss"]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def ours(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, CRReLU)}


def randomise(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in ours(model).values():
            module.epsilon.copy_(torch.randn(module.epsilon.shape, generator=generator))


def gradients(model):
    """Whether each ε has a gradient that is not zero."""
    model.train()
    model(input_ids=IDS).logits.float().square().mean().backward()
    return [bool(module.epsilon.grad.abs().max() > 0) for module in ours(model).values()]


def split(model):
    """A device map that leaves all layers but the first on the disk."""
    parts = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    layers = {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(len(model.model.layers))}
    return parts | layers | {"lm_head": "cpu"}


@pytest.mark.parametrize("calibration", ["none", "fit"])
@pytest.mark.parametrize("family", KINDS)
def test_a_model_that_a_device_map_has_spread_out(family, calibration, tmp_path):
    plain = family_model(family)
    plain.save_pretrained(tmp_path / "model")
    native = logits(plain)
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=split(plain), offload_folder=tmp_path / "disk"
    )
    assert any(parameter.is_meta for parameter in spread.parameters())
    for model in (plain, spread):
        patch(model, epsilon_per="channel", epsilon_init=0.3, calibration=calibration, blocks=BLOCKS)
    torch.testing.assert_close(logits(spread), logits(plain))
    assert not torch.allclose(logits(spread), native)
    unpatch(spread)
    torch.testing.assert_close(logits(spread), native)


@pytest.mark.parametrize("family", KINDS)
def test_a_patched_checkpoint_loads_with_a_device_map(family, tmp_path, caplog):
    model = family_model(family)
    native = logits(model)
    patch(model, epsilon_per="channel", calibration="none")
    randomise(model)
    model.save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.WARNING, logger="crrelu_llm"):
        spread = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=split(model), offload_folder=tmp_path / "disk"
        )
    assert [record for record in caplog.records if record.name == "crrelu_llm"] == []  # no epsilon is missing
    torch.testing.assert_close(logits(spread), logits(model))
    if family == "mixtral" and not IS_RELEASE:  # older releases cannot save fused experts that are on the disk
        return
    spread.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(model))
    unpatch(spread)
    torch.testing.assert_close(logits(spread), native)


@pytest.fixture
def trainable_bits(monkeypatch):
    """On CPUs with AVX512-BF16, bitsandbytes would repack 4-bit weights for a kernel without a backward pass."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra: quant")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.mark.parametrize(
    ("bits", "calibration"),
    [
        (4, "fit"),
        (8, "none"),
        pytest.param(4, "none", marks=pytest.mark.slow),
        pytest.param(8, "fit", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", *KINDS])
def test_quantised_base(family, bits, calibration, trainable_bits, tmp_path):
    family_model(family).save_pretrained(tmp_path / "model")
    quantisation = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=quantisation, dtype=torch.float32
    )
    native, sites = logits(model), find_sites(model)
    assert [(site.path, site.num_channels) for site in sites] == [
        (site.path, site.num_channels) for site in find_sites(family_model(family))
    ]
    report = patch(model, epsilon_per="channel", epsilon_init=0.3, calibration=calibration, blocks=BLOCKS)
    assert all((site["relative_error"] is not None) == (calibration == "fit") for site in report.sites)
    assert {module.epsilon.dtype for module in ours(model).values()} == {torch.float32}
    assert len(ours(model)) == len(sites)
    patched = logits(model)
    assert not torch.allclose(patched, native)
    model.save_pretrained(tmp_path / "patched")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "patched", dtype=torch.float32)
    torch.testing.assert_close(logits(again), patched)
    assert all(gradients(again))
    again.eval()
    unpatch(again)
    torch.testing.assert_close(logits(again), native)


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_patched_checkpoint_loads_in_fewer_bits(bits, tmp_path):
    model = family_model("llama")
    patch(model, calibration="none")
    randomise(model)
    model.save_pretrained(tmp_path)
    quantisation = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation, dtype=torch.float32)
    assert any(
        type(module).__name__.startswith("Linear4bit" if bits == 4 else "Linear8bit") for module in again.modules()
    )
    for path, module in ours(model).items():
        assert torch.equal(again.get_submodule(path).epsilon, module.epsilon)


def test_tied_embeddings_stay_tied(tmp_path):
    config = family_config("llama")
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config).eval()
    patch(model, epsilon_per="channel", calibration="none")
    randomise(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))


def test_layers_that_share_their_weights_have_an_epsilon_each(tmp_path):
    model = family_model("zamba")
    patch(model, calibration="none")
    first, second = ours(model).values()
    shared = [model.get_submodule(site.owner).up_proj.weight for site in find_sites(model)]
    assert shared[0] is shared[1]
    assert first.epsilon is not second.epsilon
    randomise(model)
    model.save_pretrained(tmp_path)
    again = ours(AutoModelForCausalLM.from_pretrained(tmp_path)).values()
    assert [module.epsilon.item() for module in again] == [first.epsilon.item(), second.epsilon.item()]
    assert first.epsilon.item() != second.epsilon.item()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "lfm2", "minimax_m3_vl_text"])
def test_compiled_models_compute_and_learn_the_same(family):
    model = family_model(family)
    patch(model, epsilon_init=0.3, calibration="none")
    outputs, learnt = [], []
    for call in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        outputs.append(call(input_ids=IDS).logits)
        outputs[-1].float().square().mean().backward()
        learnt.append([module.epsilon.grad.clone() for module in ours(model).values()])
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(learnt[1], learnt[0], rtol=1e-3, atol=1e-6)
    assert all(gradient.abs().max() > 0 for gradient in learnt[1])


@pytest.mark.parametrize("family", KINDS)
def test_adapters_on_a_patched_base(family):
    model = family_model(family)
    patch(model, epsilon_init=0.3, calibration="none")
    paths = list(ours(model))
    before = logits(model)
    config = LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=paths)
    adapted = get_peft_model(model, config).eval()
    assert torch.equal(logits(adapted), before)
    adapted.train()
    adapted(input_ids=IDS).logits.float().square().mean().backward()
    trained = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    learnt = [gradient for name, gradient in trained.items() if name.endswith("epsilon")]
    assert len(learnt) == len(paths)
    assert all(gradient.abs().max() > 0 for gradient in learnt)
    guard.check(adapted)
    with pytest.raises(InputError, match="the model has adapters: patch the base model"):
        patch(adapted, calibration="none")
    adapted.eval()
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    merged = adapted.merge_and_unload()
    assert set(ours(merged)) == set(paths)
    assert torch.equal(logits(merged), before)


def calibrated(level="fit", activation="crrelu"):
    model = tiny_model("llama")
    patch(model, activation, calibration=level, blocks=token_ids(8, 32, seed=5), epsilon_per="channel")
    return model


def adapted(base, directory, **options):
    """Saves an adapter that does something to `base`; returns the adapted model's logits."""
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"], r=4, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(directory)
    return logits(model.eval())


def test_an_adapter_of_the_original_keeps_its_effect_on_a_calibrated_base(tmp_path):
    native = logits(tiny_model("llama"))
    effect = adapted(tiny_model("llama"), tmp_path) - native
    assert effect.norm() > 0.1 * native.norm()
    base = calibrated()
    before = logits(base)
    found = logits(PeftModel.from_pretrained(base, tmp_path).eval()) - before
    plain = calibrated("none")
    before = logits(plain)
    with_plain = logits(PeftModel.from_pretrained(plain, tmp_path).eval()) - before
    assert (found - effect).norm() < 0.05 * effect.norm()
    assert (found - effect).norm() < 0.2 * (with_plain - effect).norm()


@pytest.mark.parametrize("activation", ["crrelu", "gelu"])
def test_adapters_on_a_calibrated_base(activation, tmp_path):
    wanted = adapted(calibrated(activation=activation), tmp_path, modules_to_save=["act_fn"])
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in names if "act_fn" in name} >= set(AFFINE)
    again = PeftModel.from_pretrained(calibrated(activation=activation), tmp_path).eval()
    torch.testing.assert_close(logits(again), wanted)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_a_calibrated_base_is_refused_on_a_plain_one_and_the_other_way_round(tmp_path):
    adapted(calibrated(), tmp_path / "fit", modules_to_save=["act_fn"])
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.act_fn: the loaded state has scale, shift") as caught:
        PeftModel.from_pretrained(calibrated("none"), tmp_path / "fit")
    assert "\n" not in str(caught.value)
    adapted(calibrated("none"), tmp_path / "none", modules_to_save=["act_fn"])
    with pytest.raises(KeyError, match=r"act_fn\.scale"):  # PEFT's own
        PeftModel.from_pretrained(calibrated(), tmp_path / "none")


def test_numbers_for_a_plain_model_are_refused_also_by_a_load_that_is_not_strict():
    model, plain = calibrated(), calibrated("none")
    with pytest.raises(InputError, match="patched without calibration"):
        plain.load_state_dict(model.state_dict(), strict=False)
    others = {name: value for name, value in model.state_dict().items() if "act_fn" not in name}
    plain.load_state_dict(others | {"something.else.scale": torch.ones(3)}, strict=False)
    model.load_state_dict(plain.state_dict(), strict=False)  # a shard of a checkpoint may hold ε alone
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(plain.state_dict())


HEADS = ["llama", "gpt2", "mixtral", "gpt_oss", "bert"]


def with_head(family, labels):
    """A sequence classifier, or with one label a reward model."""
    config = family_config(family)
    config.num_labels = labels
    config.pad_token_id = 0
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("family", HEADS)
def test_classification_and_reward_models_are_patched_and_reload(family, labels, tmp_path):
    model = with_head(family, labels)
    sites = [site.path for site in find_sites(model)]
    assert sites == [site.path for site in find_sites(family_model(family))]
    native = logits(model)
    patch(model, epsilon_per="channel", calibration="none")
    randomise(model)
    assert list(ours(model)) == sites
    assert not torch.equal(logits(model), native)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for parameter in again.parameters():  # mapped from a file they may lie unaligned, and BLAS then rounds differently
        parameter.data = parameter.data.clone()
    assert logits(again).shape == (2, labels)
    assert torch.equal(logits(again), logits(model))
    assert all(gradients(again))
    unpatch(model)
    assert torch.equal(logits(model), native)


@pytest.mark.parametrize("family", HEADS)
def test_a_reward_model_made_from_a_patched_causal_lm_keeps_the_swap(family, tmp_path):
    model = family_model(family)
    patch(model, epsilon_per="channel", calibration="none")
    randomise(model)
    model.save_pretrained(tmp_path)
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, pad_token_id=0)
    assert list(ours(reward)) == list(ours(model))
    for path, module in ours(model).items():
        assert torch.equal(reward.get_submodule(path).epsilon, module.epsilon)
    assert all(gradients(reward))


@pytest.mark.parametrize("family", KINDS)
def test_a_deep_copy_is_independent(family):
    model = family_model(family)
    native = logits(model)
    patch(model, epsilon_init=0.3, calibration="none")
    twin, patched = copy.deepcopy(model), logits(model)
    randomise(model)
    assert torch.equal(logits(twin), patched)
    unpatch(twin)
    assert torch.equal(logits(twin), native)
    assert not torch.equal(logits(model), native)


@pytest.mark.parametrize("family", KINDS)
def test_another_patch_of_a_reloaded_model(family, tmp_path):
    model = family_model(family)
    patch(model, calibration="none")
    randomise(model)
    model.save_pretrained(tmp_path)
    again, fresh = AutoModelForCausalLM.from_pretrained(tmp_path), family_model(family)
    assert patch(again, "relu", calibration="none").sites == patch(fresh, "relu", calibration="none").sites
    torch.testing.assert_close(logits(again), logits(fresh))
    assert again.config.crrelu == fresh.config.crrelu


def test_original_activations_with_parameters_cannot_be_restored_from_a_checkpoint(tmp_path):
    model = family_model("apertus")
    native = logits(model)
    patch(model, calibration="none")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    patched = logits(again)
    for change in (unpatch, lambda model: patch(model, "gelu", calibration="none")):
        with pytest.raises(InputError, match=r"xielu had its own parameters.*start from the original") as caught:
            change(again)
        assert "\n" not in str(caught.value)
        assert torch.equal(logits(again), patched)
    unpatch(model)  # in memory they are still there
    assert torch.equal(logits(model), native)
