"""The level `fit`: ε equals a weighted least squares done by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, token_ids
from torch.nn import functional as F

from crrelu_llm import CRReLU, find_sites, patch
from crrelu_llm.patching.calibration import calibrate
from crrelu_llm.patching.calibration.epsilon import _PRIOR
from crrelu_llm.patching.config import PatchConfig

BLOCKS = token_ids(6, 40, seed=5)


def fit(model, epsilon_per="layer", blocks=BLOCKS):
    """ε and what was done, for each site, fitted with the other sites as they are; the model is left as it was."""
    config = PatchConfig(calibration="fit", epsilon_per=epsilon_per)
    found = {}
    for site in find_sites(model):
        original = model.get_submodule(site.path)
        owner = model.get_submodule(site.owner)

        def swap(site, module, owner=owner):
            setattr(owner, site.attribute, module)

        def build(site):
            return CRReLU(site.num_channels if epsilon_per == "channel" else None)

        try:
            done = calibrate(model, [site], blocks, config, build, swap)
            found[site.path] = model.get_submodule(site.path).epsilon.detach(), done[site.path]
        finally:
            setattr(owner, site.attribute, original)
    return found


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
    epsilon, done = fit(model)[KINDS[family][0]]
    expected = least_squares(bump.flatten(), residual.flatten())
    assert epsilon.dtype == torch.float32
    assert epsilon.tolist() == pytest.approx([expected], rel=1e-4)
    error = (residual - expected * bump).norm() / output.norm()
    assert done.relative_error == pytest.approx(error.item(), rel=1e-3)
    naive = (residual - 0.01 * bump).norm() / output.norm()
    assert done.relative_error_naive == pytest.approx(naive.item(), rel=1e-3)
    assert done.kept == "fit" and not done.changed_weights


@pytest.mark.parametrize("family", KINDS)
def test_epsilon_per_channel_is_the_least_squares_solution(family):
    model = tiny_model(family)
    bump, residual, output = by_hand(family, model)
    epsilon, done = fit(model, "channel")[KINDS[family][0]]
    # The prior is one more observation for each channel: that its ε is the layer's.
    whole = least_squares(bump.flatten(), residual.flatten())
    weight = (_PRIOR * bump.square().sum(0).mean()).sqrt()
    expected = torch.tensor(
        [
            least_squares(torch.cat([b, weight[None]]), torch.cat([r, weight[None] * whole]))
            for b, r in zip(bump.T, residual.T, strict=True)
        ]
    )
    torch.testing.assert_close(epsilon, expected, rtol=1e-4, atol=1e-5)
    error = (residual - expected.double() * bump).norm() / output.norm()
    assert done.relative_error == pytest.approx(error.item(), rel=1e-3)


@given(planted=st.floats(-2, 2, width=32), family=st.sampled_from(["gpt2", "llama", "phi3", "qwen2_moe"]))
@settings(max_examples=12)
def test_a_planted_epsilon_is_found_again(planted, family):
    model = tiny_model(family)
    patch(model, epsilon_init=planted)
    for epsilon, done in fit(model).values():
        assert epsilon.item() == pytest.approx(planted, abs=1e-4)
        assert done.relative_error < 1e-3


def test_channels_fit_no_worse_than_the_layer():
    model = tiny_model("llama")
    layer, channel = fit(model), fit(model, "channel")
    for path, (_, done) in layer.items():
        assert channel[path][1].relative_error < done.relative_error
        assert channel[path][0].shape == (48,)


def test_dead_channels_take_the_epsilon_of_the_layer():
    model = tiny_model("gpt2")
    dense = model.transformer.h[0].mlp.c_fc
    with torch.no_grad():
        dense.weight[:, :3] = 0
        dense.bias[:3] = torch.tensor([0.0, 60.0, -60.0])  # no input, always on, always off
    layer, channel = (fit(model, per)["transformer.h.0.mlp.act"][0] for per in ("layer", "channel"))
    torch.testing.assert_close(channel[:3], layer.expand(3))
    assert channel.abs().max() < 3


def test_a_layer_of_dead_channels_stays_finite():
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.zero_()
        model.transformer.h[0].mlp.c_fc.bias.zero_()
    for per in ("layer", "channel"):
        epsilon, done = fit(model, per)["transformer.h.0.mlp.act"]
        assert (epsilon == 0.01).all()  # nothing was seen, nothing was changed
        assert done.relative_error == 0


def test_a_low_precision_model_is_fitted_in_float32():
    model = tiny_model("llama").bfloat16()
    patch(model, epsilon_init=0.3)
    for epsilon, _ in fit(model).values():
        assert epsilon.dtype == torch.float32
        assert epsilon.item() == pytest.approx(0.3, abs=0.01)


def test_fitting_another_activation_reads_no_text():
    report = patch(tiny_model("llama"), "gelu", calibration="fit", calibration_data="no/such/file.txt")
    assert [site["relative_error"] for site in report.sites] == [None, None]
