"""The CRReLU function and module that users hold: checks, dtypes, construction, saving, training."""

import copy

import pytest
import torch

from crrelu_llm.activation import CRReLU, crrelu
from crrelu_llm.errors import InputError


def _formula(x, epsilon):
    x, epsilon = x.double(), epsilon.double()
    return x.clamp(min=0) + epsilon * x * (-0.5 * x**2).exp()


@pytest.fixture
def low_precision_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("num_channels", [None, 6])
def test_module_computes_the_formula(num_channels):
    x = torch.linspace(-4, 4, 24, dtype=torch.float64).reshape(2, 2, 6)
    activation = CRReLU(num_channels, epsilon_init=0.3)
    assert activation.epsilon.shape == (num_channels or 1,)
    torch.testing.assert_close(activation(x), _formula(x, activation.epsilon), rtol=1e-14, atol=1e-15)


def test_module_needs_no_arguments_and_starts_at_the_papers_value():
    activation = CRReLU()
    assert activation.epsilon.dtype == torch.float32 and activation.epsilon.requires_grad
    assert activation.epsilon.tolist() == [pytest.approx(0.01)]
    assert [name for name, _ in activation.named_parameters()] == ["epsilon"]


@pytest.mark.parametrize("num_channels", [None, 6])
def test_epsilon_is_float32_whatever_the_default_dtype(low_precision_default, num_channels):
    assert CRReLU(num_channels).epsilon.dtype == torch.float32


@pytest.mark.parametrize("num_channels", [None, 6])
def test_module_is_built_on_the_meta_device_and_then_filled(num_channels):
    with torch.device("meta"):
        activation = CRReLU(num_channels, epsilon_init=0.5)
    assert activation.epsilon.is_meta and CRReLU(device="meta").epsilon.is_meta
    assert activation(torch.empty(3, 6, device="meta")).shape == (3, 6)
    activation.to_empty(device="cpu").reset_parameters()
    assert activation.epsilon.tolist() == [0.5] * (num_channels or 1)


def test_reset_works_where_the_init_functions_are_turned_off(monkeypatch):
    monkeypatch.setattr(torch.nn.init, "constant_", lambda tensor, value: tensor)
    monkeypatch.setattr(torch.nn.init, "zeros_", lambda tensor: tensor)
    activation = CRReLU(4, epsilon_init=0.25)
    with torch.no_grad():
        activation.epsilon.fill_(9.0)
    activation.reset_parameters()
    assert activation.epsilon.tolist() == [0.25] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("epsilon_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_has_the_dtype_of_x_and_epsilon_is_widened(dtype, epsilon_dtype):
    x = torch.linspace(-4, 4, 33, dtype=torch.float64).to(dtype)
    activation = CRReLU(epsilon_init=0.3).to(epsilon_dtype)
    assert activation.epsilon.dtype == epsilon_dtype
    y = activation(x)
    assert y.dtype == dtype
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), _formula(x, activation.epsilon), rtol=tolerance, atol=1e-7)
    y.sum().backward()
    assert activation.epsilon.grad.dtype == epsilon_dtype


def test_a_deep_copy_is_independent():
    original = CRReLU(3)
    duplicate = copy.deepcopy(original)
    with torch.no_grad():
        duplicate.epsilon.fill_(0.7)
    assert original.epsilon.tolist() == pytest.approx([0.01] * 3)
    x = torch.randn(2, 3, requires_grad=True)
    copy.deepcopy(duplicate)(x).sum().backward()
    assert x.grad is not None


def test_state_dict_round_trip_is_exact():
    source, target = CRReLU(3), CRReLU(3)
    with torch.no_grad():
        source.epsilon.copy_(torch.tensor([0.1, -0.2, 1 / 3]))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source.epsilon, target.epsilon)


def test_epsilon_learns_what_generated_the_data():
    x = torch.linspace(-3, 3, 60).reshape(20, 3)
    target = _formula(x, torch.tensor([0.5, -0.25, 0.1])).float()
    activation = CRReLU(3)
    optimizer = torch.optim.LBFGS(activation.parameters(), max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = (activation(x) - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert activation.epsilon.tolist() == pytest.approx([0.5, -0.25, 0.1], abs=1e-4)


def test_module_compiles_as_one_graph():
    torch._dynamo.reset()
    activation = CRReLU(5, epsilon_init=0.3)
    x = torch.randn(2, 5, requires_grad=True)
    y = torch.compile(activation, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, activation(x))
    y.sum().backward()
    assert x.grad is not None and activation.epsilon.grad.abs().sum() > 0


def test_module_inside_an_autocast_model_keeps_a_float32_gradient():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), CRReLU(8), torch.nn.Linear(8, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.randn(3, 4))
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert model[1].epsilon.grad.dtype == torch.float32 and model[1].epsilon.grad.abs().sum() > 0


def test_repr_names_both_settings():
    assert repr(CRReLU(6, 0.3)) == "CRReLU(num_channels=6, epsilon_init=0.3)"
    assert repr(CRReLU()) == "CRReLU(num_channels=None, epsilon_init=0.01)"


@pytest.mark.parametrize(
    ("x", "epsilon", "fragments"),
    [
        (torch.zeros(2, 4), torch.zeros(3), ["(3,)", "(2, 4)", "(1,) or (4,)"]),
        (torch.zeros(2, 4), torch.zeros(2, 4), ["(2, 4)", "(1,) or (4,)"]),
        (torch.zeros(2, 4), torch.tensor(0.1), ["shape ()", "(1,) or (4,)"]),
        (torch.zeros(()), torch.zeros(3), ["(3,)", "takes (1,)"]),
        (torch.zeros(4, dtype=torch.int64), torch.zeros(1), ["x must", "torch.int64"]),
        (torch.zeros(4, dtype=torch.complex64), torch.zeros(1), ["x must", "torch.complex64"]),
        (torch.zeros(4), torch.zeros(1, dtype=torch.int32), ["epsilon must", "torch.int32"]),
        (torch.zeros(4), 0.01, ["epsilon must be a tensor", "0.01"]),
        ([1.0], torch.zeros(1), ["x must be a tensor", "[1.0]"]),
    ],
    ids=range(9),
)
def test_wrong_input_is_named_in_one_line(x, epsilon, fragments):
    with pytest.raises(InputError) as caught:
        crrelu(x, epsilon)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_module_rejects_input_of_another_width():
    with pytest.raises(InputError, match=r"\(8,\)"):
        CRReLU(8)(torch.zeros(2, 4))


@pytest.mark.parametrize("num_channels", [0, -1])
def test_module_rejects_a_width_below_one(num_channels):
    with pytest.raises(InputError, match=f"not {num_channels}"):
        CRReLU(num_channels)
