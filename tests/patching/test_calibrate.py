"""Calibration: ε equals a weighted least squares done by hand, and fitting leaves no trace in the model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import logits, tiny_model, token_ids
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from crrelu_llm import CRReLU, find_sites, patch, unpatch
from crrelu_llm.data import language_modelling_blocks
from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.perplexity import perplexity
from crrelu_llm.patching import calibrate

BLOCKS = token_ids(6, 40, seed=5)


def fit(model, epsilon_per="layer", blocks=BLOCKS, **options):
    return calibrate.fit_epsilon(model, find_sites(model), blocks, epsilon_per, **options)


# What the activation of layer 1 gets (x) and is multiplied by (u), from the projections of each kind of MLP


def plain(model, outputs):
    x = outputs["transformer.h.1.mlp.c_fc"]
    return x, torch.ones_like(x), model.transformer.h[1].mlp.act


def gated(model, outputs):
    mlp = "model.layers.1.mlp"
    return outputs[f"{mlp}.gate_proj"], outputs[f"{mlp}.up_proj"], model.model.layers[1].mlp.act_fn


def packed(model, outputs):
    return *outputs["model.layers.1.mlp.gate_up_proj"].chunk(2, -1), model.model.layers[1].mlp.activation_fn


def experts(model, outputs):
    module = model.model.layers[1].mlp.experts
    hidden, chosen, _ = outputs["model.layers.1.mlp.experts"]
    pairs = [
        F.linear(token, module.gate_up_proj[expert].double())
        for token, row in zip(hidden.flatten(0, -2), chosen, strict=True)
        for expert in row.tolist()
    ]
    return *torch.stack(pairs).chunk(2, -1), module.act_fn


KINDS = {
    "gpt2": ("transformer.h.1.mlp.act", plain),
    "llama": ("model.layers.1.mlp.act_fn", gated),
    "phi3": ("model.layers.1.mlp.activation_fn", packed),
    "mixtral": ("model.layers.1.mlp.experts.act_fn", experts),
}


@torch.no_grad()
def by_hand(family, model):
    """Weighted bump and weighted residual, `(tokens, channels)` each, and the weighted activation, in float64."""
    outputs = {}

    def keep(path):
        def hook(module, args, output):
            value = args if path.endswith("experts") else output
            outputs[path] = (
                tuple(v.double() if v.is_floating_point() else v for v in value)
                if isinstance(value, tuple)
                else value.double()
            )

        return hook

    hooks = [module.register_forward_hook(keep(path)) for path, module in model.named_modules() if ".1.mlp" in path]
    model(input_ids=BLOCKS)
    for hook in hooks:
        hook.remove()
    x, u, activation = KINDS[family][1](model, outputs)
    x, u = x.reshape(-1, x.shape[-1]), u.reshape(-1, u.shape[-1])
    y = activation(x)
    return u * x * torch.exp(-x * x / 2), u * (y - x.relu()), u * y


def least_squares(columns, target):
    return torch.linalg.lstsq(columns[:, None], target[:, None]).solution.item()


@pytest.mark.parametrize("family", KINDS)
def test_epsilon_per_layer_is_the_least_squares_solution(family):
    model = tiny_model(family)
    bump, residual, output = by_hand(family, model)
    found = fit(model)[KINDS[family][0]]
    expected = least_squares(bump.flatten(), residual.flatten())
    assert found.epsilon.dtype == torch.float32
    assert found.epsilon.tolist() == pytest.approx([expected], rel=1e-4)
    error = (residual - expected * bump).norm() / output.norm()
    assert found.relative_error == pytest.approx(error.item(), rel=1e-3)


@pytest.mark.parametrize("family", KINDS)
def test_epsilon_per_channel_is_the_least_squares_solution(family):
    model = tiny_model(family)
    bump, residual, output = by_hand(family, model)
    found = fit(model, "channel")[KINDS[family][0]]
    # The prior is one more observation for each channel: that its ε is the layer's.
    whole = least_squares(bump.flatten(), residual.flatten())
    weight = (calibrate._PRIOR * bump.square().sum(0).mean()).sqrt()
    expected = torch.tensor(
        [
            least_squares(torch.cat([b, weight[None]]), torch.cat([r, weight[None] * whole]))
            for b, r in zip(bump.T, residual.T, strict=True)
        ]
    )
    torch.testing.assert_close(found.epsilon, expected, rtol=1e-4, atol=1e-5)
    error = (residual - expected.double() * bump).norm() / output.norm()
    assert found.relative_error == pytest.approx(error.item(), rel=1e-3)


@given(planted=st.floats(-2, 2, width=32), family=st.sampled_from(["gpt2", "llama", "phi3", "qwen2_moe"]))
@settings(max_examples=12)
def test_a_planted_epsilon_is_found_again(planted, family):
    model = tiny_model(family)
    patch(model, epsilon_init=planted)
    for found in fit(model).values():
        assert found.epsilon.item() == pytest.approx(planted, abs=1e-4)
        assert found.relative_error < 1e-3


def test_channels_fit_no_worse_than_the_layer():
    model = tiny_model("llama")
    layer, channel = fit(model), fit(model, "channel")
    for path, found in layer.items():
        assert channel[path].relative_error < found.relative_error
        assert channel[path].epsilon.shape == (48,)


def test_dead_channels_take_the_epsilon_of_the_layer():
    model = tiny_model("gpt2")
    dense = model.transformer.h[0].mlp.c_fc
    with torch.no_grad():
        dense.weight[:, :3] = 0
        dense.bias[:3] = torch.tensor([0.0, 60.0, -60.0])  # no input, always on, always off
    layer, channel = (fit(model, per)["transformer.h.0.mlp.act"].epsilon for per in ("layer", "channel"))
    torch.testing.assert_close(channel[:3], layer.expand(3))
    assert channel.abs().max() < 3


def test_a_layer_of_dead_channels_stays_finite():
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.zero_()
        model.transformer.h[0].mlp.c_fc.bias.zero_()
    for per in ("layer", "channel"):
        found = fit(model, per)["transformer.h.0.mlp.act"]
        assert (found.epsilon == 0).all()
        assert found.relative_error == 0


@pytest.mark.parametrize("epsilon_per", ["layer", "channel"])
def test_deterministic_and_independent_of_batches_and_order(epsilon_per):
    model = tiny_model("qwen2_moe")
    first = fit(model, epsilon_per)
    again = fit(model, epsilon_per)
    others = [
        fit(model, epsilon_per, batch_size=1),
        fit(model, epsilon_per, batch_size=6),
        fit(model, epsilon_per, BLOCKS.flip(0)),
    ]
    for path, found in first.items():
        assert torch.equal(again[path].epsilon, found.epsilon)
        assert again[path].relative_error == found.relative_error
        for other in others:
            torch.testing.assert_close(other[path].epsilon, found.epsilon, rtol=1e-4, atol=1e-6)


def state(model):
    """Everything that a fit could leave changed."""
    modules = [(path, id(module), module.training) for path, module in model.named_modules(remove_duplicate=False)]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return modules, hooks, {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one[:2] == other[:2] and all(torch.equal(value, other[2][name]) for name, value in one[2].items())


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_before(training):
    model = tiny_model("gpt2").train(training)
    before = state(model)
    fit(model)
    assert same(state(model), before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_dropout_does_not_reach_the_fit():
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    expected = fit(model)
    for path, found in fit(model.train()).items():
        assert torch.equal(found.epsilon, expected[path].epsilon)


def test_the_model_is_as_before_when_its_forward_fails():
    model = tiny_model("llama").train()
    before = state(model)
    with pytest.raises(IndexError):
        fit(model, blocks=torch.full((1, 8), 1000))  # no such token
    assert same(state(model), before)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(model)
    handle.remove()
    assert same(state(model), before)
    assert torch.isfinite(logits(model.eval())).all()


def test_a_low_precision_model_is_fitted_in_float32():
    model = tiny_model("llama").bfloat16()
    patch(model, epsilon_init=0.3)
    for found in fit(model).values():
        assert found.epsilon.dtype == torch.float32
        assert found.epsilon.item() == pytest.approx(0.3, abs=0.01)


def test_a_fitted_patch_beats_the_plain_one(tiny_llama_checkpoint, text_file):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_checkpoint)
    blocks = language_modelling_blocks(str(text_file), tokenizer, 4096, 128, "test")
    results = {"native": perplexity(model, blocks)}
    for name, options in {
        "plain": {},
        "layer": {"calibration": "fit", "epsilon_per": "layer"},
        "channel": {"calibration": "fit", "epsilon_per": "channel"},
    }.items():
        report = patch(model, tokenizer=tokenizer, calibration_data=str(text_file), **options)
        results[name] = perplexity(model, blocks)
        for site in report.sites:
            module = model.get_submodule(site["path"])
            assert isinstance(module, CRReLU)
            assert site["epsilon_mean"] == pytest.approx(module.epsilon.mean().item())
            assert (site["relative_error"] is None) is (name == "plain")
        unpatch(model)
    assert results["native"] < results["channel"] < results["layer"] < results["plain"]
    assert perplexity(model, blocks) == results["native"]


def test_fitting_another_activation_reads_no_text():
    report = patch(tiny_model("llama"), "gelu", calibration="fit", calibration_data="no/such/file.txt")
    assert [site["relative_error"] for site in report.sites] == [None, None]


def test_missing_or_short_calibration_text_changes_nothing(tokenizer, tmp_path):
    model = tiny_model("llama", vocab_size=len(tokenizer))
    before = state(model)
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    for name, words in ((str(tmp_path / "none.txt"), "no such file"), (str(short), "do not fill one block")):
        with pytest.raises(InputError, match=words) as caught:
            patch(model, calibration="fit", tokenizer=tokenizer, calibration_data=name)
        assert "\n" not in str(caught.value)
        assert same(state(model), before)
        assert not hasattr(model.config, "crrelu")
