"""Runtimes that compute the logits of a continued text: torch, and each format's own runtime."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from crrelu_llm.quiet import quiet


class Runtime(Protocol):
    """A model on some runtime. `begin` starts a text; each call then continues the text."""

    def begin(self) -> None:
        """Forgets the text."""

    def __call__(self, ids: Tensor) -> Tensor:
        """The logits, `(1, n, vocabulary)`, of `(1, n)` further tokens."""


class Torch:
    """The model itself, with transformers' cache."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.begin()

    def begin(self) -> None:
        """Forgets the text."""
        self.cache: Any = None

    def __call__(self, ids: Tensor) -> Tensor:
        """The logits of further tokens."""
        with torch.no_grad():
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        return out.logits.float()


class _Exported:
    """An export, loaded from its directory by transformers' runner of its format."""

    def __init__(self, directory: Path, **options: Any) -> None:
        from transformers.exporters import ExportedModel

        with quiet():
            self.exported = ExportedModel.from_pretrained(directory, device="cpu", **options)
        self.begin()

    def begin(self) -> None:
        """Forgets the text."""
        self.seen = torch.zeros(1, 0, dtype=torch.long)

    def _mask(self, ids: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, ids], dim=1)
        return torch.ones_like(self.seen)


class Whole(_Exported):
    """A graph without a cache: every call computes the whole text."""

    def __call__(self, ids: Tensor) -> Tensor:
        """The logits of further tokens."""
        mask = self._mask(ids)
        out = self.exported(input_ids=self.seen, attention_mask=mask)
        return out.logits[:, -ids.shape[1] :].float().clone()


class Cached(_Exported):
    """A graph that takes the keys and values of earlier tokens, and returns them with those of the new tokens."""

    def __init__(self, directory: Path, empty: Any, **options: Any) -> None:
        self.empty = empty
        super().__init__(directory, **options)

    def begin(self) -> None:
        """Forgets the text."""
        super().begin()
        self.cache = self.empty

    def __call__(self, ids: Tensor) -> Tensor:
        """The logits of further tokens."""
        out = self.exported(input_ids=ids, attention_mask=self._mask(ids), past_key_values=self.cache)
        self.cache = out.past_key_values
        return out.logits.float()


class Stateful(_Exported):
    """An OpenVINO graph, which keeps keys and values in its own variables."""

    def begin(self) -> None:
        """Forgets the text."""
        super().begin()
        self.request = next(iter(self.exported.runners.values())).request
        self.request.reset_state()

    def __call__(self, ids: Tensor) -> Tensor:
        """The logits of further tokens."""
        given = {"input_ids": ids.numpy(), "attention_mask": self._mask(ids).numpy(), "beam_idx": _FIRST.numpy()}
        taken = {name for port in self.request.model_inputs for name in port.get_names()}
        result = self.request.infer({name: value for name, value in given.items() if name in taken})
        return torch.from_numpy(result["logits"].copy()).float()


_FIRST = torch.zeros(1, dtype=torch.int32)


def load(format_name: str, directory: Path, empty: Any) -> Runtime:
    """Loads an export on its runtime, with as many CPU threads as torch.

    Args:
        empty: The empty cache; None if the graph has no cache.
    """
    threads, options = torch.get_num_threads(), {}
    if format_name == "onnx":
        import onnxruntime

        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = threads
        options = {"session_options": session}
    if format_name == "openvino":
        options = {"config": {"INFERENCE_NUM_THREADS": threads}}
    if empty is None:
        return Whole(directory, **options)
    return Stateful(directory, **options) if format_name == "openvino" else Cached(directory, empty, **options)
