"""A language model whose MLPs compute CRReLU (arXiv 2405.12954) instead of the activation they were trained with.

`AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)` reads this file. It needs torch and
transformers. If the package crrelu_llm is installed too, the package does the work, with faster kernels.
"""

import contextlib

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM as CausalLM
from transformers import LlamaModel as Model
from transformers.activations import ACT2FN

try:
    import crrelu_llm
except ImportError:
    crrelu_llm = None


class CRReLU(nn.Module):
    """`gain·f(scale·(x + shift)) + offset`, where `f(t) = max(0, t) + ε·(t − μ)·exp(−(t − μ)²/2σ²)`.

    ε is learned; it is one number, or one for each channel. Calibrated models also have gain, scale, shift and offset,
    one number for each channel; otherwise they are 1, 1, 0 and 0. Models with a fitted density also have μ (`center`)
    and σ (`width`), one number each; otherwise they are 0 and 1. All are float32, and so is the computation.

    Args:
        section: The section `crrelu` of config.json.
        num_channels: The size of the last dimension of the input.
    """

    def __init__(self, section: dict, num_channels: int):
        super().__init__()
        self.num_channels = num_channels
        self.start = {"epsilon": section["epsilon_init"]}
        channels = num_channels if section["epsilon_per"] == "channel" else 1
        self.epsilon = nn.Parameter(torch.full((channels,), self.start["epsilon"], dtype=torch.float32))
        self.is_calibrated = section.get("calibrated", False)
        self.is_fitted = section.get("density") == "fitted"
        if self.is_calibrated:
            self._add_buffers(num_channels, scale=1.0, shift=0.0, gain=1.0, offset=0.0)
        if self.is_fitted:
            self._add_buffers(1, center=0.0, width=1.0)

    def _add_buffers(self, size: int, **values: float) -> None:
        for name, value in values.items():
            self.register_buffer(name, torch.full((size,), value, dtype=torch.float32))
        self.start |= values

    def forward(self, x: Tensor) -> Tensor:
        """Applies CRReLU to `x`, `(..., num_channels)`, floating point; the result has the shape and dtype of `x`."""
        if x.shape[-1] != self.num_channels:
            raise ValueError(
                f"CRReLU: the input has {x.shape[-1]} channels, but the checkpoint has {self.num_channels}; to split "
                "them over several devices (tensor parallelism), install the package crrelu_llm"
            )
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        numbers = {name: getattr(self, name).to(wide) for name in self.start}
        t = x.to(wide)
        if self.is_calibrated:
            t = numbers["scale"] * (t + numbers["shift"])
        center, width = (numbers["center"], numbers["width"]) if self.is_fitted else (0.0, 1.0)
        v = (t - center) / width
        v = torch.where(v.abs() > 40, 0.0, v)  # the bump is 0 there, and inf·0 would be NaN
        y = torch.relu(t) + numbers["epsilon"] * width * v * torch.exp(-v * v / 2)
        if self.is_calibrated:
            y = numbers["gain"] * y + numbers["offset"]
        return y.to(x.dtype)

    def set_missing(self) -> None:
        """Sets the values that the checkpoint lacks to their start values."""
        for name, value in self.start.items():
            tensor = getattr(self, name)
            if not (tensor.is_meta or getattr(tensor, "_is_hf_initialized", False)):
                with torch.no_grad():
                    tensor.fill_(value)
                tensor._is_hf_initialized = True


class Patched:
    """Puts CRReLU at the sites in config.json while the model is built, unless an installed crrelu_llm does so."""

    def __init__(self, config, *args, **kwargs):
        with _name_known():
            super().__init__(config, *args, **kwargs)

    def post_init(self) -> None:
        """Called by transformers at the end of a model's construction."""
        names = set() if crrelu_llm else self._swap()
        super().post_init()
        self._keep_in_fp32_modules_strict = set(self._keep_in_fp32_modules_strict or ()) | names

    def _swap(self) -> set[str]:
        """Replaces the activations; returns the ends of the names that stay float32."""
        section, names = self.config.crrelu, set()
        for site in section["sites"]:
            path = self._local(site["path"])
            owner, _, attribute = path.rpartition(".")
            self.get_submodule(path)
            activation = site.get("activation", "crrelu")  # layers may differ
            module = CRReLU(section, site["num_channels"]) if activation == "crrelu" else ACT2FN[activation]
            setattr(self.get_submodule(owner), attribute, module)
            names |= {f"{attribute}.{name}" for name in getattr(module, "start", ())}
        for site in section.get("kept", ()):  # layers that keep the activation they were trained with
            owner, _, attribute = self._local(site["path"]).rpartition(".")
            setattr(self.get_submodule(owner), attribute, ACT2FN[site["original"]])
        return names

    def _local(self, path: str) -> str:
        """Converts a path in the whole model to a path in this one."""
        return path.removeprefix(f"{self.base_model_prefix}.") if isinstance(self, Model) else path

    def _initialize_missing_keys(self, *args, **kwargs) -> None:
        for module in self.modules():
            if isinstance(module, CRReLU):
                module.set_missing()
        super()._initialize_missing_keys(*args, **kwargs)


@contextlib.contextmanager
def _name_known():
    """Lets transformers build the modules that `_swap` replaces.

    Afterwards the name is unknown again, so that loading the checkpoint without this file fails, instead of giving
    another model.
    """
    if "crrelu" in ACT2FN:
        yield
        return
    ACT2FN["crrelu"] = nn.Identity
    try:
        yield
    finally:
        del ACT2FN["crrelu"]


class CRReLUModel(Patched, Model):
    """The model without a head."""


class CRReLUForCausalLM(Patched, CausalLM):
    """The language model."""


# Makes every release of transformers copy this file when the model is saved again.
CRReLUModel.register_for_auto_class("AutoModel")
CRReLUForCausalLM.register_for_auto_class("AutoModelForCausalLM")
