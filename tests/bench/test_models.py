"""The MLPs and models that bench compares: the same weights in every arm, in memory once."""

import pytest
import torch
from torch import nn

from crrelu_llm import CRReLU
from crrelu_llm.bench import mlp, patches, train
from crrelu_llm.patching import loading


@pytest.mark.parametrize("kind", mlp.KINDS)
def test_the_mlps_differ_in_the_activation_alone(kind):
    modules = {name: mlp.build_mlps(kind, 1, 8, 24, arm) for name, arm in patches.arms("channel").items()}
    weights = [
        [parameter for name, parameter in module.named_parameters() if not name.endswith("epsilon")]
        for module in modules.values()
    ]
    assert all(
        torch.equal(left, right) for others in weights[1:] for left, right in zip(weights[0], others, strict=True)
    )
    x = torch.randn(1, 5, 8)
    assert (
        len({tuple(module(x).flatten().tolist()) for module in modules.values()}) >= len(modules) - 2
    )  # calibrated and recomputed, CRReLU gives the same
    (crrelu,) = [module for module in modules[patches.CRRELU].modules() if isinstance(module, CRReLU)]
    assert crrelu.epsilon.shape == (24,) and not crrelu.is_calibrated
    (crrelu,) = [module for module in modules[patches.CALIBRATED].modules() if isinstance(module, CRReLU)]
    assert crrelu.is_calibrated and crrelu.scale.shape == (24,)
    gelu = [module for module in modules[patches.GELU].modules() if "GELU" in type(module).__name__]
    assert len(gelu) == 1 and torch.equal(gelu[0](x), nn.functional.gelu(x))


def test_a_lower_precision_leaves_epsilon_alone():
    module = mlp.build_mlps("gated", 1, 8, 24, patches.arms("layer")[patches.CRRELU])
    mlp._cast(module, torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    assert dtypes.pop("0.act_fn.epsilon") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_the_arms_of_a_model_share_weights_and_train(tiny_checkpoint):
    original = train._load(str(tiny_checkpoint), "float32", 16)
    before = {name: parameter.clone() for name, parameter in original.named_parameters()}
    patched = train._patched(original, patches.arms("layer")[patches.CRRELU])
    shared = dict(patched.named_parameters())
    assert all(shared[name] is parameter for name, parameter in original.named_parameters())
    assert sorted(set(shared) - set(before)) == ["transformer.h.0.mlp.act.epsilon", "transformer.h.1.mlp.act.epsilon"]
    assert not any(isinstance(module, CRReLU) for module in original.modules())

    steps = train._steps(original, patches.arms("layer"), 2, 16)
    assert list(steps)[:3] == ["native", "gelu", "crrelu"]
    for step in steps.values():
        step()
    assert all(parameter.grad is None for parameter in original.parameters())
    assert not torch.equal(original.transformer.wte.weight, before["transformer.wte.weight"])


def test_a_patched_model_starts_from_its_original(tiny_checkpoint, tmp_path):
    from crrelu_llm import patch

    model = loading.load_model(str(tiny_checkpoint))
    patch(model, "crrelu", calibration="none")
    model.save_pretrained(tmp_path)
    assert not any(isinstance(module, CRReLU) for module in train._load(str(tmp_path), "float32", 16).modules())
