"""The gradual swap: λ, the mixture against its definition, and that nothing of it is saved."""

import copy
import math

import pytest
import torch
from tiny import logits, tiny_model, token_ids

from crrelu_llm import kernels
from crrelu_llm.activation import CRReLU
from crrelu_llm.errors import InputError
from crrelu_llm.patching import patch, section
from crrelu_llm.patching.activations import build_activation
from crrelu_llm.patching.blend import Blend, blend_weight, mix
from crrelu_llm.patching.modules.replace import swap_in
from crrelu_llm.training.blending import blend_of

CPU = torch.device("cpu")


def blended(name="gelu", new=None):
    """An activation under a blend from the activation `name`, in training mode, and its blend."""
    module = (new or CRReLU(epsilon_init=0.3)).train()
    return module, Blend([(module, "mlp.act", name, CPU)])


@pytest.fixture
def patched():
    """A tiny Llama, and the same patched to CRReLU, in training mode (it has no dropout), with its blend."""
    original = tiny_model("llama")
    model = copy.deepcopy(original)
    patch(model, "crrelu", epsilon_init=0.2, calibration="none")
    return original, model.train(), blend_of(model, section.read(model.config))


def test_lambda_follows_the_schedule():
    assert [blend_weight(step, 4) for step in range(7)] == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    for step in range(9):
        wanted = 0.5 * (1 - math.cos(math.pi * step / 8))
        assert blend_weight(step, 8, "cosine") == pytest.approx(wanted, abs=1e-15)
    assert blend_weight(0, 8, "cosine") == 0 and blend_weight(8, 8, "cosine") == 1
    assert blend_weight(0, 0) == 1


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.3, 1.0])
def test_the_mixture_is_its_definition(weight):
    module, blend = blended()
    blend.set(weight)
    x = torch.linspace(-6, 6, 257, dtype=torch.float64).requires_grad_()
    y = module.double()(x)
    module.blend.data = module.blend.data.float()
    exact = torch.tensor(weight, dtype=torch.float32).double()
    epsilon = module.epsilon.detach().clone().requires_grad_()
    z = x.detach().clone().requires_grad_()
    wanted = (1 - exact) * torch.nn.functional.gelu(z) + exact * kernels.crrelu(z, epsilon)
    torch.testing.assert_close(y, wanted, atol=1e-15, rtol=1e-15)
    y.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(x.grad, z.grad, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(module.epsilon.grad, epsilon.grad, atol=1e-13, rtol=1e-13)


def test_the_gradient_of_epsilon_is_scaled_by_lambda():
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for weight in (0.0, 0.25, 1.0):
        module, blend = blended()
        blend.set(weight)
        module(x).sum().backward()
        gradients.append(module.epsilon.grad.item())
    assert gradients[0] == 0
    assert gradients[1] == pytest.approx(0.25 * gradients[2], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_ends_are_exact_whatever_the_other_is(dtype):
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1.5], dtype=dtype)
    first, second = special.repeat_interleave(6), special.repeat(6)
    for weight, wanted in ((0.0, first), (1.0, second)):
        found = mix(first, second, torch.tensor(weight))
        assert found.dtype == dtype
        assert torch.equal(found.view(torch.int8), wanted.view(torch.int8))  # bit for bit, NaN and −0 too
    between = mix(first, second, torch.tensor(0.5))
    same = (first == second) & first.isinf()
    assert torch.equal(between[same], first[same])


def test_half_precision_is_mixed_in_float32():
    first, second = (torch.randn(999, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    first, second = first.bfloat16(), second.bfloat16()
    exact = 0.7 * first.double() + 0.3 * second.double()
    found = mix(first, second, torch.tensor(0.3))
    # Half a unit in the last place: rounded once. Computed in bfloat16 it would be rounded three times.
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() * 1.01 + 1e-6).all()


def test_the_ends_are_the_two_models(patched):
    original, model, blend = patched
    assert torch.equal(logits(model), logits(original))
    plain = tiny_model("llama")
    patch(plain, "crrelu", epsilon_init=0.2, calibration="none")
    blend.set(1.0)
    assert torch.equal(logits(model), logits(plain))
    blend.set(0.5)
    assert not torch.allclose(logits(model), logits(plain), atol=1e-2)
    assert not torch.allclose(logits(model), logits(original), atol=1e-2)
    assert torch.equal(logits(model.eval()), logits(plain))  # in evaluation mode: what would be saved


def test_the_original_can_be_asked_for_without_touching_lambda(patched):
    original, model, blend = patched
    blend.set(0.5)
    between = logits(model)
    loss = model(input_ids=token_ids()).logits.square().mean()
    with blend.original():
        assert torch.equal(logits(model), logits(original))
        assert torch.equal(logits(model.eval()), logits(original))
        model.train()
    assert torch.equal(logits(model), between)
    loss.backward()  # λ is saved for the backward pass: writing to it would be an error
    blend.set(1.0)
    with pytest.raises(ZeroDivisionError), blend.original():
        raise ZeroDivisionError
    assert not torch.equal(logits(model), logits(original))


def test_parameters_and_the_state_dict_stay_those_of_the_plain_model(patched, tmp_path):
    _, model, blend = patched
    plain = tiny_model("llama")
    patch(plain, "crrelu", epsilon_init=0.2, calibration="none")
    blend.set(0.5)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    model.save_pretrained(tmp_path / "saved")
    reloaded = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(reloaded.train()), logits(plain))
    # A reloaded model has to rebuild the original from its name.
    blend_of(reloaded, section.read(reloaded.config))
    assert torch.equal(logits(reloaded), logits(tiny_model("llama")))


def test_a_copy_blends_by_itself(patched):
    original, model, blend = patched
    twin = copy.deepcopy(model)
    blend.set(1.0)
    assert torch.equal(logits(twin), logits(original))


@pytest.mark.parametrize("target", ["gelu", "relu", "prelu"])
def test_other_targets_blend_alike(target):
    model = tiny_model("llama")
    patch(model, target, calibration="none")
    wanted = logits(model)
    blend = blend_of(model.train(), section.read(model.config))
    assert len(blend.modules) == 2
    assert torch.equal(logits(model), logits(tiny_model("llama")))
    blend.set(1.0)
    assert torch.equal(logits(model), wanted)


def test_lambda_goes_where_the_model_goes():
    module, blend = blended()
    blend.set(0.5)
    module.to("meta")
    assert module.blend.device.type == "meta"
    module, blend = blended()
    assert "blend" in dict(module.named_buffers()) and "blend" not in module.state_dict()
    assert module.blend.shape == () and module.blend.dtype == torch.float32


def test_an_original_with_parameters_is_refused():
    model = tiny_model("llama")
    swap_in(model, "model.layers.0.mlp.act_fn", build_activation("prelu"), None)
    with pytest.raises(InputError, match=r"original activation of mlp\.act, prelu, has parameters"):
        blended("prelu")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_recomputes_the_mixture(patched, checkpointing):
    _, model, blend = patched
    blend.set(0.4)
    gradients = []
    for on in (False, checkpointing):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.slow  # compiles: a minute or more of a busy core
def test_a_compiled_model_is_not_compiled_again_at_every_step(patched):
    _, model, blend = patched
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    found, frames = [], []
    for step in range(8):
        blend.set(blend_weight(step, 6))
        model.zero_grad()
        out = compiled(input_ids=token_ids()).logits
        out.square().mean().backward()
        found.append((out.detach(), model.get_submodule("model.layers.0.mlp.act_fn").epsilon.grad.clone()))
        frames.append(counter.frame_count)
    assert len(set(frames[:6])) == 1, frames
    assert frames[-1] <= 2 * frames[0], frames  # once more at the end, where the original is dropped
    torch._dynamo.reset()
    for step, (out, gradient) in enumerate(found):
        blend.set(blend_weight(step, 6))
        model.zero_grad()
        plain = model(input_ids=token_ids()).logits
        plain.square().mean().backward()
        torch.testing.assert_close(out, plain.detach(), atol=1e-5, rtol=1e-5)
        epsilon = model.get_submodule("model.layers.0.mlp.act_fn").epsilon
        torch.testing.assert_close(gradient, epsilon.grad, atol=1e-5, rtol=1e-4)
