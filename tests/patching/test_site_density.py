"""`density: fitted`: each site's centre and width are its moments, and survive whatever a checkpoint goes through."""

import copy
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import logits, tiny_model, token_ids
from transformers import AutoModelForCausalLM

from crrelu_llm import CRReLU, PatchConfig, patch, unpatch
from crrelu_llm.errors import InputError
from crrelu_llm.fitted_activation import FittedCRReLU
from crrelu_llm.patching.calibration import _Work
from crrelu_llm.patching.calibration.finished_layers import Progress

BLOCKS = token_ids(8, 64, seed=5)
LEVELS = ("none", "fit", "refit")
KEPT = ("epsilon", "center", "width")


def ours(model):
    """The CRReLU modules of a model."""
    return [module for module in model.modules() if isinstance(module, CRReLU)]


def fitted(family="llama", level="none", blocks=BLOCKS, layers=2, **options):
    """A tiny model with fitted centres and widths, and its report's sites."""
    model = tiny_model(family, **({"n_layer": layers} if family == "gpt2" else {"num_hidden_layers": layers}))
    return model, patch(model, density="fitted", calibration=level, blocks=blocks, **options).sites


def same(one, other):
    """Whether two models have the same parameters and buffers, bit for bit."""
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def inputs(model, paths, blocks=BLOCKS):
    """What the activations at `paths` are fed with, as numpy arrays, float64."""
    seen = {path: [] for path in paths}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, path=path: seen[path].append(args[0].detach().double().numpy().ravel())
        )
        for path in paths
    ]
    logits(model, blocks)
    for hook in hooks:
        hook.remove()
    return {path: np.concatenate(arrays) for path, arrays in seen.items()}


@pytest.mark.parametrize("level", ["none", "fit"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_the_moments_are_those_of_the_pre_activations(family, level):
    """A site's input depends on the layers before it alone, so the patched model feeds it what the fit saw."""
    model, sites = fitted(family, level)
    found = inputs(model, [site["path"] for site in sites])
    assert len(sites) == 2 and sites[0]["center"] != sites[1]["center"]
    for site in sites:
        module, values = model.get_submodule(site["path"]), found[site["path"]]
        assert module.center.item() == site["center"] == pytest.approx(values.mean(), abs=1e-5 * values.std())
        assert module.width.item() == site["width"] == pytest.approx(values.std(), rel=1e-5)
        assert (module.center.shape, module.width.shape) == ((1,), (1,))


def test_the_formula_with_the_sites_moments_is_what_the_model_computes():
    model, (site, _) = fitted("llama", epsilon_init=0.3)
    module = model.get_submodule(site["path"])
    x = torch.linspace(-4, 4, 97)
    t = x - site["center"]
    wanted = x.relu() + 0.3 * t * torch.exp(-t * t / (2 * site["width"] ** 2))
    torch.testing.assert_close(module(x), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("family", "level"), [*(("llama", level) for level in LEVELS), ("gpt2", "refit"), ("mixtral", "fit")]
)
def test_every_level_reloads_exactly_and_lowers_the_error(family, level, tmp_path):
    model, sites = fitted(family, level, epsilon_per="channel")
    for site in sites:
        assert site["kept"] == level or site["note"] == "refit was no better on held-back tokens"
        if level == "none":
            assert 0 < site["relative_error"] == site["relative_error_naive"]
        else:
            assert 0 < site["relative_error"] < site["relative_error_naive"]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.config.crrelu == model.config.crrelu
    assert same(model, again)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_config_section_and_unpatch(family):
    native = tiny_model(family)
    before, config = logits(native), native.config.to_dict()
    model = copy.deepcopy(native)
    patch(model, calibration="none")
    assert model.config.crrelu["version"] == 1 and "density" not in model.config.crrelu
    assert not any(name.endswith(("center", "width")) for name in model.state_dict())
    patch(model, density="fitted", blocks=BLOCKS, calibration="none")
    assert (model.config.crrelu["version"], model.config.crrelu["density"]) == (2, "fitted")
    assert all(isinstance(module, FittedCRReLU) for module in ours(model))
    assert not torch.equal(logits(model), before)
    once = copy.deepcopy(model)
    patch(model, density="fitted", blocks=BLOCKS, calibration="none")
    assert same(once, model)
    unpatch(model)
    assert model.config.to_dict() == config
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_three_stay_float32_in_a_model_of_a_lower_dtype(dtype, tmp_path):
    model, _ = fitted(level="fit")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    again.save_pretrained(tmp_path / "again")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)
    for one, other, last in zip(ours(model), ours(again), ours(third), strict=True):
        for name in KEPT:
            assert getattr(other, name).dtype == getattr(last, name).dtype == torch.float32
            assert torch.equal(getattr(one, name), getattr(other, name))
            assert torch.equal(getattr(one, name), getattr(last, name))
    assert torch.equal(logits(third), logits(again))


def test_a_cast_leaves_the_moments_float32():
    model, sites = fitted()
    wanted = [(site["center"], site["width"]) for site in sites]
    for cast in (model.bfloat16, model.half, lambda: model.to(torch.bfloat16), lambda: model.to("cpu"), model.float):
        cast()
        assert [(module.center.item(), module.width.item()) for module in ours(model)] == wanted
        assert {tensor.dtype for module in ours(model) for tensor in module.buffers()} == {torch.float32}
    assert ours(model.double())[0].center.dtype == torch.float64
    assert ours(model.to("meta"))[0].center.is_meta


def test_moments_are_float32_also_where_a_library_makes_new_tensors_bfloat16(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).bfloat16())  # as ZeRO-3 does
    assert {tensor.dtype for tensor in FittedCRReLU().buffers()} == {torch.float32}


@pytest.mark.parametrize(("name", "start"), [("center", 0.0), ("width", 1.0), ("epsilon", 0.05)])
def test_what_a_checkpoint_lacks_starts_anew_and_is_said(name, start, tmp_path, caplog):
    model, _ = fitted(epsilon_init=0.05)
    for module in ours(model):
        module.epsilon.data.fill_(0.3)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.mlp.act_fn.{name}"]
    save_file(tensors, file, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, logger="crrelu_llm"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    (record,) = [record for record in caplog.records if record.name.startswith("crrelu_llm")]
    assert (
        f"no {name} for 1 of its sites (first: model.layers.1.mlp.act_fn); they start at {start:g}" in record.message
    )
    for index, (one, other) in enumerate(zip(ours(model), ours(again), strict=True)):
        for key in KEPT:
            wanted = torch.tensor([start]) if (index, key) == (1, name) else getattr(one, key)
            assert torch.equal(getattr(other, key), wanted)


@pytest.mark.parametrize("level", ["none", "refit"])
def test_an_interrupted_calibration_ends_with_the_same_moments(level, tmp_path, monkeypatch):
    whole, report = fitted(level=level, layers=3)
    on = _Work.on

    def stops(self, where, index, found):
        if index == 2:
            raise KeyboardInterrupt
        on(self, where, index, found)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(_Work, "on", stops)
        fitted(level=level, layers=3, progress=Progress(tmp_path / "kept", {}))
    assert Progress(tmp_path / "kept", {}).layers == 2
    again, resumed = fitted(level=level, layers=3, progress=Progress(tmp_path / "kept", {}))
    assert same(whole, again)
    assert resumed == report


def test_without_epsilon_it_is_relu_and_a_planted_epsilon_is_found():
    native = tiny_model("llama")
    relu = copy.deepcopy(native)
    patch(relu, "relu", calibration="none")
    zero, _ = fitted(epsilon_init=0.0)
    assert torch.equal(logits(zero), logits(relu))
    extreme, sites = fitted(level="fit", epsilon_init=-1.0)
    normal, _ = fitted(level="fit")
    for one, other, site in zip(ours(extreme), ours(normal), sites, strict=True):
        torch.testing.assert_close(one.epsilon, other.epsilon)
        assert site["relative_error"] < site["relative_error_naive"]


def constant(model):
    """Makes every pre-activation of the second layer 0.1."""
    linear = model.transformer.h[1].mlp.c_fc
    linear.weight.data.zero_()
    linear.bias.data.fill_(0.1)


def broken(model):
    """Makes the numbers of one token infinite, which the probe before a calibration does not meet."""
    token = min(set(BLOCKS.flatten().tolist()) - set(BLOCKS[0].tolist()))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # no longer that of wte
    model.transformer.wte.weight.data[token] = float("inf")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"density": "normal"}, 'density must be "standard" or "fitted", not "normal"'),
        ({"activation": "gelu"}, "density: fitted gives crrelu a centre and a width, and gelu has none"),
        ({"blocks": None}, 'density="fitted" needs the tokenizer'),
        ({"blocks": None, "calibration": "fit"}, 'calibration="fit" needs the tokenizer'),
        ({"damage": constant}, "h.1.mlp.act: its pre-activations on the calibration text have mean 0.1 and standard"),
        ({"damage": constant, "calibration": "refit"}, "there is no density to fit; use density: standard"),
        ({"damage": broken}, "h.0.mlp.act: its inputs or outputs on the calibration text are not finite"),
    ],
    ids=["unknown", "not crrelu", "no text", "no text to fit", "constant", "constant, refit", "broken"],
)
def test_refusals_change_nothing(options, said):
    model = tiny_model("gpt2")
    options = {"density": "fitted", "blocks": BLOCKS, "calibration": "none"} | options
    options.pop("damage", lambda model: None)(model)
    before, config = logits(model), model.config.to_dict()
    with pytest.raises(InputError) as caught:
        patch(model, **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert model.config.to_dict() == config
    if options.get("calibration") != "refit":  # which says that the weights of the first layer are changed
        torch.testing.assert_close(logits(model), before, atol=0, rtol=0, equal_nan=True)


def test_options_of_other_activations_read_no_text():
    assert not PatchConfig("gelu", calibration="none").calibrates
    assert PatchConfig(density="fitted", calibration="none").calibrates
    assert not PatchConfig(calibration="none").calibrates
    assert PatchConfig().calibrates
