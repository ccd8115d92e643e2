"""Every image-classification family of transformers, as a tiny model: patched whole, or refused in one line."""

import re

import pytest
import torch
from families import IS_RELEASE, RELEASE
from image_families import CLASSES, FACTS, PATCHED, image_model, inputs_of, quick_ones

from crrelu_llm import CRReLU, patch, unpatch
from crrelu_llm.errors import InputError
from crrelu_llm.patching.sites import survey

# Their image goes through a language model, with a processor that writes the prompt.
_NOT_RUN = {"shieldgemma2"}


def numbered(path):
    """A path with # for the numbers in it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", path)


def tree(model):
    return {path: type(module).__name__ for path, module in model.named_modules(remove_duplicate=False)}


def logits(model):
    if model.config.model_type in _NOT_RUN:
        return torch.zeros(1)
    with torch.no_grad():
        found = model(**inputs_of(model)).logits
    assert torch.isfinite(found).all()
    return found


@pytest.mark.skipif(not IS_RELEASE, reason=f"the list is of transformers {RELEASE}")
def test_every_family_of_transformers_is_in_the_list():
    assert set(FACTS) == set(CLASSES)


@pytest.mark.parametrize("family", quick_ones(PATCHED))
def test_patched_whole_reloaded_and_put_back(family, tmp_path):
    model = image_model(family)
    sites, left_alone = survey(model)
    paths = [site.path for site in sites]
    if IS_RELEASE:
        assert {numbered(site.path): f"{site.original} {site.kind}" for site in sites} == FACTS[family]["sites"]
        assert {numbered(item.path): item.reason for item in left_alone} == FACTS[family]["left_alone"]
    native, modules = logits(model), tree(model)
    patch(model, epsilon_per="channel", calibration="none")
    generator, inputs = torch.Generator().manual_seed(7), {}
    for path in paths:
        module = model.get_submodule(path)
        assert type(module) is CRReLU
        module.register_forward_pre_hook(lambda module, args, at=path: inputs.update({at: args[0].shape[-1]}))
        with torch.no_grad():
            module.epsilon.copy_(torch.randn(module.epsilon.shape, generator=generator))
    patched_modules, patched = tree(model), logits(model)
    assert {path for path, name in patched_modules.items() if modules.get(path) != name} == set(paths)
    if family not in _NOT_RUN:
        assert inputs == {site.path: site.num_channels for site in sites}
        assert (patched - native).norm() > 1e-3 * native.norm()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert tree(again) == patched_modules
    assert all(torch.equal(again.get_submodule(path).epsilon, model.get_submodule(path).epsilon) for path in paths)
    torch.testing.assert_close(logits(again.eval()), patched, rtol=1e-5, atol=1e-6)
    unpatch(model)
    assert tree(model) == modules and torch.equal(logits(model), native)


@pytest.mark.parametrize("family", quick_ones([family for family, facts in FACTS.items() if "refused" in facts]))
def test_refused_in_one_line(family):
    model = image_model(family, "meta")
    with pytest.raises(InputError, match=re.escape(FACTS[family]["refused"])) as caught:
        patch(model, calibration="none")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(not IS_RELEASE, reason=f"the list is of transformers {RELEASE}")
@pytest.mark.parametrize("family", [family for family, facts in FACTS.items() if "not_built" in facts])
def test_not_built(family):
    """Where this fails, a model of the family can be built now: write down its sites instead."""
    with pytest.raises(ImportError, match=FACTS[family]["not_built"]):
        image_model(family)
