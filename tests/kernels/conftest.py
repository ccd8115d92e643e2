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


@pytest.hookimpl(tryfirst=True)  # before pytest leaves the slow ones out
def pytest_collection_modifyitems(items):
    """Halves of one tensor are compiled loops of their own for every case: a minute and a half of a core together."""
    for item in items:
        if "halves" in item.name and "inductor" in item.name:
            item.add_marker(pytest.mark.slow)
