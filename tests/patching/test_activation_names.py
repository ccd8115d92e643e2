"""Activations by their names: the name of a module leads back to its class."""

import pytest
from transformers.activations import ACT2FN

from crrelu_llm.patching.activations import activation_name, activation_names, build_activation


@pytest.mark.parametrize("name", ACT2FN)
def test_activation_name_leads_back_to_the_same_class(name):
    module = ACT2FN[name]
    assert type(ACT2FN[activation_name(module)]) is type(module)


@pytest.mark.parametrize("name", ["elu", "celu", "selu"])
def test_what_only_torch_has_is_patched_and_reloaded(name, tmp_path):
    import torch
    from pictures import logits, vit

    from crrelu_llm import patch

    assert name in activation_names() and activation_name(build_activation(name)) == name
    model = vit()
    patch(model, name, calibration="none")
    assert type(model.vit.layers[1].mlp.activation_fn).__name__ == name.upper()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))
