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


@pytest.fixture
def cuda():
    """A CUDA device where Triton computes; the test fails if it fell back."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    kernels.set_backend("triton")
    yield torch.device("cuda")
    failed = dict(choice._failed)
    kernels.set_backend(None)
    assert failed == {}


# Every dtype, form and kind of ε is a compiled loop of its own, seconds of a core: of these cases, by parts of their
# names, the default run has each value, but not each combination.
_SLOW_WHERE_COMPILED = {
    "test_error_is_below_twice_that_of_the_plain_formula": [{"1", "torch.float16"}],
    "test_error_is_below_twice_that_of_the_unfused_product": [
        {"packed", "torch.float32"},
        {"packed", "torch.float16"},
        {"separate", "layer", "torch.bfloat16"},
    ],
    "test_low_precision_results_are_the_exact_ones_rounded_once": [{"packed", "torch.float16"}],
    "test_infinity_and_nan_of_gate_and_up": [{"packed", "torch.float32"}, {"packed", "torch.float16"}],
    "test_autocast_changes_nothing": [{"torch.bfloat16"}],
    "test_odd_shapes_gated_and_packed_agree_with_the_definition": [{"False"}, {"(150, 1)"}],
    "test_every_dtype_computes_in_float32_and_rounds_once": [{"torch.float16"}],
    "test_infinities_and_nan": [{"torch.float16"}],
    "test_ones_and_zeros_are_plain_crrelu": [set()],
}


@pytest.hookimpl(tryfirst=True)  # before pytest leaves the slow ones out
def pytest_collection_modifyitems(items):
    """Marks slow what is compiled and covered by others: halves of one tensor, and the combinations above."""
    for item in items:
        parts = set(item.callspec.id.split("-")) if hasattr(item, "callspec") else set()
        cases = [{"halves"}, *_SLOW_WHERE_COMPILED.get(getattr(item, "originalname", ""), [])]
        if "inductor" in parts and any(case <= parts for case in cases):
            item.add_marker(pytest.mark.slow)
