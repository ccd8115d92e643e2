"""Pre-activations: the moments and the sample of what is really there, in one pass, and the model comes back whole."""

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import tiny_config, tiny_lfm2, tiny_model, token_ids

from crrelu_llm.activation import Calibrated
from crrelu_llm.eafo.models import preactivations
from crrelu_llm.errors import InputError


def gathered(model, ids, path):
    """All pre-activations of a site, `(tokens, channels)`, by a hook of the test's own."""
    kept = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].double()))
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    return torch.cat(kept).flatten(0, -2).numpy()


def test_moments_and_channels_are_those_of_all_pre_activations():
    model, ids = tiny_model("llama"), token_ids(10, 16)
    found = preactivations.measure(model, ids, samples=500)
    assert [site.path for site in found] == ["model.layers.0.mlp.act_fn", "model.layers.1.mlp.act_fn"]
    for site in found:
        x = gathered(model, ids, site.path)
        assert (site.original, site.count, site.samples.size) == ("silu", x.size, 500)
        # The model runs in batches, whose float32 sums differ from those of one.
        expected = [x.mean(), x.std(), stats.skew(x, axis=None), stats.kurtosis(x, axis=None)]
        assert [site.mean, site.std, site.skewness, site.kurtosis] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert np.allclose(site.channel_means, x.mean(axis=0), atol=1e-5)
        assert np.allclose(site.channel_stds, x.std(axis=0), atol=1e-5)


def test_a_mean_far_from_zero_costs_no_digits():
    seen = preactivations._Seen(200, [0, 0])
    x = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e5
    for batch in x.split(1000):
        seen.add(batch)
    site = seen.result(preactivations.Site("here", "act", "gelu", 5, "plain"))
    flat = x.numpy().ravel()
    expected = [flat.std(), stats.skew(flat), stats.kurtosis(flat)]
    assert [site.std, site.skewness, site.kurtosis] == pytest.approx(expected, abs=1e-8)


def test_the_sample_is_uniform_over_a_stream():
    counts = np.zeros(400)
    for seed in range(300):
        reservoir = preactivations._Reservoir(40, [seed])
        for part in torch.arange(400, dtype=torch.float64).split([30, 5, 165, 200]):
            reservoir.add(part)
        chosen = reservoir.values.astype(int)
        assert len(set(chosen.tolist())) == 40
        counts[chosen] += 1
    # Each number is in a tenth of the 300 samples: 30 times, with variance 27.
    assert stats.chi2.sf(((counts - 30) ** 2 / 27).sum(), 399) > 0.001


def test_a_seed_is_a_sample_and_another_one_another():
    model, ids = tiny_model("gpt2"), token_ids(10, 16)
    first, again, other = (preactivations.measure(model, ids, 300, seed)[1].samples for seed in (0, 0, 1))
    assert (first == again).all()
    assert set(first) != set(other)


def test_hidden_activations_are_measured_and_hidden_again():
    model = tiny_lfm2().train()
    before = [name for name, _ in model.named_modules()]
    assert [site.original for site in preactivations.measure(model, token_ids(8, 12), samples=200)] == ["silu", "silu"]
    assert [name for name, _ in model.named_modules()] == before
    assert model.training


def test_untrained_weights_follow_the_seed_and_leave_torchs_own_alone():
    model = tiny_model("gpt2")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two, three = (preactivations.untrained(model, seed) for seed in (0, 0, 1))
    assert torch.rand(1) == expected
    weights = [each.transformer.h[0].mlp.c_fc.weight for each in (one, two, three, model)]
    assert weights[0].equal(weights[1])
    assert not any(weights[0].equal(other) for other in weights[2:])


def test_pre_activations_without_a_density_are_refused():
    model = tiny_model("gpt2")
    with pytest.raises(InputError, match="50 per site are too few"):
        preactivations.measure(model, token_ids(), samples=50)
    torch.nn.init.zeros_(model.transformer.h[1].mlp.c_fc.weight)
    with pytest.raises(InputError, match=r"transformer.h.1.mlp.act: all its pre-activations .* are 0 .standard"):
        preactivations.measure(model, token_ids(), samples=200)
    torch.nn.init.constant_(model.transformer.h[1].mlp.c_fc.weight, float("nan"))
    with pytest.raises(InputError, match=r"transformer.h.1.mlp.act: its pre-activations .* are not finite"):
        preactivations.measure(model, token_ids(), samples=200)
    with pytest.raises(InputError, match="too few for a density; give more tokens"):
        preactivations.measure(tiny_model("llama"), token_ids(1, 2), samples=200)


def test_a_calibrated_activation_is_refused():
    model = tiny_model("gpt2")
    model.transformer.h[1].mlp.act = Calibrated(model.transformer.h[1].mlp.act, 8)
    with pytest.raises(InputError, match="calibrated activation, whose input is not the pre-activation"):
        preactivations.measure(model, token_ids(10, 16))


def test_a_model_without_sites_is_refused():
    from transformers import AutoModelForCausalLM

    config = tiny_config("gpt2").__class__.from_dict({"n_layer": 0, "n_embd": 32, "n_head": 4, "vocab_size": 97})
    with pytest.raises(InputError, match="no MLP"):
        preactivations.measure(AutoModelForCausalLM.from_config(config), token_ids())
