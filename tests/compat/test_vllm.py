"""What the plugin for vLLM decides, without vLLM: refusals, and whose channels are whose. See tests/serving."""

import copy
from pathlib import Path

import pytest
import torch
from tiny import tiny_lfm2, tiny_model, token_ids
from torch import nn

from crrelu_llm import patch
from crrelu_llm.activation import AFFINE
from crrelu_llm.compat.vllm import check, leave_alone, materialise, share
from crrelu_llm.errors import InputError


@pytest.fixture(scope="module")
def llama():
    """A tiny Llama, patched and calibrated, one ε a channel."""
    model = tiny_model("llama")
    patch(model, "crrelu", epsilon_per="channel", blocks=token_ids(8, 64))
    return model


class Linear(nn.Linear):
    """A linear layer as vLLM's are seen from outside: what it holds of a larger one."""

    def __init__(self, whole, rank, size, by_input):
        width = (whole.in_features if by_input else whole.out_features) // size
        rows = slice(None) if by_input else slice(rank * width, (rank + 1) * width)
        columns = slice(rank * width, (rank + 1) * width) if by_input else slice(None)
        weight = whole.weight.detach()[rows, columns]
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        self.weight = nn.Parameter(weight.clone())
        self.tp_size, self.input_size, self.output_size = size, whole.in_features, whole.out_features
        if by_input:
            self.input_is_parallel = True
        else:
            self.gather_output = False


def part(model, rank, size):
    """The model as one of `size` processes has it, before its activations are narrowed."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.gate_proj, mlp.up_proj = (Linear(one, rank, size, False) for one in (mlp.gate_proj, mlp.up_proj))
        mlp.down_proj = Linear(mlp.down_proj, rank, size, True)
    return model


@pytest.mark.parametrize("size", [2, 3])
def test_the_parts_add_up_to_the_whole(llama, size):
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    parts = [part(llama, rank, size) for rank in range(size)]
    for rank, model in enumerate(parts):
        share(model, rank, size)
        module, whole = (one.model.layers[0].mlp.act_fn for one in (model, llama))
        for name in ("epsilon", *AFFINE):  # what a load gives them: the checkpoint's, whole
            tensor = getattr(module, name)
            assert tensor.shape == (48 // size,)
            tensor.data.fill_(7)
            tensor.weight_loader(tensor, getattr(whole, name).detach())
        share(model, rank, size)  # again, as for a model that is built twice: nothing more is cut off
    with torch.no_grad():
        expected = llama.model.layers[0].mlp(x)
        found = sum(model.model.layers[0].mlp(x) for model in parts)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_a_single_epsilon_and_unshared_layers_stay_whole(llama):
    single = tiny_model("llama")
    patch(single, calibration="none")
    shared = part(single, 0, 2)
    share(shared, 0, 2)
    assert shared.model.layers[0].mlp.act_fn.epsilon.shape == (1,)
    whole = copy.deepcopy(llama)  # vLLM does not share out the layers of every family: GPT-2's are whole everywhere
    share(whole, 0, 2)
    assert whole.model.layers[0].mlp.act_fn.scale.shape == (48,)


def test_buffers_without_memory_get_it_and_their_start_values(llama):
    model = copy.deepcopy(llama)
    module = model.model.layers[0].mlp.act_fn
    module.scale, module.offset = module.scale.to("meta"), module.offset.to("meta")
    shift = module.shift.clone()
    materialise(model, "cpu")
    assert module.scale.eq(1).all() and module.offset.eq(0).all() and torch.equal(module.shift, shift)


def test_a_model_built_before_vllm_in_one_process_can_still_be_called(llama):
    """vLLM makes the decoder's class a child of one of its own, which asks each model whether it is compiled."""
    wrapper = type("TorchCompileWithNoGuardsWrapper", (), {})
    decoder = type(llama.model)
    asking = type(decoder.__name__, (decoder, wrapper), {"__call__": _asks})
    model, x = copy.deepcopy(llama), torch.arange(3, 12)[None]
    model.model.__class__ = asking
    with torch.no_grad():
        expected = llama(x).logits
        with pytest.raises(AttributeError, match="do_not_compile"):
            model(x)
        leave_alone(model)
        assert torch.equal(model(x).logits, expected)
    assert not hasattr(model.lm_head, "do_not_compile")


def _asks(self, *args, **kwargs):
    assert self.do_not_compile
    return self.forward(*args, **kwargs)


class TestCheck:
    """What vLLM cannot serve is refused in one line."""

    def refused(self, model, words, model_impl="transformers", size=1):
        """Asserts that the model is refused with these words."""
        with pytest.raises(InputError, match=words) as caught:
            check(model.config, model_impl, size)
        assert "\n" not in str(caught.value)

    def test_a_patched_model_and_any_other_pass(self, llama):
        check(llama.config, "transformers", 2)
        check(tiny_model("llama").config, "auto", 5)

    @pytest.mark.parametrize("model_impl", ["auto", "vllm"])
    def test_under_its_own_code(self, llama, model_impl):
        self.refused(llama, "--model-impl transformers", model_impl)

    def test_sizes_that_do_not_divide(self, llama):
        self.refused(llama, "48 channels, which --tensor-parallel-size 5 does not divide", size=5)
        model = tiny_model("opt")  # has no plan of transformers: its MLPs are whole everywhere
        patch(model, calibration="none")
        check(model.config, "transformers", 5)

    def test_gpt2_on_several_processes(self):
        model = tiny_model("gpt2")
        patch(model, calibration="none")
        check(model.config, "transformers", 1)
        self.refused(model, "leave --tensor-parallel-size out", size=2)

    def test_fused_experts(self):
        model = tiny_model("mixtral")
        patch(model, calibration="none")
        self.refused(model, "fused experts")

    def test_a_newer_section(self, llama):
        newer = copy.deepcopy(llama)
        newer.config.crrelu = newer.config.crrelu | {"version": 99}
        self.refused(newer, "upgrade crrelu_llm")

    def test_activations_that_only_this_package_computes_pass(self):
        model = tiny_lfm2()
        patch(model, calibration="none")
        check(model.config, "transformers", 1)


def test_the_entry_point_names_the_plugin():
    import tomllib

    from crrelu_llm.compat import vllm

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    module, _, function = project["project"]["entry-points"]["vllm.general_plugins"]["crrelu_llm"].partition(":")
    assert module == vllm.__name__ and callable(getattr(vllm, function))
