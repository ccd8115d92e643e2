"""Finds the sites of a model: the activation modules of its MLPs, distinguished from others by structure."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from crrelu_llm.activation import CRReLU
from crrelu_llm.errors import InputError
from crrelu_llm.patching.activations import PEFT_WRAPPER, activation_name
from crrelu_llm.patching.modules.hidden import SigmoidGate, SoftcappedSiLU, hidden_activation, is_exposed

# Parts of a model: its main layers (the decoder of a language model, the encoder of an image model), or
# the vision tower beside them.
PARTS = ("main", "vision", "all")
_VISION = "vision tower"
# A path component that shows that the modules below it are not the MLP of a decoder layer.
_ELSEWHERE = {
    _VISION: re.compile(r"vision|visual|image|vit\b|vq"),
    "audio tower": re.compile(r"audio|speech|wav"),
    "projector": re.compile(r"projector|connector|resampler|merger"),
    "head": re.compile(r"^(predictions|lm_head|cls|classifier|score|pooler|generator_predictions)$"),
    "router": re.compile(r"router|^gate$"),
    "adapter": re.compile(r"adapter"),
    "normalisation": re.compile(r"(?<!pre)layernorm$|_norm$"),  # not the name roberta_prelayernorm
    "attention": re.compile(r"attn|attention|xlstm|mlstm"),
    "state-space mixer": re.compile(r"mamba|ssm"),
    "short convolution": re.compile(r"conv"),
}
# Direct children of an activation's owner which show that it is not an MLP, although it has linear layers.
_FOREIGN_SIBLINGS = {"per_layer_input_gate": "per-layer input gate"}
_DOWN_NAMES = (
    "down_proj",
    "c_proj",
    "dense_4h_to_h",
    "fc2",
    "fc_out",
    "w2",
    "wo",
    "lin2",
    "output_linear",
    "out_proj",
    "weights_out",
)


@dataclass(frozen=True)
class Site:
    """One MLP activation of a model.

    Attributes:
        path: Module path of the activation, e.g. `model.layers.0.mlp.act_fn`.
        attribute: The attribute's name in the module that owns it, e.g. `act_fn`.
        original: Name of the activation found there: its name in transformers' ACT2FN, if any.
        num_channels: Width of its input's last dimension.
        kind: `"gated"`, `"plain"`, `"experts"` (fused 3-D expert weights), or `"functional"`: the family computes the
            activation inside a method, and `patch` first makes it a module (modules/hidden.py); until then there is
            nothing at `path`.
    """

    path: str
    attribute: str
    original: str
    num_channels: int
    kind: str

    @property
    def owner(self) -> str:
        """Path of the module that owns the activation."""
        return self.path.rpartition(".")[0]

    @property
    def layer(self) -> str:
        """Path of the layer that the site is in: up to the first number, as `model.layers.0`."""
        components = self.path.split(".")
        return ".".join(components[: next(i for i, name in enumerate(components) if name.isdigit()) + 1])


@dataclass(frozen=True)
class LeftAlone:
    """An activation module that is not a site, and the reason."""

    path: str
    activation: str
    reason: str


class UnknownStructureError(InputError):
    """A part of the model looks like an MLP, but its activation or its width cannot be determined."""


def find_sites(model: nn.Module, parts: str = "main") -> list[Site]:
    """Returns the MLP activations of a model, in the order of its modules.

    Args:
        model: A Hugging Face causal LM or image classifier; may be on the meta device, quantised or wrapped by PEFT.
        parts: `"main"`: the decoder of a language model, the encoder of an image model; `"vision"`: the vision tower
            of a multimodal model; `"all"`: both.

    Raises:
        InputError: The model has no MLP activation there, or its family is not supported.
    """
    return survey(model, parts)[0]


def survey(model: nn.Module, parts: str = "main") -> tuple[list[Site], list[LeftAlone]]:
    """Returns the sites of a model and the activations that are left alone, with the reason for each.

    Args:
        model: As for `find_sites`.
        parts: As for `find_sites`.

    Raises:
        InputError: The model has no MLP activation there, or has an MLP whose activation or width cannot be
            determined, so that a patch would be partial.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    reasons = _Reasons(model, parts)
    sites: list[Site] = []
    left_alone: list[LeftAlone] = []
    for path, name in reasons.activations:
        owner_path, _, attribute = path.rpartition(".")
        owner = model.get_submodule(owner_path)
        reason = reasons.of(owner_path, owner)
        if reason:
            left_alone.append(LeftAlone(path, name, reason))
            continue
        shape = _shape_at(model, owner_path)
        if shape is None:
            raise UnknownStructureError(
                f"model type {model_type} is not supported yet: cannot determine the width of {path} ({name}) "
                f"from the modules of {type(owner).__name__}"
            )
        functional = hidden_activation(owner) or is_exposed(owner)
        sites.append(Site(path, attribute, name, shape[0], "functional" if functional else shape[1]))
    _refuse_mlps_without_a_site(model, model_type, sites, reasons)
    if not sites:
        what = "no MLP in its vision tower" if parts == "vision" else "no MLP"
        if parts == "main" and any(isinstance(module, nn.Conv2d) for module in model.modules()):
            what = "no MLP of linear layers, only convolutions"
        raise InputError(f"model type {model_type} has {what}: there is no activation to swap")
    return sites, left_alone


def _refuse_mlps_without_a_site(model: nn.Module, model_type: str, sites: list[Site], reasons: "_Reasons") -> None:
    above = {site.path[:end] for site in sites for end, letter in enumerate(site.path) if letter == "."}
    for path, module in model.named_modules():
        if path not in above and _computes_an_mlp(module) and not reasons.of(path, module):
            raise UnknownStructureError(
                f"model type {model_type} is not supported yet: {type(module).__name__} ({path}) computes its "
                "activation inside a method, so there is no module to swap"
            )


def _activations(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Path and name of every activation, including hidden ones; a module in several places is listed for each."""
    classes = _activation_classes()
    inside: str | None = None
    for path, module in model.named_modules(remove_duplicate=False):
        if inside is not None and path.startswith(inside):
            continue
        wrapped = type(module).__name__ == PEFT_WRAPPER and isinstance(module.original_module, classes)
        if wrapped or isinstance(module, classes) or (_named_like_one(module) and path):
            inside = path + "."
            yield path, activation_name(module)
        elif hidden := hidden_activation(module):
            yield f"{path}.{hidden[0]}", activation_name(hidden[1])


def _activation_classes() -> tuple[type, ...]:
    from transformers.activations import ACT2CLS

    entries: list[Any] = list(ACT2CLS.values())
    classes = {entry[0] if isinstance(entry, tuple) else entry for entry in entries}
    extra = (nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.LogSigmoid)
    return (*classes, *extra, SigmoidGate, SoftcappedSiLU, CRReLU)


def _named_like_one(module: nn.Module) -> bool:
    """Whether a module is a family's own activation class (BloomGelu, ...): a leaf without weights, named like one."""
    name = type(module).__name__.lower()
    leaf = next(module.children(), None) is None and next(module.parameters(recurse=False), None) is None
    return leaf and bool(re.search(r"(gelu|relu|silu|swish|mish|activation)\d*$", name))


class _Reasons:
    """Gives the reason why an activation of a model is not a site.

    In an image model the vision tower is the model itself. In a multimodal model the vision tower is left alone unless
    `parts` includes it.
    """

    def __init__(self, model: nn.Module, parts: str):
        self.model, self.parts = model, parts
        self.prefix = getattr(model, "base_model_prefix", "")  # the model's own name (convnext, vit) is no evidence
        self.activations = list(_activations(model))
        owners = [path.rpartition(".")[0] for path, _ in self.activations]
        mlps = [path for path in owners if not self._elsewhere(path, model.get_submodule(path))]
        self.is_tower = all(self._place(path) == _VISION for path in mlps)

    def of(self, owner_path: str, owner: nn.Module) -> str | None:
        """The reason, or None for a site."""
        in_tower = not self.is_tower and self._place(owner_path) == _VISION
        if in_tower and self.parts == "main":
            return f"inside {self._component(owner_path, _VISION)}: {_VISION}"
        reason = self._elsewhere(owner_path, owner)
        if reason is None and self.parts == "vision" and not in_tower and not self.is_tower:
            return "not in the vision tower"
        return reason

    def _place(self, owner_path: str) -> str | None:
        return _VISION if self._component(owner_path, _VISION) else None

    def _component(self, owner_path: str, what: str) -> str | None:
        return next((part for part in self._parts(owner_path) if _ELSEWHERE[what].search(part.lower())), None)

    def _parts(self, owner_path: str) -> list[str]:
        components = owner_path.split(".")
        return components[1:] if components[0] == self.prefix else components

    def _elsewhere(self, owner_path: str, owner: nn.Module) -> str | None:
        """The reason other than the vision tower."""
        for component in self._parts(owner_path):
            for what, pattern in _ELSEWHERE.items():
                if what != _VISION and pattern.search(component.lower()):
                    return f"inside {component}: {what}"
        if not any(component.isdigit() for component in owner_path.split(".")):
            return "outside the stack of layers"
        if isinstance(owner, nn.GroupNorm | nn.LayerNorm | nn.modules.batchnorm._BatchNorm):
            return "in a normalisation"
        for name, child in owner.named_children():
            if isinstance(child, nn.Conv1d):
                return f"beside a convolution ({name})"
            if name in _FOREIGN_SIBLINGS:
                return _FOREIGN_SIBLINGS[name]
        if _shape_at(self.model, owner_path) is not None:  # ConvNeXt and PVT too, beside a convolution
            return None
        if "attention" in type(owner).__name__.lower():
            return f"in an attention ({type(owner).__name__})"
        convolution = next((name for name, part in owner.named_modules() if isinstance(part, nn.Conv2d)), None)
        return None if convolution is None else f"beside a convolution ({convolution})"


def _shape_at(model: nn.Module, owner_path: str) -> tuple[int, str] | None:
    # A gate that is a separate module (Inkling 2) has the weights beside it, not inside it.
    return mlp_shape(model.get_submodule(owner_path)) or mlp_shape(model.get_submodule(owner_path.rpartition(".")[0]))


def mlp_shape(owner: nn.Module) -> tuple[int, str] | None:
    """Width and kind of the MLP whose activation `owner` holds, inferred from the weights beside the activation.

    Returns:
        `(num_channels, kind)`, or None if the weights are not those of an MLP.
    """
    experts = _experts_width(owner)
    if experts is not None:
        return experts, "experts"
    linears = {name: size for name, child in owner.named_children() if (size := _linear_size(child))}
    if len(sizes := set(linears.values())) == 1:
        hidden, width = sizes.pop()
        # The output projection is in another module: BERT's intermediate layer, CPM-Ant's gate and up-projection
        if len(linears) == 1 or hidden != width:
            return width, "gated" if len(linears) > 1 else "plain"
    down = next((name for name in _DOWN_NAMES if name in linears), None) or next(reversed(linears), None)
    if down is None:
        return None
    width, hidden = linears[down]
    others = [size for name, size in linears.items() if name != down and size[0] == hidden]
    if (hidden, 2 * width) in others:
        return width, "gated"
    same = others.count((hidden, width))
    return (width, "gated" if same > 1 else "plain") if same else None


def _computes_an_mlp(module: nn.Module) -> bool:
    if _experts_width(module) is not None:
        return True
    linears = [name for name, child in module.named_children() if _linear_size(child)]
    # "out_proj" belongs to an attention as often as to an MLP.
    named = any(name in linears for name in _DOWN_NAMES if name != "out_proj")
    return named and len(linears) > 1 and mlp_shape(module) is not None


def _experts_width(owner: nn.Module) -> int | None:
    weights = {name: tuple(p.shape) for name, p in owner.named_parameters(recurse=False) if p.dim() == 3}
    if "w2" in owner._parameters and hasattr(owner, "moe_num_experts"):  # DBRX stacks its experts in two dimensions
        return len(cast(nn.Parameter, owner.w2)) // cast(int, owner.moe_num_experts)
    down = next((weights[name] for name in ("down_proj", "w2") if name in weights), None)
    up = next((weights[name] for name in ("gate_up_proj", "up_proj", "w1") if name in weights), None)
    if down is None or up is None:
        return None
    # (experts, hidden, width) or (experts, width, hidden): the packed input weight has the hidden size and twice
    # the width, in either order.
    for width, hidden in (down[:0:-1], down[1:]):
        if sorted(up[1:]) in (sorted((hidden, 2 * width)), sorted((hidden, width))):
            return width
    return None


def _linear_size(module: Any) -> tuple[int, int] | None:
    """`(inputs, outputs)` of a linear layer: plain, quantised, LoRA-wrapped, of parallel experts, or a Conv1D."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    if hasattr(module, "nx") and hasattr(module, "nf"):
        return module.nx, module.nf
    if hasattr(module, "input_size") and hasattr(module, "output_size"):  # JetMoE's experts
        return module.input_size, module.output_size
    children = list(module.children()) if isinstance(module, nn.Module) else []
    if [type(child) for child in children] == [nn.Linear, nn.BatchNorm1d]:  # LeViT's
        return _linear_size(children[0])
    return None
