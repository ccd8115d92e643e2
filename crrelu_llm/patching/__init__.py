"""Patching: find the sites of a model, swap their activation, calibrate it, and save and reload the result."""

from crrelu_llm.patching.config import PatchConfig
from crrelu_llm.patching.patch import PatchReport, patch, unpatch
from crrelu_llm.patching.sites import Site, find_sites

__all__ = ["PatchConfig", "PatchReport", "Site", "find_sites", "patch", "unpatch"]
