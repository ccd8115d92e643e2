"""The gated product in one call, and activations that are not kept, in patched models."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_config, tiny_lfm2, tiny_model
from transformers import AutoModelForCausalLM

from crrelu_llm import CRReLU, patch, unpatch
from crrelu_llm.patching.blend import Blend
from crrelu_llm.patching.modules.fused import fuse, unfuse

IDS = torch.arange(6, 30).view(2, 12)
# What one call serves: the MLPs of Llama and its kin, packed projections, fused experts, and a family whose activation
# is hidden in its forward.
ONE_CALL = {"llama": 2, "qwen3": 2, "gemma3_text": 2, "phi3": 2, "mixtral": 2, "lfm2": 2}


def model_of(family):
    return tiny_lfm2() if family == "lfm2" else tiny_model(family)


def paths(model):
    return [path for path, module in model.named_modules() if isinstance(module, CRReLU)]


def calls(model):
    """How many arguments every call of an activation has."""
    counts = []
    handles = [
        module.register_forward_hook(lambda module, args, output: counts.append(len(args)))
        for module in model.modules()
        if isinstance(module, CRReLU)
    ]
    with torch.no_grad():
        model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    return counts


def step(model, run=None):
    """The loss and the gradients of one training step; `run` calls the model in another way."""
    model.zero_grad()
    logits = (model if run is None else run)(input_ids=IDS).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_bits(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


def kept_bytes(model):
    """Bytes that a forward pass keeps for the backward pass beside the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = {}

    def pack(tensor):
        memory = tensor.untyped_storage()
        found[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=IDS, labels=IDS)
    return sum(size for pointer, size in found.items() if pointer not in parameters)


@pytest.mark.parametrize("family", ONE_CALL)
def test_gate_and_up_go_through_one_call(family):
    model = model_of(family)
    patch(model, epsilon_init=0.3, calibration="none")
    if family == "mixtral":
        model.set_experts_implementation("grouped_mm")
    assert calls(model) == [2] * ONE_CALL[family]
    fused = step(model)
    unfuse(model, paths(model))
    assert calls(model) == [1] * ONE_CALL[family]
    plain = step(model)
    assert fused[0] == pytest.approx(plain[0], rel=1e-6)
    for name, gradient in plain[1].items():
        torch.testing.assert_close(fused[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_other_activations_keep_their_mlp(activation):
    model = tiny_model("llama")
    before = {path: type(module) for path, module in model.named_modules() if path.endswith("mlp")}
    patch(model, activation, calibration="none")
    assert {path: type(model.get_submodule(path)) for path in before} == before


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", [*ONE_CALL, "gpt2", "opt"])
def test_unpatch_gives_every_module_its_class_back(family, recompute):
    model = model_of(family)
    classes = {path: type(module) for path, module in model.named_modules()}
    patch(model, recompute_activation=recompute, calibration="none")
    unpatch(model)
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert not any("_unfused" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_copies_and_pickles_compute_the_same(family, recompute):
    model = tiny_model(family)
    patch(model, epsilon_init=0.3, recompute_activation=recompute, calibration="none")
    expected, kept = step(model), kept_bytes(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(step(other), expected)
        assert kept_bytes(other) == kept
        with torch.no_grad():  # a copy has its own ε
            paths_of = [other.get_submodule(path).epsilon.add_(1.0) for path in paths(other)]
        assert paths_of and step(other)[0] != expected[0]
    assert_same_bits(step(model), expected)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "bloom", "mixtral", "qwen2_moe", "lfm2"])
def test_recompute_gives_the_same_bits_and_keeps_less(family, tmp_path):
    model = model_of(family)
    patch(model, epsilon_init=0.3, epsilon_per="channel", calibration="none")
    expected, kept = step(model), kept_bytes(model)
    unpatch(model)
    patch(model, epsilon_init=0.3, epsilon_per="channel", recompute_activation=True, calibration="none")
    assert_same_bits(step(model), expected)
    if family == "bloom":  # it computes its first linear layer and its activation in one expression, which is kept
        assert kept_bytes(model) <= kept
    else:
        assert kept_bytes(model) < kept
    less = kept_bytes(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert kept_bytes(again) == less


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recompute_under_gradient_checkpointing(family, use_reentrant):
    model = tiny_model(family).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    patch(model, epsilon_init=0.3, recompute_activation=True, calibration="none")
    expected = step(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_same_bits(step(model), expected)


def test_checkpointing_frees_as_much_with_recompute():
    model = tiny_model("llama").train()
    patch(model, calibration="none")
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    model.gradient_checkpointing_enable(**options)
    without = kept_bytes(model)
    fuse(model, paths(model), recompute=True)
    assert kept_bytes(model) == without


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recompute_with_lora(family):
    found = []
    for recompute in (False, True):
        model = tiny_model(family)
        patch(model, epsilon_init=0.3, recompute_activation=recompute, calibration="none")
        torch.manual_seed(0)
        config = LoraConfig(target_modules="all-linear", modules_to_save=paths(model), init_lora_weights=False)
        adapted = get_peft_model(model, config)
        found.append((step(adapted), kept_bytes(adapted)))
    assert_same_bits(found[1][0], found[0][0])
    assert any("epsilon" in name for name in found[1][0][1]) and any("lora_A" in name for name in found[1][0][1])
    assert found[1][1] < found[0][1]


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_a_blend_of_a_gated_product_in_one_call(weight):
    native = tiny_model("llama").train()
    model = tiny_model("llama").train()
    patch(model, epsilon_init=0.3, calibration="none")
    separate = copy.deepcopy(model)
    unfuse(separate, paths(separate))
    logits = []
    for one in (model, separate):
        found = [(one.get_submodule(path), path, "silu", torch.device("cpu")) for path in paths(one)]
        Blend(found).set(weight)
        logits.append(one(input_ids=IDS).logits)
    torch.testing.assert_close(*logits)
    if weight == 0.0:
        assert torch.equal(logits[0], native(input_ids=IDS).logits)


def test_a_compiled_patched_model_has_no_graph_break():
    for family in ("llama", "phi3", "gpt2"):
        model = tiny_model(family)
        patch(model, epsilon_init=0.3, recompute_activation=True, calibration="none")
        expected = step(model)
        torch._dynamo.reset()
        found = step(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        for name, gradient in expected[1].items():
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_a_wrapped_or_generated_forward_is_left_alone():
    model = tiny_model("llama")
    cls = type(model.model.layers[0].mlp)

    class Another(cls):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in model.model.layers:
        layer.mlp.__class__ = Another
    patch(model, calibration="none")
    assert all(type(layer.mlp) is Another for layer in model.model.layers)
    assert tiny_config("llama").hidden_act == "silu"


def test_recompute_can_be_added_to_a_patched_model():
    model = tiny_model("llama")
    patch(model, calibration="none")
    patch(model, recompute_activation=True, calibration="none")
    assert all(layer.mlp.recomputes for layer in model.model.layers)


def test_gate_and_up_of_two_dtypes():
    model = tiny_model("llama")
    patch(model, epsilon_init=0.3, calibration="none")
    mlp = model.model.layers[0].mlp
    gate, up = torch.randn(3, 48), torch.randn(3, 48, dtype=torch.float64)
    assert torch.equal(mlp.act_fn(gate, up), mlp.act_fn(gate) * up)
