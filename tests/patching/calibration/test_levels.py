"""Calibration as a whole: each level brings a model nearer to itself, changes what it may, and can be undone."""

import copy
import math
import sys

import pytest
import torch
from families import family_model
from tiny import logits, tiny_lfm2, tiny_model, token_ids
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from crrelu_llm import CRReLU, find_sites, patch, unpatch
from crrelu_llm.activation import AFFINE, Calibrated
from crrelu_llm.data import language_modelling_blocks
from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.perplexity import perplexity
from crrelu_llm.patching.calibration.tasks import SiteTask

BLOCKS = token_ids(8, 64, seed=5)


def state(model):
    """Everything that a failed patch could leave changed."""
    modules = [(path, id(module), module.training) for path, module in model.named_modules(remove_duplicate=False)]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return modules, hooks, {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one[:2] == other[:2] and all(torch.equal(value, other[2][name]) for name, value in one[2].items())


def everything(model):
    """The state dict's tensors, the type of each module, and the config."""
    types = {path: type(module) for path, module in model.named_modules(remove_duplicate=False)}
    return {name: value.clone() for name, value in model.state_dict().items()}, types, model.config.to_dict()


def assert_restored(model, before):
    tensors, types, config = everything(model)
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(value, before[0][name]) for name, value in tensors.items())
    assert (types, config) == before[1:]


def patched(model, level="fit", activation="crrelu", blocks=BLOCKS, **options):
    """A patched copy of a model and the report's sites; one ε a channel, which takes a tenth of the time."""
    model = copy.deepcopy(model)
    options = {"epsilon_per": "channel"} | options
    return model, patch(model, activation, calibration=level, blocks=blocks, **options).sites


def is_ours(name):
    return name.rpartition(".")[2] in ("epsilon", *AFFINE)


def changed_weights(model, other):
    """The names of the model's own tensors that differ."""
    theirs = other.state_dict()
    return {n for n, value in model.state_dict().items() if not is_ours(n) and not torch.equal(value, theirs[n])}


@pytest.mark.parametrize("activation", ["crrelu", "relu"])
@pytest.mark.parametrize("checkpoint", ["tiny_checkpoint", "tiny_llama_checkpoint"])
def test_each_level_brings_the_model_nearer_to_itself(checkpoint, activation, request, text_file):
    directory = request.getfixturevalue(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    blocks = language_modelling_blocks(str(text_file), tokenizer, 8192, 128, "test")
    held = blocks[48:]
    with torch.no_grad():
        wanted = model(input_ids=held).logits.log_softmax(-1)
    distance = {}
    for level in ("none", "fit", "refit"):
        changed, sites = patched(model, level, activation, blocks[:48])
        with torch.no_grad():
            found = changed(input_ids=held).logits.log_softmax(-1)
        distance[level] = F.kl_div(found, wanted, log_target=True, reduction="sum").item() / held.numel()
        for site in sites:
            module = changed.get_submodule(site["path"])
            assert isinstance(module, (CRReLU, Calibrated)) == (activation == "crrelu" or level != "none")
            assert site["kept"] == level or site["note"] == "refit was no better on held-back tokens"
            assert (site["relative_error"] is None) == (level == "none")
    assert distance["none"] > (20 if activation == "crrelu" else 2) * distance["fit"]
    assert distance["refit"] < 1.1 * distance["fit"] + 1e-7  # what rounding leaves
    if activation == "crrelu":
        assert perplexity(changed, held) == pytest.approx(perplexity(model, held), rel=0.01)


@pytest.mark.parametrize(
    ("family", "activation"),
    [("gpt2", "relu"), ("llama", "crrelu"), ("llama", "prelu"), ("mixtral", "crrelu"), ("lfm2", "gelu")],
)
def test_fit_leaves_every_weight_reloads_and_can_be_undone(family, activation, tmp_path):
    native = tiny_lfm2() if family == "lfm2" else tiny_model(family)
    before = everything(native)
    model, sites = patched(native, activation=activation)
    assert changed_weights(native, model) == set()
    for site in sites:
        module = model.get_submodule(site["path"])
        assert module.is_calibrated
        assert [getattr(module, name).shape for name in AFFINE] == [(site["num_channels"],)] * 4
        assert 0 < site["relative_error"] < site["relative_error_naive"]
        assert (site["kept"], site["note"]) == ("fit", None)
        assert site["scale_mean"] == pytest.approx(module.scale.abs().mean().item())
    section = model.config.crrelu
    assert (section["version"], section["calibrated"], section["weights_changed"]) == (3, True, False)
    twin = copy.deepcopy(model)
    unpatch(twin)
    assert_restored(twin, before)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    unpatch(again)
    assert torch.equal(logits(again), logits(native))
    assert_restored(again, (before[0], before[1], again.config.to_dict()))
    native.save_pretrained(tmp_path / "native")
    again.save_pretrained(tmp_path / "again")
    files = [(tmp_path / name / "config.json").read_text() for name in ("native", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize(("family", "activation"), [("gpt2", "relu"), ("llama", "relu"), ("phi3", "gelu")])
def test_refit_changes_the_following_projections_alone(family, activation, tmp_path):
    native = tiny_model(family)
    fit, _ = patched(native, activation=activation)
    model, sites = patched(native, "refit", activation)
    names = {"gpt2": ("c_proj.weight", "c_proj.bias")}.get(family, ("down_proj.weight",))
    wanted = {
        f"{site['path'].rpartition('.')[0]}.{name}" for site in sites if site["kept"] == "refit" for name in names
    }
    assert wanted and changed_weights(native, model) == wanted
    assert model.config.crrelu["weights_changed"] is True
    ids = token_ids(8, 64, seed=11)  # never seen
    distances = [(logits(one, ids) - logits(native, ids)).norm() for one in (fit, model)]
    assert distances[1] < 1.05 * distances[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_refit_says_where_there_is_nothing_to_refit():
    for family, count in (("mixtral", 2), ("qwen2_moe", 2)):
        _, sites = patched(tiny_model(family), "refit", "gelu")
        without = [site for site in sites if str(site["note"]).startswith("no projection to refit")]
        assert len(without) == count
        assert all(site["kept"] == "fit" and ".experts" in site["path"] for site in without)


def epsilon_alone():
    """A task that also notes the relative error with ε alone, by least squares on the same text; and the notes."""
    plain = {}

    class Plain(SiteTask):
        def solve(self, config):
            x, weights = self.histogram.points, self.histogram.weights
            bump, left = x * torch.exp(-x * x / 2), self.original(x) - x.relu()
            epsilon = (weights @ (bump * left)).sum() / (weights @ (bump * bump)).sum()
            held, y = self.histogram.held_back, self.original(x)
            wrong = x.relu() + epsilon * bump - y
            plain[self.site.path] = ((held @ (wrong * wrong)).sum() / (held @ (y * y)).sum()).sqrt().item()
            return SiteTask.solve(self, config)

    return Plain, plain


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_fused_experts_get_the_whole_fit(family, monkeypatch):
    task, plain = epsilon_alone()
    monkeypatch.setattr("crrelu_llm.patching.calibration.SiteTask", task)
    _, sites = patched(tiny_model(family))
    for site in sites:
        print(f"{site['path']}: {plain[site['path']]:.4f} with ε alone, {site['relative_error']:.4f} with all")
        assert site["relative_error"] < 0.1 * plain[site["path"]]
        assert site["relative_error"] < 0.01


def norm_inside(model):
    for layer in model.model.layers:
        layer.mlp.down_proj = torch.nn.Sequential(torch.nn.LayerNorm(48), layer.mlp.down_proj)


class Clamped(torch.nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=2)) * self.up_proj(x).clamp(-0.5, 0.5))


def clamp_inside(model):
    for layer in model.model.layers:
        layer.mlp = Clamped(layer.mlp)


def tied(model):
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(model.model.layers[1].mlp, name).weight = getattr(model.model.layers[0].mlp, name).weight


@pytest.mark.parametrize("change", [norm_inside, clamp_inside, tied])
def test_whatever_surrounds_an_activation_it_gets_the_whole_fit(change, monkeypatch):
    model = tiny_model("llama")
    sites = find_sites(model)
    change(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(sys.modules["crrelu_llm.patching.patch"], "survey", lambda model, parts: (sites, []))
    naive, changed = copy.deepcopy(model), copy.deepcopy(model)
    wanted = logits(model)
    patch(naive, calibration="none")
    for site in patch(changed, blocks=BLOCKS, epsilon_per="channel").sites:
        assert (site["kept"], site["note"]) == ("fit", None)
        assert site["relative_error"] < 0.05 * site["relative_error_naive"]
    assert (logits(changed) - wanted).norm() < 0.1 * (logits(naive) - wanted).norm()
    assert all(torch.equal(value, before[name]) for name, value in changed.state_dict().items() if name in before)
    again = patch(copy.deepcopy(model), "relu", calibration="refit", blocks=BLOCKS).sites
    if change is not clamp_inside:
        assert all(str(site["note"]).startswith("no projection") for site in again)


def test_layers_that_share_their_weights_get_the_whole_fit(tmp_path):
    model = family_model("zamba")
    ids = token_ids(8, 16, seed=5).clamp(max=63)
    before = logits(model, ids)
    naive = copy.deepcopy(model)
    patch(naive, calibration="none")
    sites = patch(model, blocks=ids, epsilon_per="channel").sites
    assert all(site["kept"] == "fit" and site["relative_error"] < 0.05 for site in sites)
    assert (logits(model, ids) - before).norm() < 0.2 * (logits(naive, ids) - before).norm()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids))


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_quantised_weights_are_fitted_but_not_refitted(options, tmp_path):
    from transformers import BitsAndBytesConfig

    tiny_model("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**options))
    with pytest.raises(InputError, match=r'"refit" changes weights.*quantised; use "fit"'):
        patch(model, calibration="refit", blocks=BLOCKS)
    before = logits(model)
    sites = patch(model, calibration="fit", blocks=BLOCKS, epsilon_per="channel").sites
    for site in sites:
        assert site["kept"] == "fit" and site["relative_error"] < 0.05
        assert {getattr(model.get_submodule(site["path"]), name).dtype for name in AFFINE} == {torch.float32}
    assert (logits(model) - before).norm() < 0.1 * before.norm()


@pytest.mark.needs("bitsandbytes")
def test_quantising_after_the_patch_costs_no_more_than_quantising_the_original(tmp_path):
    from transformers import BitsAndBytesConfig

    native = tiny_model("llama", hidden_size=64, intermediate_size=64)
    model, _ = patched(native)
    native.save_pretrained(tmp_path / "native")
    model.save_pretrained(tmp_path / "patched")
    for options in ({"load_in_4bit": True}, {"load_in_8bit": True}):
        kwargs = {"quantization_config": BitsAndBytesConfig(**options), "dtype": torch.bfloat16}
        one, other = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, **kwargs) for name in ("native", "patched")
        )
        for name, value in model.state_dict().items():
            if is_ours(name):
                found = other.state_dict()[name]
                assert found.dtype == torch.float32 and torch.equal(found, value)
        cost = (logits(one) - logits(native)).norm()
        assert (logits(other) - logits(model)).norm() < 1.1 * cost


def test_an_expert_that_no_token_chose_is_left():
    model = tiny_model("qwen2_moe")
    blocks = torch.full((1, 2), 5)  # two tokens alike choose the same two experts of four
    for level in ("fit", "refit"):
        changed, sites = patched(model, level, "relu", blocks)
        assert torch.isfinite(logits(changed)).all()
        assert len(sites) == 4


@pytest.mark.parametrize("level", ["fit", "refit"])
def test_the_own_activation_changes_no_bit(level):
    for family, name in (("llama", "silu"), ("gpt2", "gelu_new")):
        model = tiny_model(family)
        changed, sites = patched(model, level, name)
        assert [(site["relative_error"], site["kept"]) for site in sites] == [(0, "none")] * 2
        assert changed.config.crrelu["weights_changed"] is False
        torch.testing.assert_close(logits(changed), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("level", "activation"), [("fit", "crrelu"), ("refit", "relu")])
def test_the_same_text_gives_the_same_model(level, activation):
    model = tiny_model("llama")
    (one, _), (other, _) = (patched(model, level, activation, epsilon_per="layer") for _ in range(2))
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize("blocks", [BLOCKS[:1, :1], BLOCKS[:1, :9], BLOCKS[:1], BLOCKS[:2, :16]])
@pytest.mark.parametrize(("level", "activation"), [("fit", "crrelu"), ("refit", "relu")])
def test_a_handful_of_tokens_does_no_harm(level, activation, blocks):
    model = tiny_model("gpt2", n_embd=16)
    wanted = logits(model)
    naive = (logits(patched(model, "none", activation)[0]) - wanted).norm()
    changed, sites = patched(model, level, activation, blocks)
    assert (logits(changed) - wanted).norm() < 1.1 * naive
    if level == "refit" and len(blocks) == 1:  # nothing is held back to judge by
        assert all(site["kept"] != "refit" for site in sites)


def test_dropout_and_mode_do_not_reach_the_calibration():
    model = tiny_model("gpt2", n_embd=16, resid_pdrop=0.5, embd_pdrop=0.5)
    expected, _ = patched(model, "refit", "relu")
    found, _ = patched(model.train(), "refit", "relu")
    assert found.training
    assert torch.equal(logits(found.eval()), logits(expected))


def test_low_precision_weights_keep_their_dtype_and_the_numbers_stay_float32():
    model = tiny_model("llama").bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for level, activation in (("fit", "crrelu"), ("refit", "relu")):
        changed, sites = patched(model, level, activation)
        for name, value in changed.state_dict().items():
            assert value.dtype == (torch.float32 if is_ours(name) else torch.bfloat16), name
        assert all(site["kept"] != "none" for site in sites)
    unpatch(changed := patched(model)[0])
    assert all(torch.equal(value, before[name]) for name, value in changed.state_dict().items())


def test_an_interrupted_calibration_puts_the_activations_back(monkeypatch, caplog):
    model = tiny_model("llama").train()
    before = state(model)
    with pytest.raises(IndexError):
        patch(model, blocks=torch.full((1, 8), 1000))  # no such token
    assert same(state(model), before)
    calls = []
    solve = SiteTask.solve

    def interrupted(task, config):
        calls.append(task.site.path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(task, config)

    monkeypatch.setattr(SiteTask, "solve", interrupted)
    for level in ("fit", "refit"):
        calls.clear()
        caplog.clear()
        with pytest.raises(KeyboardInterrupt):
            patch(model, "relu", calibration=level, blocks=BLOCKS)
        assert state(model)[:2] == before[:2]
        assert not hasattr(model.config, "crrelu")
        assert same(state(model), before) == (level == "fit")
        assert ("changed weights; load it again" in caplog.text) == (level == "refit")


def test_inputs_that_are_all_zero_do_no_harm():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.zero_()
    for activation in ("crrelu", "relu"):
        changed, sites = patched(model, "refit", activation)
        assert sites[1]["relative_error"] == 0
        assert torch.isfinite(logits(changed)).all()


def test_channels_that_are_dead_do_not_spoil_the_others():
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[:30] = 0  # of 48
    changed, sites = patched(model)
    for site in sites:
        assert site["relative_error"] < 0.05 * site["relative_error_naive"]
    assert torch.isfinite(logits(changed)).all()


@pytest.mark.parametrize("level", ["fit", "refit"])
def test_a_broken_checkpoint_is_refused_with_the_layer(level):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 3] = math.nan
    before = state(model)
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn\.o_proj.*not a number") as caught:
        patch(model, calibration=level, blocks=BLOCKS)
    assert "\n" not in str(caught.value)
    assert before[:2] == state(model)[:2]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_numbers_that_break_on_some_text_only_are_refused_too(value):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = value
    blocks = torch.full((4, 64), 7)
    blocks[2, 10] = 50
    before = state(model)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.act_fn: its inputs .* not finite") as caught:
        patch(model, "relu", blocks=blocks)
    assert "\n" not in str(caught.value)
    assert before[:2] == state(model)[:2]


def test_unpatch_says_that_weights_stay_changed_or_restores_them(caplog):
    model = tiny_model("llama")
    changed, _ = patched(model, "refit", "relu")
    again = copy.deepcopy(changed)
    unpatch(changed)
    assert "refit or --fold has changed the weights since the patch" in caplog.text
    assert not torch.equal(logits(changed), logits(model))
    caplog.clear()
    unpatch(again, original=model)
    assert not caplog.text
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(InputError, match="is not the model"):
        unpatch(patched(model, "refit", "relu")[0], original=tiny_model("gpt2"))


def test_a_fitted_model_can_be_patched_anew():
    model = tiny_model("llama")
    changed, _ = patched(model)
    for options in ({"calibration": "none"}, {"activation": "relu", "calibration": "fit", "blocks": BLOCKS}):
        fresh = copy.deepcopy(model)
        assert patch(changed, **options).sites == patch(fresh, **options).sites
        assert torch.equal(logits(changed), logits(fresh))
        assert changed.config.to_dict() == fresh.config.to_dict()


def test_missing_or_short_or_foreign_text_changes_nothing(tokenizer, tmp_path):
    model = tiny_model("llama", vocab_size=len(tokenizer))
    before = state(model)
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    medium = tmp_path / "medium.txt"
    medium.write_text("Enough for a block, but less than asked for. " * 40)
    cases = [
        (str(tmp_path / "none.txt"), "no such file", tokenizer),
        (str(short), "do not fill one block", tokenizer),
        (str(medium), "fewer than the 8192 asked for", tokenizer),
    ]
    foreign = copy.deepcopy(tokenizer)
    foreign.add_special_tokens({"unk_token": foreign.convert_ids_to_tokens(tokenizer("e")["input_ids"][0])})
    letters = tmp_path / "letters.txt"
    letters.write_text("e e e " * 8000)
    cases.append((str(letters), "knows only", foreign))
    for name, words, reader in cases:
        with pytest.raises(InputError, match=words) as caught:
            patch(model, tokenizer=reader, calibration_data=name)
        assert "\n" not in str(caught.value)
        assert same(state(model), before)
        assert not hasattr(model.config, "crrelu")


@pytest.mark.parametrize("count", [2, 3, 4, 9])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_few_blocks_are_fitted_to_and_judged_by(family, count):
    blocks = torch.randint(3, 97, (count, 64), generator=torch.Generator().manual_seed(3))
    _, sites = patched(tiny_model(family), "fit", "crrelu", blocks)
    assert {site["kept"] for site in sites} == {"fit"}
    assert all(0 < site["relative_error"] < site["relative_error_naive"] for site in sites)
