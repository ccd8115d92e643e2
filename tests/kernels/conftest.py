"""The backend under test, chosen for the whole process and given back."""

import pytest
import torch

from crrelu_llm import kernels
from crrelu_llm.kernels import choice


@pytest.fixture
def backend(request):
    """Name of the backend that computes every CRReLU of the test; the test fails if another one had to."""
    kernels.set_backend(request.param)
    name, reason = choice.choose(torch.device("cpu"), torch.float32, 1)
    if name != request.param:
        kernels.set_backend(None)
        pytest.skip(reason)
    yield name
    failed = dict(choice._failed)
    kernels.set_backend(None)
    assert failed == {}
