"""The CRReLU function and module that users hold: checks, dtypes, construction, saving, training."""

import copy

import pytest
import torch

from crrelu_llm.activation import AFFINE, Calibrated, CRReLU, crrelu
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


FOUR = torch.tensor([[1.5, -0.5, 0.75, 2.0], [0.25, -1.0, 0.0, 0.5], [0.5, 2.0, -1.0, 1.25], [0.0, 0.5, -0.25, 1.0]])


def _set(module, four=FOUR):
    with torch.no_grad():
        for name, row in zip(AFFINE, four, strict=True):
            getattr(module, name).copy_(row)
    return module


def _around(function, x, four=FOUR):
    scale, shift, gain, offset = four.double()
    return gain * function(scale * (x.double() + shift)) + offset


def _made():
    """A calibrated CRReLU and calibrated activations with and without parameters."""
    return [
        (CRReLU(epsilon_init=0.3, calibrated=4), lambda t: _formula(t, torch.tensor(0.3))),
        (CRReLU(4, 0.3, calibrated=4), lambda t: _formula(t, torch.tensor(0.3))),
        (Calibrated(torch.nn.SiLU(), 4), torch.nn.functional.silu),
        (Calibrated(torch.nn.PReLU(4), 4), lambda t: torch.where(t > 0, t, t * 0.25)),
    ]


every_calibrated = pytest.mark.parametrize("index", range(4), ids=["layer", "channel", "SiLU", "PReLU"])


class TestCalibrated:
    """The four around CRReLU and around any other activation."""

    @every_calibrated
    def test_they_start_as_nothing_and_compute_the_form(self, index):
        module, function = _made()[index]
        x = torch.linspace(-4, 4, 24, dtype=torch.float64).reshape(6, 4)
        assert module.is_calibrated and not CRReLU().is_calibrated
        torch.testing.assert_close(module(x), function(x), rtol=1e-7, atol=1e-7)
        wanted = _around(function, x)
        torch.testing.assert_close(_set(module)(x), wanted, rtol=1e-7, atol=1e-7)
        for dtype in (torch.float32, torch.bfloat16):
            y = module.to(dtype)(x.to(dtype))
            assert y.dtype == dtype
            limits = {"rtol": torch.finfo(dtype).eps, "atol": 8 * torch.finfo(torch.float32).eps}
            exact = _around(function, x.to(dtype).double())
            if index < 2:
                limits["atol"] += 1e-3 * (dtype == torch.bfloat16)  # epsilon itself is rounded
            torch.testing.assert_close(y.double(), exact, **limits)

    @every_calibrated
    @pytest.mark.parametrize("trained", [False, True])
    def test_a_cast_leaves_the_four_float32(self, index, trained):
        module = _set(_made()[index][0])
        if trained:
            module.train_affine()
            module.scale.grad = torch.ones(4)
        for cast in (lambda: module.bfloat16(), lambda: module.to(torch.float16), lambda: module.half()):
            cast()
            for name, row in zip(AFFINE, FOUR, strict=True):
                assert getattr(module, name).dtype == torch.float32 and torch.equal(getattr(module, name).data, row)
        if trained:
            assert isinstance(module.scale, torch.nn.Parameter) and module.scale.grad.dtype == torch.float32
        assert module.double().scale.dtype == torch.float64
        assert module.to("meta").offset.is_meta

    @every_calibrated
    def test_saved_loaded_reset_and_built_on_the_meta_device(self, index):
        module = _set(_made()[index][0])
        saved = module.state_dict()
        assert set(AFFINE) <= set(saved)
        other = _made()[index][0]
        other.load_state_dict(saved)
        x = torch.randn(3, 4)
        assert torch.equal(other(x), module(x)) and torch.equal(copy.deepcopy(other)(x), module(x))
        other.load_state_dict({name: value.clone() for name, value in saved.items()}, assign=True)
        assert torch.equal(other(x), module(x))
        module.train_affine()
        assert set(module.state_dict()) == set(saved)
        other.load_state_dict(module.state_dict())
        other.reset_parameters(["gain"])
        assert other.gain.tolist() == [1.0] * 4 and torch.equal(other.scale, FOUR[0])
        with torch.device("meta"):
            empty = _made()[index][0]
        assert empty.scale.is_meta
        empty.to_empty(device="cpu").reset_parameters()
        assert [getattr(empty, name)[0].item() for name in AFFINE] == [1.0, 0.0, 1.0, 0.0]

    @every_calibrated
    def test_a_change_in_any_way_is_seen_at_the_next_call(self, index):
        module, function = _made()[index]
        x = torch.linspace(-2, 2, 8).reshape(2, 4)
        four = FOUR.clone()
        _set(module)(x)
        module.scale.data.mul_(2)  # no version counter sees it
        four[0] *= 2
        torch.testing.assert_close(module(x).double(), _around(function, x, four), rtol=1e-5, atol=1e-5)
        module.offset = torch.ones(4)
        four[3] = 1
        torch.testing.assert_close(module(x).double(), _around(function, x, four), rtol=1e-5, atol=1e-5)

    @every_calibrated
    def test_train_affine_gives_gradients_to_all(self, index):
        module = _set(_made()[index][0]).double()
        x, up = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
        before = module(x)
        module.train_affine()
        first = module.scale
        module.train_affine()
        assert module.scale is first and not list(module.buffers())
        torch.testing.assert_close(module(x), before)
        names = [name for name, _ in module.named_parameters()]

        def function(x, *values):
            arguments = (x, up) if isinstance(module, CRReLU) else (x,)
            return torch.func.functional_call(module, dict(zip(names, values, strict=True)), arguments)

        values = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
        assert torch.autograd.gradcheck(function, (x.requires_grad_(), *values))
        assert torch.autograd.gradgradcheck(function, (x, *values))

    @every_calibrated
    @pytest.mark.parametrize("trained", [False, True])
    def test_compiled_under_autocast_and_torch_func(self, index, trained):
        module = _set(_made()[index][0])
        if trained:
            module.train_affine()
        x = torch.randn(3, 4, requires_grad=True)
        expected = torch.autograd.grad(module(x).sum(), x)[0]
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], expected)
        by_row = torch.func.vmap(torch.func.grad(lambda row: module(row[None]).sum()))(x.detach())
        torch.testing.assert_close(by_row, expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x.bfloat16())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), module(x.bfloat16().float()), rtol=1e-2, atol=1e-2)

    def test_an_activation_that_works_in_place_leaves_the_input_alone(self):
        module, x = _set(Calibrated(torch.nn.ReLU(inplace=True), 4)), torch.randn(3, 4)
        before = x.clone()
        module(x)
        assert torch.equal(x, before)

    def test_what_does_not_fit_is_named_in_one_line(self):
        for call, said in (
            (lambda: CRReLU(4, calibrated=5), "num_channels is 4 and calibrated 5"),
            (lambda: CRReLU(calibrated=0), "calibrated must be at least 1, not 0"),
            (lambda: Calibrated(torch.nn.SiLU(), 0), "num_channels must be at least 1, not 0"),
            (lambda: CRReLU().train_affine(), "it is not calibrated"),
            (lambda: CRReLU(calibrated=4)(torch.zeros(2, 5)), "calibrated for 4 channels"),
            (lambda: Calibrated(torch.nn.SiLU(), 4)(torch.zeros(2, 5)), "calibrated for 4 channels"),
            (lambda: Calibrated(torch.nn.SiLU(), 4)(torch.zeros(2, 4).int()), "x must be floating point"),
        ):
            with pytest.raises(InputError, match=said) as caught:
                call()
            assert "\n" not in str(caught.value)

    def test_repr(self):
        assert repr(CRReLU(calibrated=6)) == "CRReLU(num_channels=None, epsilon_init=0.01, calibrated=6)"
        assert "num_channels=6" in repr(Calibrated(torch.nn.SiLU(), 6))
