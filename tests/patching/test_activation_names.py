"""Activations by their names: the name of a module leads back to its class."""

import pytest
from transformers.activations import ACT2FN

from crrelu_llm.patching.activations import activation_name


@pytest.mark.parametrize("name", ACT2FN)
def test_activation_name_leads_back_to_the_same_class(name):
    module = ACT2FN[name]
    assert type(ACT2FN[activation_name(module)]) is type(module)
