"""Checkpoints to serve, and this package as an installed wheel; see environments.py for how to run these tests."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from crrelu_llm.cli.main import main
from crrelu_llm.patching.standalone import write_standalone

ROOT = Path(__file__).parents[2]
# What vLLM's attention takes on a CPU: heads of 32 and more.
_SIZES = {
    "llama": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "head_dim": 32},
    "gemma3_text": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "head_dim": 32},
    "gpt2": {"n_embd": 64, "n_head": 2},
}


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """A folder with this package as an installed wheel, for PYTHONPATH."""
    source, site = (tmp_path_factory.mktemp(name) for name in ("source", "site"))
    for folder in ("crrelu_llm", "eval", "recipes"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    build = "import setuptools.build_meta as b; b.build_wheel('out')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


@pytest.fixture(scope="session")
def checkpoints(make_checkpoint, text_file, tmp_path_factory):
    """A folder with a tiny model of each family, trained a little; `…-crrelu`: patched and calibrated, one ε a
    channel; `…-alone`: the same, standalone."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for family, sizes in _SIZES.items():
        make_checkpoint(family, folder / family, **sizes)
        argv = ["patch", str(folder / family), "--output_dir", str(folder / f"{family}-crrelu")]
        argv += ["--epsilon_per", "channel", "--perplexity_data", "none", "--calibration_data", str(text_file)]
        assert main(argv) == 0
        shutil.copytree(folder / f"{family}-crrelu", folder / f"{family}-alone")
        write_standalone(folder / f"{family}-alone")
    return folder
