"""How calibration goes through a model: the numbers of a whole forward pass, one layer at a time."""

import pytest
import torch
from tiny import FAMILIES, logits, tiny_model, token_ids
from transformers import AlbertForMaskedLM, AutoConfig

from crrelu_llm import find_sites
from crrelu_llm.patching.calibration import walk as walk_module
from crrelu_llm.patching.calibration.walk import Walk

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
        expected = inputs_while(model, sites, lambda: [model(input_ids=batch) for batch in walk.batches])
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
        expected = inputs_while(model, sites, lambda: [model(input_ids=batch) for batch in walk.batches])
    last = sites[-1].path  # its own layer was changed after it was seen, those before it were not
    for parameter in model.get_submodule(walk.layers[-1].path).parameters():
        parameter.data.div_(1.5)
    with torch.no_grad():
        expected = inputs_while(model, sites, lambda: [model(input_ids=batch) for batch in walk.batches])
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
        expected = inputs_while(model, sites, lambda: [model(input_ids=batch) for batch in walk.batches])
    for layer in walk:
        found = inputs_while(model, layer.sites, walk.run)
        for path, rows in found.items():
            assert torch.equal(rows, expected[path])


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
