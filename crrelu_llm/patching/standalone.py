"""Makes a patched checkpoint loadable without this package, with `trust_remote_code=True`."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from crrelu_llm.errors import InputError, reading
from crrelu_llm.files import write_text, writing
from crrelu_llm.patching import loading, mixture, readme, section
from crrelu_llm.patching.sites import find_sites

FILE = "modeling_crrelu.py"
CLASSES = {"AutoModel": "CRReLUModel", "AutoModelForCausalLM": "CRReLUForCausalLM"}
# The family's classes in this package's copy of the file.
_IMPORTS = {"AutoModel": "LlamaModel as Model", "AutoModelForCausalLM": "LlamaForCausalLM as CausalLM"}


def write_standalone(checkpoint: Path, name: str | None = None) -> None:
    """Adds modeling_crrelu.py to a patched checkpoint, in place, and names it in config.json.

    Loading the checkpoint after `import crrelu_llm` does not change. Without the package and without
    `trust_remote_code` loading still fails: the family's own classes do not know the activation `crrelu`.

    Args:
        checkpoint: Directory of a patched checkpoint.
        name: The name in its README; by default the directory's name.

    Raises:
        InputError: The directory is not a patched checkpoint, or its family needs the package.
        DiskError: The disk is full or read-only.
    """
    found = add_file(checkpoint)
    with writing(str(checkpoint)):
        readme.write_again(checkpoint, name or checkpoint.resolve().name, found, standalone=True)


def add_file(checkpoint: Path) -> dict[str, Any]:
    """`write_standalone` without the README; returns the crrelu section of the config."""
    path = checkpoint / "config.json"
    if not path.is_file():
        hint = ": an adapter; merge it first" if (checkpoint / "adapter_config.json").is_file() else ""
        raise InputError(f"{checkpoint}: no config.json there{hint}; give the output_dir of `crrelu patch`")
    config = loading.load_config(str(checkpoint))
    found = section.read(config)
    if found is None:
        raise InputError(f"{checkpoint}: not patched, so it already loads everywhere; run `crrelu patch` first")
    _check(str(checkpoint), config, *_said(found))
    text = (resources.files("crrelu_llm.assets") / "standalone" / FILE).read_text(encoding="utf-8")
    for auto_class, cls in _family_classes(str(checkpoint), config).items():
        text = text.replace(_IMPORTS[auto_class], f"{cls} as {_IMPORTS[auto_class].rpartition(' ')[2]}")
    # TRL and vLLM look up the first architecture in transformers before they read auto_map.
    values = json.loads(path.read_text(encoding="utf-8"))
    values["architectures"] = [CLASSES["AutoModelForCausalLM"]]
    values["auto_map"] = {auto_class: f"{FILE.removesuffix('.py')}.{cls}" for auto_class, cls in CLASSES.items()}
    with writing(str(checkpoint)):
        write_text(checkpoint / FILE, text)
        write_text(path, json.dumps(values, indent=2) + "\n")
    return found


def is_standalone(values: dict[str, Any]) -> bool:
    """Whether the content of a config.json is that of a standalone checkpoint."""
    return str((values.get("auto_map") or {}).get("AutoModelForCausalLM", "")).startswith("modeling_crrelu.")


def require(model: Any, activation: str, calibrated: bool, name: str) -> None:
    """Raises InputError if `write_standalone` would refuse the model, called `name`, after the patch."""
    found = section.read(model.config)
    if found is None:
        sites = find_sites(model)
        keys = section.mlp_config_keys(model, sites)
        said = [{"path": site.path, "kind": site.kind} for site in sites]
        _check(name, model.config, activation, calibrated, said, keys)
    else:
        _check(name, model.config, activation, calibrated, found["sites"], found["config_keys"])
    _family_classes(name, model.config)


def _said(found: dict[str, Any]) -> tuple[Any, ...]:
    return found["activation"], section.is_calibrated(found), found["sites"], found["config_keys"]


def _check(
    name: str, config: Any, activation: str, calibrated: bool, sites: list[dict[str, Any]], keys: dict[str, str]
) -> None:
    kind, names = config.model_type, mixture.names_of(activation)
    if "crrelu" not in names or (calibrated and len(names) > 1):
        other = next(other for other in names if other != "crrelu")
        reason = f"only crrelu can be; elsewhere {other} would silently be computed without its calibration"
    elif loading.head_of(config) != loading.CAUSAL_LM:
        reason = f"it is {loading.HEADS[loading.head_of(config)]}, and the file is for language models"
    elif getattr(config, "auto_map", None) and not is_standalone({"auto_map": config.auto_map}):
        reason = "the model has code of its own"
    elif hidden := [site["path"] for site in sites if site.get("kind") == "functional"]:
        reason = f"{kind} computes {hidden[0]} inside a method, which only crrelu_llm replaces"
    elif not keys:
        reason = f"no key of {kind}'s config names the MLP's activation alone, so without crrelu_llm it would be lost"
    else:
        return
    raise InputError(f"{name}: cannot be made standalone: {reason}; leave --standalone out")


def _family_classes(name: str, config: Any) -> dict[str, str]:
    """transformers' classes that the auto classes choose for a config; each must have every site."""
    import transformers

    made = {}
    for auto_class in CLASSES:
        with torch.device("meta"), reading(f"{name}: cannot be made standalone"):
            model = getattr(transformers, auto_class).from_config(config)
        cls = next(entry for entry in type(model).__mro__ if entry.__module__.startswith("transformers."))
        sites = (section.read(config) or {"sites": []})["sites"]
        lacks = [site["path"] for site in sites if not section.local_path(model, site["path"])]
        if lacks or getattr(transformers, cls.__name__, None) is not cls:
            why = f"has no {lacks[0]}" if lacks else "cannot be imported from transformers"
            raise InputError(f"{name}: cannot be made standalone: its {auto_class}, {cls.__name__}, {why}")
        made[auto_class] = cls.__name__
    return made
