"""Calibration as a whole: each level brings the model nearer to itself, never makes a layer worse, and reloads."""

import copy
import math

import pytest
import torch
from tiny import logits, tiny_lfm2, tiny_model, token_ids
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from crrelu_llm import CRReLU, patch, unpatch
from crrelu_llm.data import language_modelling_blocks
from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.perplexity import perplexity
from crrelu_llm.patching.calibration.tasks import MlpTask

BLOCKS = token_ids(8, 64, seed=5)
LEVELS = ("none", "fit", "refit", "reconstruct")


def state(model):
    """Everything that a failed patch could leave changed."""
    modules = [(path, id(module), module.training) for path, module in model.named_modules(remove_duplicate=False)]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return modules, hooks, {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one[:2] == other[:2] and all(torch.equal(value, other[2][name]) for name, value in one[2].items())


def patched(model, level, blocks=BLOCKS, activation="crrelu", **options):
    """A patched copy of a model and the report's sites."""
    model = copy.deepcopy(model)
    return model, patch(model, activation, calibration=level, blocks=blocks, **options).sites


@pytest.mark.parametrize("epsilon_per", ["layer", "channel"])
@pytest.mark.parametrize("checkpoint", ["tiny_checkpoint", "tiny_llama_checkpoint"])
def test_each_level_brings_the_model_nearer_to_itself(checkpoint, epsilon_per, request, text_file):
    directory = request.getfixturevalue(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    blocks = language_modelling_blocks(str(text_file), tokenizer, 8192, 128, "test")
    held = blocks[48:]
    with torch.no_grad():
        wanted = model(input_ids=held).logits.log_softmax(-1)
    distance = {}
    for level in LEVELS:
        changed, sites = patched(model, level, blocks[:48], epsilon_per=epsilon_per)
        with torch.no_grad():
            found = changed(input_ids=held).logits.log_softmax(-1)
        distance[level] = F.kl_div(found, wanted, log_target=True, reduction="sum").item() / held.numel()
        for site in sites:
            module = changed.get_submodule(site["path"])
            assert isinstance(module, CRReLU)
            assert site["epsilon_mean"] == pytest.approx(module.epsilon.mean().item())
            if level == "none":
                assert site["relative_error"] is None
            else:  # the tiny GPT-2 has biases: nothing that training could mend is left after the refit
                assert site["kept"] == level or (level, site["kept"]) == ("reconstruct", "refit")
    assert distance["none"] > 1.2 * distance["fit"] > 20 * distance["refit"]
    assert distance["reconstruct"] < distance["refit"] + 1e-8
    assert distance["reconstruct"] < 0.005 * distance["none"]
    native = perplexity(model, held)
    assert perplexity(changed, held) == pytest.approx(native, rel=0.01)


def assert_errors_are_real(model, changed, sites):
    """The reported error against the original MLP and the saved one, both on the patched model's own stream."""
    for site in sites:
        owner = site["path"].rpartition(".")[0].removesuffix(".act_fn")
        seen = []
        mlp = changed.get_submodule(owner)
        hook = mlp.register_forward_hook(lambda m, args, output, seen=seen: seen.append((args, output.clone())))
        with torch.no_grad():
            changed(input_ids=BLOCKS)
            hook.remove()
            original = model.get_submodule(owner)(*seen[0][0])
        error = ((seen[0][1] - original).norm() / (original - seen[0][0][-1] * (len(seen[0][0]) > 1)).norm()).item()
        assert error == pytest.approx(site["relative_error"], rel=0.5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "falcon", "bloom", "mixtral", "qwen2_moe", "lfm2"])
def test_no_layer_becomes_worse_and_all_reload(family, tmp_path):
    model = tiny_lfm2() if family == "lfm2" else tiny_model(family)
    errors = {}
    for level in LEVELS[1:]:
        changed, sites = patched(model, level)
        errors[level] = [site["relative_error"] for site in sites]
        for site in sites:
            assert 0 < site["relative_error"] <= site["relative_error_naive"]
        if level != "fit" and family not in ("mixtral", "qwen2_moe"):
            assert_errors_are_real(model, changed, sites)
        for site in sites:
            assert site["note"] is None or site["kept"] != level
        changed.save_pretrained(tmp_path / level)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / level)), logits(changed))
        assert changed.config.crrelu["weights_changed"] is any(s["kept"] in ("refit", "reconstruct") for s in sites)
    if family not in ("mixtral",):
        assert min(errors["refit"]) < 0.6 * min(errors["fit"])


def test_fused_experts_are_fitted_and_say_so():
    _, sites = patched(tiny_model("mixtral"), "refit")
    for site in sites:
        assert site["kept"] == "fit"
        assert "only epsilon" in site["note"]


def test_a_clamp_that_the_probe_does_not_reach_is_noticed():
    model = tiny_model("llama")

    class Clamped(torch.nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
                mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn
            )  # fmt: skip
            self.limit = 0.05

        def forward(self, x):
            up = self.up_proj(x)
            if len(x) > 1:  # the probe is a single sequence
                up = up.clamp(-self.limit, self.limit)
            return self.down_proj(self.act_fn(self.gate_proj(x)) * up)

    layer = model.model.layers[1]
    layer.mlp = Clamped(layer.mlp)
    changed, sites = patched(model, "refit")
    assert sites[0]["kept"] == "refit"
    assert sites[1]["kept"] == "fit" and "more than its weights say" in sites[1]["note"]
    assert torch.equal(changed.model.layers[1].mlp.up_proj.weight, layer.mlp.up_proj.weight)


def test_tied_layers_keep_their_weights():
    model = tiny_model("llama")
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(model.model.layers[1].mlp, name).weight = getattr(model.model.layers[0].mlp, name).weight
    _, sites = patched(model, "refit")
    assert [site["kept"] for site in sites] == ["fit", "fit"]


def test_an_expert_that_no_token_chose_is_left():
    model = tiny_model("qwen2_moe")
    blocks = torch.full((1, 2), 5)  # two tokens alike choose the same two experts of four
    for level in ("fit", "refit"):
        changed, sites = patched(model, level, blocks)
        assert torch.isfinite(logits(changed)).all()
        assert len(sites) == 4


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_every_target_gets_the_same_treatment(activation):
    model = tiny_model("llama")
    _, naive = patched(model, "none", activation=activation)
    _, sites = patched(model, "refit", activation=activation)
    assert [site["relative_error"] for site in naive] == [None, None]
    for site in sites:
        assert site["epsilon_mean"] is None
        if activation == "silu":  # the model's own: nothing to do
            assert (site["relative_error"], site["kept"]) == (0, "none")
        else:
            assert site["relative_error"] < 0.8 * site["relative_error_naive"]


def test_the_own_activation_changes_no_bit():
    model = tiny_model("llama")
    changed, _ = patched(model, "reconstruct", activation="silu")
    assert torch.equal(logits(changed), logits(model))
    assert changed.config.crrelu["weights_changed"] is False


@pytest.mark.parametrize("level", LEVELS[1:])
def test_the_same_text_gives_the_same_model(level):
    model = tiny_model("llama")
    (one, _), (other, _) = patched(model, level), patched(model, level)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("blocks", [BLOCKS[:1, :1], BLOCKS[:1, :9], BLOCKS[:2, :16]])
def test_a_handful_of_tokens_does_no_harm(level, blocks):
    model = tiny_model("gpt2")
    wanted = logits(model)
    naive = (logits(patched(model, "none")[0]) - wanted).norm()
    changed, sites = patched(model, level, blocks)
    assert (logits(changed) - wanted).norm() < 1.1 * naive
    if level != "fit":
        assert all(site["kept"] != level and "needs 128 tokens" in site["note"] for site in sites)


def test_dropout_and_mode_do_not_reach_the_calibration():
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    expected, _ = patched(model, "refit")
    found, _ = patched(model.train(), "refit")
    assert found.training
    assert torch.equal(logits(found.eval()), logits(expected))


def test_low_precision_weights_keep_their_dtype_and_epsilon_stays_float32():
    model = tiny_model("llama").bfloat16()
    changed, sites = patched(model, "refit")
    for name, value in changed.named_parameters():
        assert value.dtype == (torch.float32 if name.endswith("epsilon") else torch.bfloat16)
    assert all(site["kept"] == "refit" for site in sites)


def test_an_interrupted_calibration_puts_the_activations_back(monkeypatch, caplog):
    model = tiny_model("llama").train()
    before = state(model)
    with pytest.raises(IndexError):
        patch(model, calibration="fit", blocks=torch.full((1, 8), 1000))  # no such token
    assert same(state(model), before)
    calls = []

    solve = MlpTask.solve

    def interrupted(task, config, seed):
        calls.append(seed)
        if seed == 1:
            raise KeyboardInterrupt
        return solve(task, config, seed)

    monkeypatch.setattr(MlpTask, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patch(model, calibration="refit", blocks=BLOCKS)
    assert calls == [0, 1]
    assert state(model)[:2] == before[:2]
    assert not hasattr(model.config, "crrelu")
    assert "changed weights; load it again" in caplog.text  # the first layer's are folded


def test_inputs_that_are_all_zero_do_no_harm():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.zero_()
    changed, sites = patched(model, "reconstruct")
    assert sites[1]["relative_error"] == 0
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


def test_numbers_that_break_on_some_text_only_are_refused_too():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = math.inf
    blocks = torch.full((4, 64), 7)
    blocks[3, 10] = 50
    for level in ("fit", "refit"):
        with pytest.raises(InputError, match="not finite"):
            patch(copy.deepcopy(model), calibration=level, blocks=blocks)


def test_unpatch_says_that_weights_stay_changed_or_restores_them(caplog):
    model = tiny_model("llama")
    changed, _ = patched(model, "refit")
    again = copy.deepcopy(changed)
    unpatch(changed)
    assert "weights around the activations" in caplog.text
    assert not torch.equal(logits(changed), logits(model))
    caplog.clear()
    unpatch(again, original=model)
    assert not caplog.text
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(InputError, match="is not the model"):
        unpatch(patched(model, "refit")[0], original=tiny_model("gpt2"))


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
            patch(model, calibration="refit", tokenizer=reader, calibration_data=name)
        assert "\n" not in str(caught.value)
        assert same(state(model), before)
        assert not hasattr(model.config, "crrelu")


def test_quantised_weights_are_fitted_but_not_refitted(tmp_path):
    from transformers import BitsAndBytesConfig

    tiny_model("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    for options in ({"load_in_4bit": True}, {"load_in_8bit": True}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**options))
        with pytest.raises(InputError, match=r'"refit" changes weights.*quantised; use "fit"'):
            patch(model, calibration="refit", blocks=BLOCKS)
        sites = patch(model, calibration="fit", blocks=BLOCKS).sites
        assert all(site["kept"] == "fit" for site in sites)
        assert torch.isfinite(logits(model)).all()
