"""Activations inside methods: made modules and taken back without changing a bit, or refused in one line."""

from dataclasses import replace

import pytest
import torch
from families import FACTS, PATCHED, family_model, token_ids

from crrelu_llm import patch
from crrelu_llm.errors import InputError
from crrelu_llm.patching.modules import hidden
from crrelu_llm.patching.sites import survey

HIDDEN = [
    family for family in PATCHED if any(value.endswith("functional") for value in FACTS[family]["sites"].values())
]


def tree(model):
    """The name of every module's class, by its path; hidden.expose gives a class, but no name, of its own."""
    return {path: type(module).__name__ for path, module in model.named_modules(remove_duplicate=False)}


def logits(model):
    with torch.no_grad():
        found = model(input_ids=token_ids()).logits
    assert torch.isfinite(found).all()
    return found


@pytest.mark.parametrize("family", HIDDEN)
@pytest.mark.parametrize("size", [1, 8])  # 8: far into the clamps and softcaps that some of these families have
def test_exposing_an_activation_changes_no_bit(family, size):
    model = family_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(size if parameter.dim() > 1 else 1)
    native, modules = logits(model), tree(model)
    paths = [site.path for site in survey(model)[0]]
    hidden.expose(model, paths)
    added = {path: name for path, name in tree(model).items() if path not in modules}
    assert set(added) <= set(paths) and added
    assert torch.equal(logits(model), native)
    hidden.conceal(model, paths)
    assert tree(model) == modules
    assert torch.equal(logits(model), native)


@pytest.mark.parametrize("family", ["gpt_oss", "rwkv", "inkling2_text"])
def test_a_method_that_transformers_has_changed_is_not_replaced(family, monkeypatch):
    model = family_model(family)
    known = {name: replace(entry, source="another") for name, entry in hidden.HIDDEN.items()}
    monkeypatch.setattr(hidden, "HIDDEN", known)
    hidden._entry.cache_clear()
    with pytest.raises(InputError, match="of this release of transformers is not the one") as caught:
        patch(model)
    hidden._entry.cache_clear()
    assert "\n" not in str(caught.value)
