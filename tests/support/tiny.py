"""Tiny, randomly initialised models of many families, for tests."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_COMMON = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "num_hidden_layers": 2, "num_attention_heads": 4}

# family -> (config, number of sites, width of a site, kind of a site)
FAMILIES = {
    "gpt2": (_GPT2, 2, 128, "plain"),
    "llama": (_LLAMA, 2, 48, "gated"),
    "mistral": (_LLAMA, 2, 48, "gated"),
    "qwen3": (_LLAMA | {"head_dim": 8}, 2, 48, "gated"),
    "gemma3_text": (_LLAMA | {"head_dim": 8}, 2, 48, "gated"),
    "phi3": (_LLAMA, 2, 48, "gated"),
    "gpt_neox": (_LLAMA, 2, 48, "plain"),
    "opt": (_LLAMA | {"ffn_dim": 48, "word_embed_proj_dim": 32}, 2, 48, "plain"),
    "bloom": (_BLOOM, 2, 128, "plain"),
    "falcon": (_BLOOM | {"ffn_hidden_size": 48}, 2, 48, "plain"),
    "mixtral": (_LLAMA | _MOE, 2, 48, "experts"),
    "qwen3_moe": (_LLAMA | _MOE | {"head_dim": 8}, 2, 24, "experts"),
    "qwen2_moe": (_LLAMA | _MOE | {"shared_expert_intermediate_size": 40}, 4, None, None),
}


def tiny_config(family, **overrides):
    """The configuration of a tiny model of a family."""
    return AutoConfig.for_model(family, **(_COMMON | FAMILIES[family][0] | overrides))


def tiny_model(family, seed=0, **overrides):
    """A tiny model of a family in evaluation mode, weights drawn with `seed`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).eval()
    # The usual initialisation is so small that an activation hardly bends: make the swap visible.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(4)
    return model


def tiny_lfm2():
    """A tiny model of a family whose MLP computes its activation inside a method."""
    sizes = {key: value for key, value in _LLAMA.items() if key != "max_position_embeddings"}
    torch.manual_seed(0)
    config = AutoConfig.for_model("lfm2", **_COMMON, **sizes, layer_types=["conv", "full_attention"])
    return AutoModelForCausalLM.from_config(config).eval()


def token_ids(batch=2, length=12, seed=1):
    """Random token ids, `(batch, length)`."""
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids=None):
    """The model's logits for random tokens, without gradients."""
    with torch.no_grad():
        return model(input_ids=token_ids() if ids is None else ids).logits
