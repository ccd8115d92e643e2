"""Calibration of a tiny model of every family: whatever its MLPs are, every site gets the whole fit."""

import copy

import pytest
import torch
from families import PATCHED, family_model, one_of_each_kind, token_ids

from crrelu_llm import patch, unpatch

# Those left out take audio codes, several to a token.
TEXT = [name for name in PATCHED if not name.startswith("musicgen")]


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits.float()


def distance(model, wanted):
    found = logits(model)
    assert torch.isfinite(found).all()
    return (found - wanted).norm()


def blocks():
    """Text in which the tokens of `token_ids` stand in another order."""
    ids = token_ids()
    return ids.flatten()[torch.randint(ids.numel(), (20, 16), generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize("family", one_of_each_kind(TEXT))
def test_the_whole_fit_brings_a_model_nearer_to_itself(family):
    model = family_model(family)
    wanted = logits(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    naive = copy.deepcopy(model)
    patch(naive, calibration="none")
    sites = patch(model, blocks=blocks(), epsilon_per="channel").sites
    for site in sites:
        module = model.get_submodule(site["path"])
        assert module.is_calibrated and module.scale.shape == (site["num_channels"],)
        if site["kept"] == "fit":
            assert site["note"] is None and site["relative_error"] < site["relative_error_naive"]
        else:  # an expert that no token chose, or inputs so large that everything is a ReLU
            assert site["note"]
    found = distance(model, wanted)
    if max(site["relative_error_naive"] for site in sites) > 0.01:
        assert found < 1.05 * distance(naive, wanted)
    unpatch(model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
