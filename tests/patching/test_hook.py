"""The hook: a patched model saved and reloaded by plain transformers is the same model, and errors are loud."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, logits, tiny_config, tiny_model, token_ids
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from crrelu_llm import CRReLU, find_sites, patch, unpatch
from crrelu_llm.activation import AFFINE
from crrelu_llm.errors import InputError
from crrelu_llm.patching.loading import load_model


def tree(model):
    """Every module's type by its path."""
    return {path: type(module) for path, module in model.named_modules(remove_duplicate=False)}


def randomise(model):
    """Gives every ε a value of its own, so that no start value passes for a loaded one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in ours(model):
            module.epsilon.copy_(torch.randn(module.epsilon.shape, generator=generator))


def ours(model):
    return [module for module in model.modules() if isinstance(module, CRReLU)]


def saved(directory, family="llama", activation="crrelu", **options):
    """Saves a patched tiny model with random ε; returns it."""
    model = tiny_model(family)
    patch(model, activation, **options, calibration="none")
    randomise(model)
    model.save_pretrained(directory)
    return model


def drop(directory, ending):
    """Takes the tensors with this ending, or one of these, out of a checkpoint."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}
    assert len(kept) < len(tensors)
    save_file(kept, file, metadata={"format": "pt"})


@pytest.mark.parametrize("epsilon_per", ["layer", "channel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reload_is_exact(family, epsilon_per, tmp_path):
    model = saved(tmp_path, family, epsilon_per=epsilon_per)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert tree(again) == tree(model)
    assert again.config.crrelu == model.config.crrelu
    for one, other in zip(ours(model), ours(again), strict=True):
        assert torch.equal(one.epsilon, other.epsilon)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["gelu", "relu", "prelu"])
def test_reload_of_other_activations_is_exact(family, name, tmp_path):
    model = saved(tmp_path, family, name)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_after_reload(family, tmp_path):
    native = tiny_model(family)
    saved(tmp_path / "patched", family)
    native.save_pretrained(tmp_path / "native")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    unpatch(again)
    assert tree(again) == tree(native)
    assert torch.equal(logits(again), logits(native))
    again.save_pretrained(tmp_path / "unpatched")
    files = [tmp_path / name / "config.json" for name in ("native", "unpatched")]
    assert json.loads(files[0].read_text()) == json.loads(files[1].read_text())
    keys = [set(load_file(tmp_path / name / "model.safetensors")) for name in ("native", "unpatched")]
    assert keys[0] == keys[1]


SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
# Families with activations that must stay, or with one instance for all layers; and the types of these
ODD = {
    "falcon_h1": (
        SIZES
        | {"num_hidden_layers": 2, "num_key_value_heads": 2, "mamba_d_ssm": 64, "mamba_n_heads": 8}
        | {"mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
        ["model.layers.0.mamba.act", "model.layers.1.mamba.act"],
    ),
    "bert": (SIZES | {"num_hidden_layers": 2, "is_decoder": True}, ["cls.predictions.transform.transform_act_fn"]),
    "openai-gpt": ({"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4}, []),
    "xlm": ({"vocab_size": 97, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True}, []),
    "jetmoe": (
        SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 2},
        [],
    ),
    "cpmant": ({"vocab_size": 97, "hidden_size": 32, "dim_ff": 48, "num_hidden_layers": 2, "dim_head": 8}, []),
}


@pytest.mark.parametrize("family", ODD)
def test_odd_families_reload_and_keep_their_other_activations(family, tmp_path):
    overrides, others = ODD[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **overrides)).eval()
    native, before = tree(model), logits(model)
    patch(model, epsilon_per="channel", calibration="none")
    randomise(model)
    assert not torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert {path: type(again.get_submodule(path)) for path in others} == {path: native[path] for path in others}
    unpatch(again)
    assert tree(again) == native
    assert torch.equal(logits(again), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_epsilon_stays_float32(family, dtype, tmp_path):
    model = saved(tmp_path, family, epsilon_per="channel")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert again.dtype == dtype
    for one, other in zip(ours(model), ours(again), strict=True):
        assert other.epsilon.dtype == torch.float32
        assert torch.equal(one.epsilon, other.epsilon)
    # ... and a second time round
    again.save_pretrained(tmp_path / "again")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)
    assert torch.equal(logits(third), logits(again))


@pytest.mark.parametrize("family", ["gpt2", "bloom", "mixtral"])
def test_a_missing_epsilon_gets_its_start_value(family, tmp_path, caplog):
    patched = tiny_model(family)
    patch(patched, epsilon_init=0.05, calibration="none")
    patched.save_pretrained(tmp_path)
    drop(tmp_path, "epsilon")
    with caplog.at_level(logging.WARNING, logger="crrelu_llm"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all((module.epsilon == 0.05).all() for module in ours(again))
    assert torch.equal(logits(again), logits(patched))
    (record,) = [record for record in caplog.records if record.name.startswith("crrelu_llm")]
    assert "no epsilon for 2 of its sites" in record.getMessage()
    assert find_sites(again)[0].path in record.getMessage()


def test_one_missing_epsilon_leaves_the_others(tmp_path, caplog):
    model = saved(tmp_path)
    drop(tmp_path, "layers.1.mlp.act_fn.epsilon")
    with caplog.at_level(logging.WARNING, logger="crrelu_llm"):
        first, second = ours(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(first.epsilon, ours(model)[0].epsilon)
    assert second.epsilon.tolist() == pytest.approx([0.01])
    assert "1 of its sites" in caplog.text


def test_a_whole_checkpoint_gives_no_warning(tmp_path, caplog):
    saved(tmp_path)
    with caplog.at_level(logging.WARNING, logger="crrelu_llm"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert caplog.text == ""


def test_a_missing_prelu_weight_gets_its_start_value(tmp_path):
    model = saved(tmp_path, activation="prelu")
    drop(tmp_path, "act_fn.weight")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [layer.mlp.act_fn.weight.item() for layer in again.model.layers] == [0.25, 0.25]
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "opt"])
def test_the_base_model_and_other_heads_keep_the_swap(family, tmp_path):
    model = saved(tmp_path, family)
    values = [module.epsilon.tolist() for module in ours(model)]
    for auto_class in (AutoModel, AutoModelForSequenceClassification):
        other = auto_class.from_pretrained(tmp_path)
        assert [module.epsilon.tolist() for module in ours(other)] == values
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        found = AutoModel.from_pretrained(tmp_path)(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(found, expected)


def test_a_base_model_saved_alone_reloads(tmp_path):
    model = saved(tmp_path / "whole")
    AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    assert [module.epsilon.tolist() for module in ours(base)] == [module.epsilon.tolist() for module in ours(model)]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_new_model_from_the_config_is_patched(family):
    donor = tiny_model(family)
    patch(donor, epsilon_per="channel", epsilon_init=0.2, calibration="none")
    model = AutoModelForCausalLM.from_config(donor.config)
    assert tree(model) == tree(donor)
    assert all((module.epsilon == 0.2).all() for module in ours(model))


def test_the_name_crrelu_works_in_a_config_without_a_section():
    model = AutoModelForCausalLM.from_config(tiny_config("llama", hidden_act="crrelu"))
    assert [module.epsilon.tolist() for module in ours(model)] == [pytest.approx([0.01])] * 2


def test_weight_initialisation_does_not_touch_what_was_loaded(tmp_path):
    model = saved(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    again.init_weights()
    assert [module.epsilon.tolist() for module in ours(again)] == [module.epsilon.tolist() for module in ours(model)]


def edit_config(directory, **changes):
    """Rewrites entries of the crrelu section."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["crrelu"] |= changes
    file.write_text(json.dumps(config))


def test_a_section_whose_site_the_model_lacks_is_refused(tmp_path):
    saved(tmp_path)
    sites = [{"path": "model.layers.7.mlp.act_fn", "original": "silu", "num_channels": 48, "kind": "gated"}]
    edit_config(tmp_path, sites=sites)
    with pytest.raises(InputError, match=r"model\.layers\.7\.mlp\.act_fn, which LlamaForCausalLM does not have"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


BLOCKS = token_ids(4, 32, seed=5)


def calibrated(directory, activation="crrelu", **options):
    """Saves a tiny model with fitted numbers; returns it."""
    model = tiny_model("llama", num_hidden_layers=2)
    patch(model, activation, blocks=BLOCKS, epsilon_per="channel", **options)
    model.save_pretrained(directory)
    return model


def numbers(model):
    """The tensors of the activations by name."""
    return {name: value for name, value in model.state_dict().items() if ".act_fn." in name}


@pytest.mark.parametrize("activation", ["crrelu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calibrated_numbers_reload_in_float32(activation, dtype, tmp_path):
    model = calibrated(tmp_path, activation)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    found, wanted = numbers(again), numbers(model)
    assert {name.rpartition(".")[2] for name in found} >= set(AFFINE) and found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, wanted[name])
    assert again.lm_head.weight.dtype == dtype
    again.save_pretrained(tmp_path / "again")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)
    assert torch.equal(logits(third), logits(again))
    if dtype == torch.float32:
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("activation", ["crrelu", "gelu"])
def test_numbers_that_are_all_missing_start_anew_and_are_said_once(activation, tmp_path, caplog):
    model = calibrated(tmp_path, activation)
    drop(tmp_path, AFFINE)
    with caplog.at_level(logging.WARNING, logger="crrelu_llm"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    (record,) = [record for record in caplog.records if record.name.startswith("crrelu_llm")]
    said = (
        "no scale, shift, gain, offset for 2 of its sites (first: model.layers.0.mlp.act_fn); they start at 1, 0, 1, 0"
    )
    assert said in record.getMessage()
    plain = {name: value for name, value in numbers(model).items() if name.endswith("epsilon")}
    for name, value in numbers(again).items():
        start = {"scale": 1.0, "shift": 0.0, "gain": 1.0, "offset": 0.0}.get(name.rpartition(".")[2])
        assert torch.equal(value, plain[name]) if start is None else (value == start).all()


@pytest.mark.parametrize("missing", ["gain", ("scale", "offset")])
def test_numbers_that_are_missing_in_part_are_refused(missing, tmp_path):
    calibrated(tmp_path)
    drop(tmp_path, missing)
    with pytest.raises(InputError, match=r"only some of model\.layers\.0\.mlp\.act_fn's.*do not belong") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_numbers_of_another_width_are_refused(tmp_path):
    calibrated(tmp_path)
    file = tmp_path / "model.safetensors"
    cut = {name: value[:24].clone() if name.endswith(AFFINE) else value for name, value in load_file(file).items()}
    save_file(cut, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="cannot be loaded: the shapes of its weights") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"epsilon_per": "channel"}, {"activation": "prelu"}, {"density": "fitted"}])
def test_checkpoints_of_version_0_1_load(options, tmp_path):
    """Their sections, as that version wrote them: 1, or 2 with a centre and a width; no `calibrated`."""
    model = tiny_model("llama")
    patch(model, calibration="none", blocks=BLOCKS, **options)
    randomise(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    old = {"activation": "crrelu", "epsilon_per": "layer"} | options
    config["crrelu"] = {
        "version": 2 if "density" in options else 1,
        "epsilon_init": 0.01,
        "config_keys": {"hidden_act": "silu"},
        "sites": [
            {"path": f"model.layers.{layer}.mlp.act_fn", "original": "silu", "num_channels": 48, "kind": "gated"}
            for layer in range(2)
        ],
        "weights_changed": True,  # its calibrations folded numbers into the weights
    } | old
    file.write_text(json.dumps(config))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not any(name.endswith(AFFINE) for name in again.state_dict())
    with pytest.raises(InputError, match="start from the original checkpoint"):
        patch(again, "gelu", calibration="none")


def python(code, *argv):
    return subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True)


def test_a_program_without_this_package_fails_loudly_until_it_imports_it(tmp_path):
    """Whoever else has taken the name meanwhile."""
    saved(tmp_path)
    code = (
        "import sys, transformers\n"
        "try: transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except KeyError as error: print(error)\n"
        "from transformers.activations import ACT2FN; ACT2FN['crrelu'] = ACT2FN['relu']\n"
        "import crrelu_llm\n"
        "from transformers import PreTrainedModel\n"
        "assert PreTrainedModel.post_init.__code__.co_name == 'swap_then_post_init'\n"
        "first = PreTrainedModel.post_init; crrelu_llm.register(); assert PreTrainedModel.post_init is first\n"
        "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print('loaded')\n"
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["'crrelu'", "loaded"]


@pytest.mark.parametrize(
    "imports",
    [
        "crrelu_llm, transformers",
        pytest.param("transformers, transformers.modeling_utils, crrelu_llm", marks=pytest.mark.slow),
    ],
)
def test_importing_this_package_is_enough(imports, tmp_path):
    expected = logits(saved(tmp_path)).sum().item()
    code = (
        f"import sys; sys.path.insert(0, sys.argv[2]); import {imports}; from tiny import logits; "
        "print(logits(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])).sum().item())"
    )
    done = python(code, tmp_path, *[path for path in sys.path if path.endswith("support")][:1])
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == expected


def test_importing_this_package_loads_nothing_heavy():
    heavy = "{'torch', 'transformers', 'trl', 'datasets', 'numpy'}"
    done = python(f"import sys, crrelu_llm; print(sorted({heavy} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


def test_unpatch_the_base_model_of_a_patched_checkpoint(tmp_path):
    """`AutoModel` has the same sites without the head's prefix."""
    model = tiny_model("llama")
    plain = AutoModel.from_config(model.config)
    patch(model, calibration="none")
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert any(isinstance(module, CRReLU) for module in base.modules())
    unpatch(base)
    assert [type(module) for module in base.modules()] == [type(module) for module in plain.modules()]
    assert not hasattr(base.config, "crrelu")


def test_calibrated_weights_under_a_config_without_calibration_are_refused(tmp_path):
    model = tiny_model("llama")
    plain, fitted = tmp_path / "plain", tmp_path / "fitted"
    patch(model, calibration="none")
    model.save_pretrained(plain)
    unpatch(model)
    patch(model, calibration="fit", blocks=token_ids(8, 32))
    model.save_pretrained(fitted)
    (fitted / "config.json").write_text((plain / "config.json").read_text())
    with pytest.raises(InputError, match=r"its weights have calibrated activations .*do not belong together"):
        AutoModelForCausalLM.from_pretrained(fitted)
