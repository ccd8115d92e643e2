"""Patching: find the sites of a model, swap their activation, fit ε, and save and reload the result."""

from crrelu_llm.patching.sites import Site, find_sites
from crrelu_llm.patching.swap import PatchConfig, PatchReport, patch, unpatch

__all__ = ["PatchConfig", "PatchReport", "Site", "find_sites", "patch", "unpatch"]
