"""Tiny models of every causal-LM family of transformers: the family's default configuration with each size shrunk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from crrelu_llm import find_sites

_LAYERS = 2
_LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_decoder_layers", "num_encoder_layers", "num_blocks", "num_layers_per_stack", "depth",
)  # fmt: skip
# Every size that a configuration may name; one that is smaller already keeps its value.
_SIZES = {
    16: {
        "head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "dim_head", "attention_head_dim", "d_head",
        "attention_head_size", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "swa_head_dim",
        "mamba_d_head", "mamba_head_dim", "mamba_headdim", "index_head_dim", "kv_channels", "state_size",
        "ssm_state_size", "mamba_d_state", "query_pre_attn_scalar", "hidden_size_per_layer_input", "kv_lora_rank",
        "q_lora_rank", "o_lora_rank", "time_step_rank", "mamba_dt_rank", "router_hidden_size", "hc_lowrank", "d_kv",
        "rotary_dim", "block_size", "num_buckets", "relative_attention_num_buckets", "position_bias_num_buckets",
        "num_centroids", "codebook_dim", "pronunciation_embed_dim", "shape_embed_dim", "adapter_rank",
    },
    4: {
        "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
        "num_encoder_attention_heads", "num_decoder_attention_heads", "attention_heads", "swa_num_attention_heads",
        "linear_num_heads", "index_n_heads", "mamba_n_heads", "mamba_num_heads", "linear_num_value_heads",
        "conf_num_attention_heads", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
        "prompt_length", "num_query_groups", "n_mamba_heads", "zero_expert_num", "num_filters", "index_topk_blocks",
    },
    2: {
        "num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "linear_num_key_heads",
        "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "index_topk", "n_groups", "o_groups",
        "heads_per_ngram", "split_ngram_parts", "num_codebooks", "num_quantizers", "chroma_length",
    },
    64: {
        "hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "attention_hidden_size", "lru_width",
        "embedding_size", "word_embed_proj_dim", "hidden_size_global", "input_embedding_size", "mamba_d_ssm",
        "output_embedding_size", "ple_embed_dim", "backbone_hidden_size", "out_hidden_size", "base_channels",
        "vector_quantization_hidden_dimension", "nemo_conv_channels", "ext_pw_out_channel",
        "depthwise_separable_out_channel", "upsample_groups", "output_channels", "mamba_chunk_size", "prompt_mid_dim",
    },
    96: {
        "intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "ffn_hidden_size", "dim_ff", "dff",
        "d_ff", "d_inner", "feed_forward_size", "dense_intermediate_size", "intermediate_size_mlp", "mlp_dim",
        "n_inner",
    },
    40: {"moe_intermediate_size", "expert_ffn_hidden_size"},
    56: {
        "shared_expert_intermediate_size", "shared_experts_intermediate_size", "shared_intermediate_size",
        "moe_shared_expert_intermediate_size",
    },
    128: {
        "vocab_size", "vocab_size_per_layer_input", "max_position_embeddings", "n_positions", "n_ctx",
        "sliding_window", "context_length", "max_seq_len", "model_max_length", "max_source_positions",
        "max_target_positions", "unpadded_vocab_size", "decoder_vocab_size", "encoder_hash_byte_group_vocab",
        "ngram_vocab_size_base", "shape_vocab_size", "pronunciation_vocab_size", "audio_vocab_size", "codebook_size",
        "num_position_embeddings",
    },
    1: {"n_group", "topk_group", "num_expert_group", "first_k_dense_replace", "num_kv_shared_layers"},
}  # fmt: skip
_SMALL = {key: size for size, keys in _SIZES.items() for key in keys}

# What the rule gets wrong: changes to the values that it makes. A dictionary goes into that part of the configuration.
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_QSA = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}  # fmt: skip
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "big_bird": {"attention_type": "original_full"},  # sparse attention turns itself into this for short texts
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE | {"mrope_section": [4, 2, 2]}}},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {
        "text_config": {"head_dim": 32},
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": {"head_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma4": {
        "text_config": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 40}
    },
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 16, "qk_head_dim": 32},
    "minimax_m3_vl_text": {"mlp_layer_types": ["dense", "sparse"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True, "hash_seed": 0, "attn_layers": ["local", "lsh"], "max_position_embeddings": 16,
        "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8,
    },
    "xlstm": {"qk_dim_factor": 1.0, "chunk_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3,
        "attention_hidden_size": 128, "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1],
        "attention_hidden_size": 128, "attention_head_dim": 32, "mamba_headdim": 32,
    },
}  # fmt: skip


def shrunk(values: dict) -> dict:
    """A configuration's values, each size made small; of the layers, one of each kind is kept, at least two."""
    count = next((values[key] for key in _LAYER_COUNTS if isinstance(values.get(key), int)), None)
    lists = {k: v for k, v in values.items() if isinstance(v, (list, tuple)) and len(v) == count and len(v) > 2}
    kinds = list(zip(*lists.values(), strict=True))
    kept = sorted({kinds.index(kind) for kind in kinds})[:8]
    kept += [index for index in range(len(kinds)) if index not in kept][: max(0, _LAYERS - len(kept))]
    result = {}
    for key, value in values.items():
        if key == "per_layer_config":
            by_layer = {int(layer): change for layer, change in value.items()}
            result[key] = {at: shrunk(by_layer[layer]) for at, layer in enumerate(kept) if layer in by_layer}
        elif isinstance(value, dict) and key.endswith("_config"):
            result[key] = shrunk(value)
        elif key in lists:
            result[key] = [_small(key, value[index]) for index in kept]
        elif key in _LAYER_COUNTS and isinstance(value, int):
            result[key] = len(kept) or min(value, _LAYERS)
        else:
            result[key] = _small(key, value)
    if values.get("num_key_value_heads") == values.get("num_attention_heads") and "num_key_value_heads" in result:
        result["num_key_value_heads"] = result["num_attention_heads"]
    return result


def _small(key: str, value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    limit = 2 if key.endswith("token_id") else _SMALL.get(key)
    return value if limit is None else min(value, limit)


def _merged(values: dict, changes: dict) -> dict:
    result = dict(values)
    for key, change in changes.items():
        result[key] = _merged(values.get(key) or {}, change) if isinstance(change, dict) else change
    return result


# For each type of this release of transformers: the sites (# is the layer) with their original activation and kind,
# and what is left alone and why; or why it is refused; or why no model of it can be built here. Layers are one of each
# kind.
RELEASE = "5.23"
IS_RELEASE = transformers.__version__.startswith(f"{RELEASE}.")
_ALL = json.loads((Path(__file__).parents[1] / "patching" / "families.json").read_text())
# Another release lacks some types, has others, and builds some otherwise: there only what holds for all is tested.
FACTS = {family: facts for family, facts in _ALL.items() if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
PATCHED = [family for family, facts in FACTS.items() if "sites" in facts]


def one_of_each_kind(names: list[str]) -> list[Any]:
    """Parameters of a test of all these families: slow, but for the first with each mixture of kinds of sites, and
    those whose activation is inside a method, of which no two are alike."""
    parameters, seen = [], set()
    for name in names:
        kinds = frozenset(site.rpartition(" ")[2] for site in FACTS[name]["sites"].values())
        slow = "functional" not in kinds and kinds in seen
        parameters.append(pytest.param(name, marks=pytest.mark.slow) if slow else name)
        seen.add(kinds)
    return parameters


# Types whose causal LM is built from a part of their configuration.
_DECODERS = {"musicgen", "musicgen_melody"}
_DERIVED = {"transformers_version", "_name_or_path", "architectures", "model_type", "dtype"}


def family_config(family: str):
    """The configuration of a tiny model of a family.

    Raises:
        Exception: Whatever the family's configuration raises.
    """
    if family not in CONFIG_MAPPING:
        pytest.skip(f"{family} is no type of transformers {transformers.__version__}")
    own = type(CONFIG_MAPPING[family]().decoder) if family in _DECODERS else CONFIG_MAPPING[family]
    values = {key: value for key, value in own().to_dict().items() if key not in _DERIVED}
    config = own(**_merged(shrunk(values), EXCEPTIONS.get(family, {})))
    config.use_cache = config.get_text_config().use_cache = False
    return config


def token_ids() -> torch.Tensor:
    """Random token ids, `(2, 16)`, that every family can read."""
    return torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(1))


def family_model(family: str, seed: int = 0):
    """A tiny causal LM of a family in evaluation mode, with weights large enough for an activation to matter.

    Another release of transformers than RELEASE may need another configuration; the test is skipped there.
    """
    torch.manual_seed(seed)
    try:
        config = family_config(family)
        if family in _DECODERS:
            model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
        if not IS_RELEASE:
            model.eval()(input_ids=token_ids())
            if family in PATCHED:
                find_sites(model)  # of another structure there, which is refused in one line
    except Exception as error:
        if IS_RELEASE:
            raise
        pytest.skip(f"{family}: no tiny model for transformers {transformers.__version__}: {str(error)[:100]}")
    # The usual initialisation is so small that an activation hardly bends.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(4).add_(torch.randn_like(parameter), alpha=0.02)  # xLSTM starts from gates of zero
    return model.eval()
