"""The finished layers of a calibration, stored so that a killed calibration resumes after them."""

import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from crrelu_llm.environment import versions
from crrelu_llm.files import plain, remove, replacing, write_json, writing
from crrelu_llm.patching.calibration.following import weights_of
from crrelu_llm.patching.calibration.records import Record

_IDENTITY = "calibration.json"
_ACTIVATION, _FOLLOWING = "activation", "following"


class Progress:
    """A directory with one file per finished layer: its new activations, changed weights and records.

    The inputs of the next layer are not stored: the patched layers compute them again, by the same operations, so the
    result equals that of an uninterrupted calibration bit for bit.

    Args:
        directory: The directory, created with the first layer.
        identity: Everything that determines the result. Files of a calibration with another identity are removed.
    """

    def __init__(self, directory: Path, identity: dict[str, Any]):
        self.directory, self.identity = directory, json.loads(json.dumps(plain(identity)))

    @property
    def layers(self) -> int:
        """How many layers are finished, without a gap from the first."""
        found = self.directory / _IDENTITY
        try:
            same = found.is_file() and json.loads(found.read_text(encoding="utf-8")) == self.identity
        except ValueError:
            same = False
        if not same:
            return 0
        count = 0
        while self._file(count).is_file():
            count += 1
        return count

    def begin(self) -> int:
        """Removes the files of another calibration; returns how many layers are finished."""
        if not (count := self.layers):
            self.remove()
        return count

    def remove(self) -> None:
        """Removes the directory: the result is saved, or not wanted."""
        remove(self.directory)

    def save(self, index: int, done: dict[str, tuple[Record, nn.Module, nn.Module | None]]) -> None:
        """Stores a finished layer.

        Args:
            index: The number of the layer.
            done: For each site calibrated in it, by path: the record, the new activation, and the projection after
                it where its weights were changed.

        Raises:
            DiskError: The disk is full or read-only.
        """
        tensors: dict[str, Tensor] = {}
        for path, (record, activation, following) in done.items():
            for name, value in activation.state_dict().items():
                tensors[f"{path}/{_ACTIVATION}/{name}"] = value.detach().cpu().contiguous().clone()
            if following is not None and record.changed_weights:
                for name, value in weights_of(following).items():
                    tensors[f"{path}/{_FOLLOWING}/{name}"] = value.cpu().contiguous().clone()
        records = {path: asdict(record) for path, (record, _, _) in done.items()}
        with writing(f"the calibration's progress in {self.directory}"):
            if not (self.directory / _IDENTITY).is_file():
                write_json(self.directory / _IDENTITY, self.identity)
            with replacing(self._file(index)) as scratch:
                save_file(tensors, scratch, metadata={"records": json.dumps(records)})

    def load(
        self, index: int, activations: dict[str, nn.Module], following: dict[str, nn.Module]
    ) -> dict[str, Record] | None:
        """Restores a finished layer; None where its file cannot be read, and the layer must be calibrated again.

        Args:
            index: The number of the layer.
            activations: New activations by path, whose parameters are set.
            following: The projections after them, by path; changed weights are restored.
        """
        try:
            with safe_open(self._file(index), "pt") as file:
                records = json.loads(file.metadata()["records"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        if set(records) != set(activations):
            return None
        for path, activation in activations.items():
            activation.load_state_dict(_below(tensors, f"{path}/{_ACTIVATION}/"))
            for name, value in _below(tensors, f"{path}/{_FOLLOWING}/").items():
                weights_of(following[path])[name].copy_(value)
        return {path: Record(**record) for path, record in records.items()}

    def _file(self, index: int) -> Path:
        return self.directory / f"layer-{index:04d}.safetensors"


def identity(origin: dict[str, Any], blocks: Tensor, device: torch.device) -> dict[str, Any]:
    """Everything that determines the bits of a calibration: model, options, text, device and versions."""
    text = sha256(blocks.cpu().contiguous().numpy().tobytes()).hexdigest()
    return {**origin, "text": [list(blocks.shape), text], "device": device.type, "versions": versions()}


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
