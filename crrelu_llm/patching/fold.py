"""Folds scale, shift, gain and offset (the four) into the weights, for formats that know only the activation."""

import torch
from torch import Tensor, nn

from crrelu_llm.activation import AFFINE, AffineModule, Calibrated, CRReLU
from crrelu_llm.errors import InputError
from crrelu_llm.patching.calibration.following import Flow, matrix
from crrelu_llm.patching.finite import evaluating
from crrelu_llm.patching.modules.replace import swap_in
from crrelu_llm.patching.sites import Site

Linears = dict[str, tuple[nn.Module, nn.Module]]  # before and after, by the path of the site
_WHY_NOT = {
    "gated": "the offset is multiplied by the up-projection, which no bias can take",
    "experts": "the offset is multiplied by the up-projection, which no bias can take",
    "functional": "the activation is inside a method, with no layers of its own around it",
}
_INSTEAD = "leave --fold out: the calibrated checkpoint computes the same"


def find_linears(model: nn.Module, sites: list[Site], input_ids: Tensor) -> Linears:
    """The linear layers before and after each site, into which its four can be folded.

    Args:
        model: The model, patched or not.
        sites: Its sites.
        input_ids: A few tokens, `(1, tokens)`, int64.

    Raises:
        InputError: A site cannot be folded; the message says why.
    """
    for site in sites:
        if site.kind != "plain":
            raise InputError(f"--fold: {site.path} is in a {site.kind} MLP ({_WHY_NOT[site.kind]}); {_INSTEAD}")
    with evaluating(model):
        flow = Flow(model, sites, input_ids)
    found = {}
    for site in sites:
        uses = flow.uses.get(site.path, [])
        before, after = (flow.before(uses[0].x), flow.after(uses[0].product)) if len(uses) == 1 else (None, None)
        if before is None or after is None:
            raise InputError(f"--fold: {site.path} is not between two linear layers of its own; {_INSTEAD}")
        for linear, what in ((before, "shift"), (after, "offset")):
            if getattr(linear, "bias", None) is None:
                raise InputError(f"--fold: the layers around {site.path} have no bias to take the {what}; {_INSTEAD}")
        found[site.path] = (before, after)
    return found


@torch.no_grad()
def fold(model: nn.Module, linears: Linears) -> None:
    """Moves the four of each site into the layers around it, in place, and leaves the plain activation with its ε.

    `gain·f(scale·(x + shift)) + offset` stands between x = Wx' + b and V, c. W and b + shift are multiplied by the
    scale and V's columns by the gain; V·offset is added to c. Exact up to rounding.

    Args:
        model: A calibrated model; the caller must then rewrite the section in its config.
        linears: The result of `find_linears`.
    """
    for path, (before, after) in linears.items():
        module = model.get_submodule(path)
        if not isinstance(module, AffineModule) or module.scale is None:
            continue
        scale, shift, gain, offset = (getattr(module, name).double() for name in ("scale", "shift", "gain", "offset"))
        _set(matrix(before), matrix(before).double() * scale[:, None])
        _set(before.bias, (before.bias.double() + shift) * scale)
        _set(after.bias, after.bias.double() + matrix(after).double() @ offset)
        _set(matrix(after), matrix(after).double() * gain)
        swap_in(model, path, _plain(module), module.__dict__.get("_original", [None])[0])


def _plain(module: AffineModule) -> nn.Module:
    if isinstance(module, Calibrated):
        plain = module.activation
        plain.__dict__["activation_name"] = module.__dict__["activation_name"]
        return plain
    assert isinstance(module, CRReLU)
    plain = type(module)(module.num_channels, module.epsilon_init)
    plain.load_state_dict({name: value for name, value in module.state_dict().items() if name not in AFFINE})
    return plain


def _set(target: Tensor, value: Tensor) -> None:
    target.detach().copy_(value)
