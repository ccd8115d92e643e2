"""CRReLU for Hugging Face causal language models: patch a checkpoint, fine-tune it with TRL, compare it soundly.

Importing this package imports nothing heavy. It arranges that transformers, whenever it is imported, can build and
reload patched checkpoints.
"""

import importlib
from typing import TYPE_CHECKING, Any

from crrelu_llm import _transformers_hook

if TYPE_CHECKING:
    from crrelu_llm.activation import CRReLU, crrelu
    from crrelu_llm.kernels import set_backend
    from crrelu_llm.patching import PatchConfig, find_sites
    from crrelu_llm.patching.patch import patch, unpatch

__version__ = "0.1.0"
__all__ = ["CRReLU", "PatchConfig", "crrelu", "find_sites", "patch", "register", "set_backend", "unpatch"]

_HOMES = {
    "CRReLU": "crrelu_llm.activation",
    "crrelu": "crrelu_llm.activation",
    "PatchConfig": "crrelu_llm.patching",
    "find_sites": "crrelu_llm.patching",
    "patch": "crrelu_llm.patching",
    "set_backend": "crrelu_llm.kernels",
    "unpatch": "crrelu_llm.patching",
}


def register() -> None:
    """Teaches transformers about CRReLU now: the name `crrelu` in ACT2FN, and patched checkpoints in from_pretrained.

    `import crrelu_llm` already does this, as soon as transformers itself is imported; calling it again is harmless.
    """
    from crrelu_llm.patching.hook import install_hook

    install_hook()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


_transformers_hook.arrange(register)
