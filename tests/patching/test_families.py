"""Every causal-LM family of transformers, as a tiny model: patched whole and nothing else, or refused in one line."""

import re

import pytest
import torch
from families import FACTS, IS_RELEASE, PATCHED, RELEASE, family_model, token_ids
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from crrelu_llm import CRReLU, patch, unpatch
from crrelu_llm.errors import InputError
from crrelu_llm.patching.sites import survey

# Blt runs its patcher, which cuts the text into patches, without gradients.
NO_GRADIENT = {"blt": "model.patcher."}
# AutoModelForCausalLM builds these from the text part of their configuration, but does not know that part by itself.
OWN_CLASS = {"emu3", "mllama", "musicgen", "musicgen_melody"}


def numbered(path):
    """A path with # for the numbers in it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", path)


def tree(model):
    """The name of every module's class, by its path; hidden.expose gives a class, but no name, of its own."""
    return {path: type(module).__name__ for path, module in model.named_modules(remove_duplicate=False)}


def logits(model):
    with torch.no_grad():
        found = model(input_ids=token_ids()).logits
    assert torch.isfinite(found).all()
    return found


def assert_same(found, expected):
    """Up to rounding: a matrix product may round differently where a weight lies at another address."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def randomise(model, paths):
    """Gives every ε values of its own, far from the start value and from those of other layers."""
    generator = torch.Generator().manual_seed(7)
    for path in paths:
        epsilon = model.get_submodule(path).epsilon
        with torch.no_grad():
            epsilon.copy_(torch.randn(epsilon.shape, generator=generator))


@pytest.mark.skipif(not IS_RELEASE, reason=f"the list is of transformers {RELEASE}")
def test_every_type_of_transformers_is_in_the_list():
    assert set(FACTS) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("family", PATCHED)
def test_patched_whole_and_nothing_else(family, tmp_path):
    model = family_model(family)
    sites, left_alone = survey(model)
    paths = [site.path for site in sites]
    if IS_RELEASE:
        assert {numbered(site.path): f"{site.original} {site.kind}" for site in sites} == FACTS[family]["sites"]
        assert {numbered(item.path): item.reason for item in left_alone} == FACTS[family]["left_alone"]
    native, modules = logits(model), tree(model)

    patch(model, epsilon_per="channel", calibration="none")
    randomise(model, paths)
    patched_modules = tree(model)
    changed = {path for path, name in patched_modules.items() if modules.get(path) != name}
    assert changed == set(paths)
    assert set(modules) <= set(patched_modules)
    inputs = {}
    for path in paths:
        module = model.get_submodule(path)
        assert type(module) is CRReLU
        module.register_forward_pre_hook(lambda module, args, at=path: inputs.update({at: args[0].shape[-1]}))
    patched = logits(model)
    assert not torch.allclose(patched, native, rtol=1e-4, atol=1e-5)
    assert inputs == {site.path: site.num_channels for site in sites}

    model.save_pretrained(tmp_path)
    again = (type(model) if family in OWN_CLASS else AutoModelForCausalLM).from_pretrained(tmp_path)
    assert tree(again) == patched_modules
    for path in paths:
        assert torch.equal(again.get_submodule(path).epsilon, model.get_submodule(path).epsilon)
    assert_same(logits(again), patched)

    model.train()
    model(input_ids=token_ids()).logits.float().square().mean().backward()
    without = {path for path in paths if not has_gradient(model.get_submodule(path).epsilon)}
    skipped = NO_GRADIENT.get(family)
    assert without == {path for path in paths if skipped and path.startswith(skipped)}

    model.eval()
    unpatch(model)
    assert tree(model) == modules
    assert torch.equal(logits(model), native)


def has_gradient(parameter):
    return parameter.grad is not None and bool(parameter.grad.abs().max() > 0)


# Reformer draws a new seed from the clock in every training step, so that no two steps are alike.
@pytest.mark.parametrize("family", [family for family in PATCHED if family != "reformer"])
def test_recompute_changes_no_bit_of_any_gradient(family):
    found = []
    for recompute in (False, True):
        model = family_model(family).train()
        patch(model, epsilon_init=0.3, recompute_activation=recompute, calibration="none")
        torch.manual_seed(0)  # the same dropout
        model(input_ids=token_ids()).logits.float().square().mean().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters() if has_gradient(parameter)})
    expected, ours = found
    assert expected and ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", [family for family, facts in FACTS.items() if "refused" in facts])
def test_refused_in_one_line(family):
    model = family_model(family)
    native, modules = logits(model), tree(model)
    with pytest.raises(InputError, match=FACTS[family]["refused"]) as caught:
        patch(model, calibration="none")
    assert "\n" not in str(caught.value)
    assert tree(model) == modules
    assert torch.equal(logits(model), native)


@pytest.mark.skipif(not IS_RELEASE, reason=f"the list is of transformers {RELEASE}")
@pytest.mark.parametrize("family", [family for family, facts in FACTS.items() if "not_built" in facts])
def test_not_built(family):
    """Where this fails, a model of the family can be built now: write down its sites instead."""
    with pytest.raises((ImportError, ValueError, StrictDataclassError), match=FACTS[family]["not_built"]):
        family_model(family)
