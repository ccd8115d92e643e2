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


# Every dtype, form and kind of ε is a compiled loop of its own, 4 to 10 seconds of a core. Of these cases, by parts of
# their names, the default run has the plain function in float64 and float32, gated and packed products in float64
# (calibrated, or one ε a layer) and in bfloat16, which has a series of its own, and the calibrated form in both; the
# derivatives of what has one ε a layer, the calibrated form's with one a channel.
_SLOW_WHERE_COMPILED = {
    # test_backends.py, and of the same name test_affine.py
    "test_values_and_derivatives_are_those_of_the_closed_form": [set()],
    "test_first_and_second_gradients_of_x_and_epsilon": [{"5"}],
    "test_odd_shapes_agree_with_the_definition": [
        {"(3, 2, 7)"},
        {"plain"},
        {"packed"},
        {"gated", "False"},
        {"gated", "(150, 1)"},
    ],
    "test_several_blocks_agree_with_the_definition": [set()],  # the blocks are those of the other backends
    "test_a_scalar_stays_a_scalar": [set()],
    "test_error_is_below_twice_that_of_the_plain_formula": [{"torch.float16"}, {"torch.bfloat16"}, {"64"}],
    "test_low_precision_results_are_the_exact_ones_rounded": [set()],
    "test_gradient_of_epsilon_is_summed_in_float32": [set()],
    "test_zero_infinity_nan_and_the_ends_of_the_range": [{"torch.float16"}, {"torch.bfloat16"}, {"torch.float64"}],
    "test_only_x_and_epsilon_are_saved": [set()],
    "test_autocast_changes_nothing": [{"torch.bfloat16"}],
    # test_gated.py
    "test_value_and_gradients_are_those_of_the_definition": [{"channel"}, {"packed"}, {"(9, 1)"}],
    "test_a_product_of_scalars_is_a_scalar": [set()],
    "test_error_is_below_twice_that_of_the_unfused_product": [
        {"torch.float32"},
        {"torch.float16"},
        {"packed", "channel"},
        {"layer"},
    ],
    "test_low_precision_results_are_the_exact_ones_rounded_once": [{"packed"}, {"torch.float16"}],
    "test_infinity_and_nan_of_gate_and_up": [{"packed"}, {"torch.float16"}, {"torch.float32"}],
    "test_only_the_inputs_are_saved": [{"True"}],
    "test_frozen_inputs_get_no_gradient": [set()],
    "test_per_sample_gradients_with_torch_func": [{"packed"}, {"5"}],
    "test_the_packed_gradient_is_contiguous": [set()],
    "test_compiles_as_one_graph": [{"separate"}, {"layer"}, {"16"}],  # the last is test_backends.py's
    # test_affine.py
    "test_first_and_second_gradients": [{"channel"}, {"packed"}, {"1"}],  # of test_gated.py too
    "test_every_dtype_computes_in_float32_and_rounds_once": [{"torch.float16"}, {"torch.float32"}, {"torch.float64"}],
    "test_infinities_and_nan": [{"torch.float16"}, {"torch.float32"}, {"torch.float64"}],
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
