"""The level `refit`: the projection that follows is found by what flows, and changed as ridge regression says."""

import pytest
import torch
from tiny import tiny_lfm2, tiny_model, token_ids
from torch import nn

from crrelu_llm import find_sites
from crrelu_llm.patching.activations import build_activation
from crrelu_llm.patching.calibration import following
from crrelu_llm.patching.calibration.following import Refit, find_following, weights_of
from crrelu_llm.patching.modules.hidden import expose

IDS = token_ids(1, 24, seed=3)


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt2", "c_proj"), ("llama", "down_proj"), ("phi3", "down_proj"), ("opt", "fc2"), ("lfm2", "w2"),
        ("falcon", "dense_4h_to_h"), ("bloom", "dense_4h_to_h"), ("gpt_neox", "dense_4h_to_h"),
    ],
)  # fmt: skip
def test_the_projection_that_follows_is_found(family, name):
    model = tiny_lfm2() if family == "lfm2" else tiny_model(family)
    sites = find_sites(model)
    expose(model, [site.path for site in sites])
    names = {id(module): path for path, module in model.named_modules()}
    found = {path: names[id(module)] for path, module in find_following(model, sites, IDS).items()}
    assert list(found) == [site.path for site in sites]
    for path, projection in found.items():
        assert projection.rpartition(".")[2] == name
        assert projection.split(".")[:3] == path.split(".")[:3]


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-0.01, 0.01)


def between(mlp):
    mlp.down_proj = nn.Sequential(nn.LayerNorm(48), mlp.down_proj)


def clamped(mlp):
    projection = Clamped(48, 32, bias=False)
    projection.weight = mlp.down_proj.weight
    mlp.down_proj = projection


@pytest.mark.parametrize("change", [between, clamped])
def test_a_norm_in_between_or_a_layer_that_is_more_than_a_matrix_is_left_alone(change):
    model = tiny_model("llama")
    change(model.model.layers[1].mlp)
    found = find_following(model, find_sites(tiny_model("llama")), IDS)
    assert list(found) == ["model.layers.0.mlp.act_fn"]


def test_shared_weights_and_fused_experts_are_left_alone():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    assert find_following(model, find_sites(model), IDS) == {}
    assert find_following(tiny_model("mixtral"), find_sites(tiny_model("mixtral")), IDS) == {}


def refit(linear, original, activation, batches, factors):
    work = Refit(linear, original, activation)
    for held_back, x, factor in zip((False, False, True), batches, factors, strict=True):
        work.add(x, factor, held_back)
    return work.solve()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_the_change_is_the_least_squares_solution_with_added_rows(bias, gated, monkeypatch):
    monkeypatch.setattr(following, "_PENALTIES", (1e-2,))
    linear = nn.Linear(6, 4, bias=bias)
    before = {name: value.clone() for name, value in weights_of(linear).items()}
    x = normal(3, 200, 6)
    factors = normal(3, 200, 6, seed=1) if gated else [None] * 3
    original, activation = nn.SiLU(), build_activation("relu", 6, calibrated=True)
    assert refit(linear, original, activation, x, factors)
    with torch.no_grad():
        u = factors[:2].flatten(0, 1).double() if gated else 1.0
        h, new = (act(x[:2].flatten(0, 1)).double() * u for act in (original, activation))
        wanted = (h - new) @ before["weight"].double().T
        penalty = (1e-2 * new.square().sum(0).mean()).sqrt()
        columns = torch.cat([new, penalty * torch.eye(6).double()])
        if bias:
            columns = torch.cat([columns, torch.cat([torch.ones(400, 1), torch.zeros(6, 1)]).double()], 1)
        change = torch.linalg.lstsq(columns, torch.cat([wanted, torch.zeros(6, 4).double()])).solution
    after = weights_of(linear)
    torch.testing.assert_close(after["weight"], before["weight"] + change[:6].T.float(), rtol=1e-3, atol=1e-5)
    if bias:
        torch.testing.assert_close(after["bias"], before["bias"] + change[6].float(), rtol=1e-3, atol=1e-5)


def test_a_change_that_does_not_help_on_held_back_text_is_not_made():
    linear = nn.Linear(6, 4)
    before = {name: value.clone() for name, value in weights_of(linear).items()}
    few = [normal(3, 6), normal(2, 6, seed=1), 5 + normal(400, 6, seed=2)]  # as good as nothing to fit to
    activation = build_activation("gelu", 6, calibrated=True)
    refit(linear, nn.SiLU(), activation, [5 - few[0], 5 - few[1], few[2]], [None] * 3)
    after = weights_of(linear)
    with torch.no_grad():
        h, new = nn.functional.silu(few[2]), activation(few[2])
        wanted = h @ before["weight"].T + before["bias"]
        errors = [(new @ w["weight"].T + w["bias"] - wanted).norm() for w in (before, after)]
    assert errors[1] <= errors[0]
    nothing = Refit(linear, nn.SiLU(), activation)
    assert not nothing.solve()
    nothing.add(few[0], None, held_back=False)
    assert not nothing.solve()  # nothing to judge by
    assert not refit(nn.Linear(6, 4), nn.SiLU(), nn.SiLU(), torch.zeros(3, 8, 6), [None] * 3)
