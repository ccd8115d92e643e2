"""How calibration goes through a model: the numbers of a whole forward pass, and the right weights around a site."""

import pytest
import torch
from tiny import FAMILIES, logits, tiny_lfm2, tiny_model, token_ids
from transformers import AlbertForMaskedLM, AutoConfig

from crrelu_llm import find_sites
from crrelu_llm.patching.calibration import walk as walk_module
from crrelu_llm.patching.calibration.anatomy import find_mlps
from crrelu_llm.patching.calibration.walk import Walk
from crrelu_llm.patching.modules.hidden import expose

BLOCKS = token_ids(6, 20, seed=3)


def inputs_while(model, sites, run):
    """What enters each activation while `run` runs, in order."""
    seen = {site.path: [] for site in sites}
    hooks = [
        model.get_submodule(site.path).register_forward_pre_hook(
            lambda module, args, path=site.path: seen[path].append(args[0].detach().reshape(-1, args[0].shape[-1]))
        )
        for site in sites
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {path: torch.cat(rows) for path, rows in seen.items() if rows}


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_sees_what_a_whole_pass_sees(family):
    model = tiny_model(family)
    sites = find_sites(model)
    walk = Walk(model, sites, BLOCKS)
    assert walk.stepwise
    with torch.no_grad():
        expected = inputs_while(model, sites, lambda: [model(input_ids=batch) for batch in BLOCKS.split(4)])
    before = logits(model)
    for layer in walk:
        found = inputs_while(model, layer.sites, walk.run)
        assert set(found) == {site.path for site in layer.sites}
        for path, rows in found.items():
            assert torch.equal(rows, expected[path])
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_next_layer_sees_the_changed_one(family):
    model = tiny_model(family)
    sites = find_sites(model)
    found = {}
    walk = Walk(model, sites, BLOCKS)
    for layer in walk:
        found |= inputs_while(model, layer.sites, walk.run)
        with torch.no_grad():
            for parameter in model.get_submodule(layer.path).parameters():
                parameter.mul_(1.5)
    with torch.no_grad():
        expected = inputs_while(model, sites, lambda: [model(input_ids=batch) for batch in BLOCKS.split(4)])
    last = sites[-1].path  # its own layer was changed after it was seen, those before it were not
    for parameter in model.get_submodule(walk.layers[-1].path).parameters():
        parameter.data.div_(1.5)
    with torch.no_grad():
        expected = inputs_while(model, sites, lambda: [model(input_ids=batch) for batch in BLOCKS.split(4)])
    torch.testing.assert_close(found[last], expected[last])


def test_a_model_whose_layers_share_their_mlp_runs_whole():
    config = AutoConfig.for_model(
        "albert", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = AlbertForMaskedLM(config).eval()
    sites = find_sites(model)
    walk = Walk(model, sites, BLOCKS)
    assert not walk.stepwise  # one layer, run three times
    with torch.no_grad():
        expected = inputs_while(model, sites, lambda: [model(input_ids=batch) for batch in BLOCKS.split(4)])
    for layer in walk:
        found = inputs_while(model, layer.sites, walk.run)
        for path, rows in found.items():
            assert torch.equal(rows, expected[path])


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "gpt_neox", "opt", "bloom", "falcon", "lfm2"])
def test_the_weights_around_a_site_give_what_the_mlp_gives(family):
    model = tiny_lfm2() if family == "lfm2" else tiny_model(family)
    sites = find_sites(model)
    expose(model, [site.path for site in sites])
    mlps = find_mlps(model, sites, BLOCKS[:1])
    assert set(mlps) == {site.path for site in sites}
    before = logits(model)
    for site in sites:
        mlp = mlps[site.path]
        weights = mlp.read()
        seen = {}
        hooks = [
            mlp.gate.linear.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(x=args[0])),
            mlp.down.register_forward_hook(lambda m, args, output, seen=seen: seen.update(y=output.clone())),
        ]
        logits(model)
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(weights.output(seen["x"], model.get_submodule(site.path)), seen["y"])
        mlp.write(weights)
    assert torch.equal(logits(model), before)


def test_experts_and_norms_in_between_are_not_taken_for_plain_mlps():
    assert find_mlps(tiny_model("mixtral"), find_sites(tiny_model("mixtral")), BLOCKS[:1]) == {}
    model = tiny_model("llama")
    for layer in model.model.layers:  # something between the product and the projection
        layer.mlp.down_proj = torch.nn.Sequential(torch.nn.LayerNorm(48), layer.mlp.down_proj)
    assert find_mlps(model, [site for site in find_sites(tiny_model("llama"))], BLOCKS[:1]) == {}


@pytest.mark.parametrize("ends", ["done", "broken off"])
def test_layers_of_a_model_that_is_too_large_visit_the_gpu_one_at_a_time(monkeypatch, ends):
    """Another name of the CPU stands for the GPU: what is where is read off the moves."""
    model = tiny_model("llama", num_hidden_layers=3)
    sites = find_sites(model)
    names = {id(module): path for path, module in model.named_modules()}
    gpu, there = torch.device("cpu", 0), set()
    move = walk_module._move

    def moved(module, device, recurse=True):
        (there.add if device == gpu else there.discard)(names[id(module)])
        move(module, device, recurse)

    monkeypatch.setattr(walk_module, "computing_device", lambda model: gpu)
    monkeypatch.setattr(walk_module, "_move", moved)
    walk = Walk(model, sites, BLOCKS)
    seen = []
    for layer in walk:
        found = inputs_while(model, layer.sites, walk.run)
        assert len(found) == 1
        seen.append({path for path in there if ".layers." in path})
        assert {"model.embed_tokens", "model.rotary_emb", "model.norm"} <= there
        if ends == "broken off":
            break
    assert seen == [{f"model.layers.{index}"} for index in range(3 if ends == "done" else 1)]
    assert not there
