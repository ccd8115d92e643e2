"""Sites: every family's activations are found with the right path, width and kind, and nothing else is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from crrelu_llm.errors import InputError
from crrelu_llm.patching import find_sites
from crrelu_llm.patching.sites import mlp_shape, survey

# family -> path of the activations (# is the layer), their attribute and their original
WHERE = {
    "gpt2": ("transformer.h.#.mlp.act", "gelu_new"),
    "llama": ("model.layers.#.mlp.act_fn", "silu"),
    "mistral": ("model.layers.#.mlp.act_fn", "silu"),
    "qwen3": ("model.layers.#.mlp.act_fn", "silu"),
    "gemma3_text": ("model.layers.#.mlp.act_fn", "gelu_pytorch_tanh"),
    "phi3": ("model.layers.#.mlp.activation_fn", "silu"),
    "gpt_neox": ("gpt_neox.layers.#.mlp.act", "gelu"),
    "opt": ("model.decoder.layers.#.activation_fn", "relu"),
    "bloom": ("transformer.h.#.mlp.gelu_impl", "BloomGelu"),
    "falcon": ("transformer.h.#.mlp.act", "gelu"),
    "mixtral": ("model.layers.#.mlp.experts.act_fn", "silu"),
    "qwen3_moe": ("model.layers.#.mlp.experts.act_fn", "silu"),
}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
# Families whose activations are not all sites: overrides, the sites, what is left alone and why
MIXED = {
    "falcon_h1": (
        SMALL | MAMBA | {"num_hidden_layers": 2, "num_key_value_heads": 2},
        ["model.layers.0.feed_forward.act_fn", "model.layers.1.feed_forward.act_fn"],
        {"model.layers.0.mamba.act": "mamba", "model.layers.1.mamba.act": "mamba"},
    ),
    "bamba": (
        SMALL | MAMBA | {"num_hidden_layers": 2, "num_key_value_heads": 2, "attn_layer_indices": [1]},
        ["model.layers.0.feed_forward.act_fn", "model.layers.1.feed_forward.act_fn"],
        {"model.layers.0.mamba.act": "mamba"},
    ),
    "nemotron_h": (  # the MLP is called mixer, like the state-space layers
        SMALL | {"layers_block_type": ["mamba", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1},
        ["model.layers.1.mixer.act_fn"],
        {"model.layers.0.mixer.act": "convolution"},
    ),
    "roberta-prelayernorm": (
        SMALL | {"num_hidden_layers": 1, "is_decoder": True},
        ["roberta_prelayernorm.encoder.layer.0.intermediate.intermediate_act_fn"],
        {},
    ),
    "deepseek_v4": (
        {"num_hidden_layers": 1, "moe_intermediate_size": 48, "n_routed_experts": 4, "num_experts_per_tok": 2},
        ["model.layers.0.mlp.experts.act_fn", "model.layers.0.mlp.shared_experts.act_fn"],
        {"model.layers.0.mlp.gate.score_fn": "router"},
    ),
    "bert": (
        SMALL | {"num_hidden_layers": 2, "is_decoder": True},
        [
            "bert.encoder.layer.0.intermediate.intermediate_act_fn",
            "bert.encoder.layer.1.intermediate.intermediate_act_fn",
        ],
        {"cls.predictions.transform.transform_act_fn": "head"},
    ),
    "gemma3n_text": (
        SMALL
        | {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8, "num_kv_shared_layers": 0}
        | {"layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0]},
        ["model.layers.0.mlp.act_fn", "model.layers.1.mlp.act_fn"],
        {"model.layers.0.act_fn": "per-layer input gate", "model.layers.1.act_fn": "per-layer input gate"},
    ),
}


def on_meta(family, **overrides):
    """A model of a family without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **overrides))


@pytest.mark.parametrize("family", WHERE)
def test_path_attribute_original_width_and_kind(family):
    path, original = WHERE[family]
    _, count, width, kind = FAMILIES[family]
    model = tiny_model(family)
    sites, left_alone = survey(model)
    assert [site.path for site in sites] == [path.replace("#", str(layer)) for layer in range(count)]
    assert {site.attribute for site in sites} == {path.rpartition(".")[2]}
    assert {site.original for site in sites} == {original}
    assert {(site.num_channels, site.kind) for site in sites} == {(width, kind)}
    assert left_alone == []


def test_shared_experts_are_sites_of_their_own():
    sites = {site.path: (site.num_channels, site.kind) for site in find_sites(tiny_model("qwen2_moe"))}
    for layer in (0, 1):
        assert sites.pop(f"model.layers.{layer}.mlp.experts.act_fn") == (24, "experts")
        assert sites.pop(f"model.layers.{layer}.mlp.shared_expert.act_fn") == (40, "gated")
    assert not sites


@pytest.mark.parametrize("family", FAMILIES)
def test_the_width_is_the_size_of_the_input(family):
    model = tiny_model(family)
    seen = {}
    for site in find_sites(model):
        hook = lambda module, args, path=site.path: seen.update({path: args[0].shape[-1]})  # noqa: E731
        model.get_submodule(site.path).register_forward_pre_hook(hook)
    model(input_ids=torch.arange(3, 63)[None])
    assert seen == {site.path: site.num_channels for site in find_sites(model)}


@pytest.mark.parametrize("family", MIXED)
def test_other_activations_are_left_alone_with_a_reason(family):
    overrides, paths, others = MIXED[family]
    sites, left_alone = survey(on_meta(family, **overrides))
    assert [site.path for site in sites] == paths
    assert {site.num_channels for site in sites} == {48}
    assert {item.path for item in left_alone} == set(others)
    for item in left_alone:
        assert others[item.path] in item.reason
        assert item.activation in ACT2FN


def test_one_instance_for_all_layers_is_a_site_in_each():
    model = on_meta("openai-gpt", vocab_size=97, n_embd=32, n_layer=3, n_head=4)
    assert len({id(model.get_submodule(site.path)) for site in find_sites(model)}) == 1
    assert [site.path for site in find_sites(model)] == [f"transformer.h.{layer}.mlp.act" for layer in range(3)]


def test_a_model_without_an_mlp_is_refused_in_one_line():
    sizes = {"num_heads": 8, "head_dim": 8, "hidden_size": 32, "num_hidden_layers": 1}
    with pytest.raises(InputError, match="model type mamba2 has no MLP: there is no activation to swap") as caught:
        find_sites(on_meta("mamba2", **sizes))
    assert "\n" not in str(caught.value)


class Block(nn.Module):
    """A layer of a family that does not exist yet: a mixer with a convolution, an MLP, a router, unusual names."""

    def __init__(self, mlp):
        super().__init__()
        self.token_mixer = nn.Module()
        self.token_mixer.conv1d, self.token_mixer.nonlinearity = nn.Conv1d(8, 8, 3), nn.SiLU()
        self.router = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 4))
        self.channel_mixer = mlp


def future_model(mlp):
    """A model of two such layers, with a head that has an activation too."""
    model = nn.Module()
    model.stack = nn.ModuleList([Block(mlp()), Block(mlp())])
    model.lm_head = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 20))
    return model


class FutureMLP(nn.Module):
    def __init__(self, act=True):
        super().__init__()
        self.widen, self.narrow = nn.Linear(8, 24), nn.Linear(24, 8)
        if act:
            self.bend = nn.GELU()


def test_an_unknown_family_is_told_from_its_structure():
    sites, left_alone = survey(future_model(FutureMLP))
    assert [(site.path, site.num_channels, site.kind) for site in sites] == [
        ("stack.0.channel_mixer.bend", 24, "plain"),
        ("stack.1.channel_mixer.bend", 24, "plain"),
    ]
    assert {item.path: item.reason.rpartition(": ")[2] for item in left_alone} == {
        "stack.0.token_mixer.nonlinearity": "beside a convolution (conv1d)",
        "stack.1.token_mixer.nonlinearity": "beside a convolution (conv1d)",
        "stack.0.router.1": "router",
        "stack.1.router.1": "router",
        "lm_head.1": "head",
    }


def test_an_mlp_that_hides_its_activation_is_refused_even_beside_others():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    model = future_model(FutureMLP)
    model.stack[1].channel_mixer = Hidden()
    with pytest.raises(
        InputError, match=r"Hidden \(stack\.1\.channel_mixer\) computes its activation inside"
    ) as caught:
        find_sites(model)
    assert "\n" not in str(caught.value)


sizes = st.integers(1, 40)


@given(hidden=sizes, width=sizes, first=st.booleans())
def test_shape_of_plain_mlps(hidden, width, first):
    owner = nn.Module()
    layers = {"fc_in": nn.Linear(hidden, width, device="meta"), "fc_out": nn.Linear(width, hidden, device="meta")}
    for name in layers if first else reversed(layers):  # the order in which a family creates them says nothing
        owner.add_module(name, layers[name])
    assert mlp_shape(owner) == (width, "plain")


@given(hidden=sizes, width=sizes)
def test_shape_of_conv1d_mlps(hidden, width):
    owner = nn.Module()
    owner.c_fc, owner.c_proj = Conv1D(width, hidden), Conv1D(hidden, width)
    assert mlp_shape(owner) == (width, "plain")


@given(hidden=sizes, width=sizes, packed=st.booleans())
def test_shape_of_gated_mlps(hidden, width, packed):
    owner = nn.Module()
    for name in ["gate_up_proj"] if packed else ["gate_proj", "up_proj"]:
        owner.add_module(name, nn.Linear(hidden, 2 * width if packed else width, device="meta"))
    owner.down_proj = nn.Linear(width, hidden, device="meta")
    assert mlp_shape(owner) == (width, "gated")


@given(hidden=sizes, width=sizes, experts=st.integers(1, 4), transposed=st.booleans())
def test_shape_of_fused_experts(hidden, width, experts, transposed):
    owner = nn.Module()
    for name, shape in {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}.items():
        shape = shape[::-1] if transposed else shape
        owner.register_parameter(name, nn.Parameter(torch.empty(experts, *shape, device="meta")))
    assert mlp_shape(owner) == (width, "experts")


@given(hidden=sizes, width=sizes, gated=st.booleans())
def test_shape_where_the_output_projection_is_elsewhere(hidden, width, gated):
    owner = nn.Module()
    for name in ("w_0", "w_1")[: 1 + gated]:
        owner.add_module(name, nn.Linear(hidden, width, device="meta"))
    assert mlp_shape(owner)[0] == width


def test_no_shape_without_an_mlp():
    owner = nn.Module()
    assert mlp_shape(owner) is None
    owner.query, owner.key = nn.Linear(32, 7), nn.Linear(32, 9)
    assert mlp_shape(owner) is None
