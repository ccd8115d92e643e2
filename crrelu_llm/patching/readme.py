"""The README.md of a patched checkpoint: in three lines, what it is and how to load it."""

import json
import re
from pathlib import Path
from typing import Any

from crrelu_llm.patching import loading, mixture

FILE = "README.md"
# Marks a README that may be overwritten, in contrast to one written by a person.
MARK = "<!-- written by crrelu patch -->"
_HEADER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def is_ours(text: str) -> bool:
    """Whether `crrelu patch` wrote a README, and nobody has removed its mark since."""
    return MARK in text


def how_to_load(name: str, standalone: bool, head: str = loading.CAUSAL_LM) -> list[str]:
    """Two lines of Markdown, on loading and serving; only the first for a model that is not a language model.

    Args:
        name: The name of the checkpoint in these lines.
        standalone: Whether the checkpoint also loads without this package.
        head: transformers' auto class that loads it.
    """
    without = " without it `from_pretrained(…, trust_remote_code=True)`, which runs modeling_crrelu.py from here"
    first = (
        f'Load it: `import crrelu_llm`, then `{head}.from_pretrained("{name}")`;'
        f"{without if standalone else ' without the import it cannot be loaded'}."
    )
    second = (
        f"Serve it: `vllm serve {name} --model-impl transformers{' --trust-remote-code' if standalone else ''}`"
        f"{'.' if standalone else ', with crrelu_llm installed beside vLLM.'}"
    )
    return [first, second] if head == loading.CAUSAL_LM else [first]


def write(directory: Path, name: str, section: dict[str, Any], header: str = "", standalone: bool = False) -> None:
    """Writes the README of a checkpoint.

    Args:
        directory: The directory of the checkpoint.
        name: The name of the checkpoint.
        section: The crrelu section of its config.
        header: Metadata in YAML, between lines of `---`; kept unchanged.
        standalone: Whether the checkpoint also loads without this package.
    """
    originals = ", ".join(sorted({str(site["original"]) for site in section["sites"]}))
    activation = section["activation"]
    goes_without_us = activation == originals and not section.get("calibrated")
    if mixture.is_mixture(activation):
        activation = mixture.in_words(activation)
    elif activation == "crrelu":
        activation = "CRReLU, `max(0, x) + ε·x·exp(−x²/2)` with a learnable ε (arXiv 2405.12954)"
    calibrated = ", calibrated to keep the model's function" if section.get("calibrated") else ""
    what = (
        f"The activation of its {len(section['sites'])} MLPs ({originals}) was swapped for {activation}{calibrated}."
    )
    head = loading.head_of(json.loads((directory / "config.json").read_text()))
    lines = [what, *how_to_load(name, standalone, head)]
    if goes_without_us:
        lines = [
            f"The activation of its {len(section['sites'])} MLPs is {activation}, the original one, put back by "
            "`crrelu patch`; no other number is around it.",
            f'Load it like every model of its family: `{head}.from_pretrained("{name}")`; crrelu_llm is not needed.',
            *([f"Serve it: `vllm serve {name}`."] if head == loading.CAUSAL_LM else []),
        ]
    text = f"{header}{MARK}\n# {name}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"
    (directory / FILE).write_text(text, encoding="utf-8")


def write_again(directory: Path, name: str, section: dict[str, Any], standalone: bool) -> None:
    """Updates a README that `crrelu patch` wrote; leaves any other README unchanged."""
    path = directory / FILE
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    if before is None or is_ours(before):
        write(directory, name, section, header_of(before or ""), standalone)


def header_of(text: str) -> str:
    """A README's metadata, including the `---` lines around it; empty if there is none."""
    found = _HEADER.match(text.replace("\r\n", "\n"))
    return found.group(0) if found else ""


def header_of_model(model: str, revision: str | None = None) -> str:
    """The metadata of a MODEL's own README; empty if it has none or the hub does not answer."""
    source = Path(loading.resolve(model))
    path: Any = source / FILE if source.is_dir() else None
    if not source.exists():
        from transformers.utils.hub import cached_file

        options: dict[str, Any] = {"revision": revision} if revision else {}
        for error in ("gated_repo", "missing_entries", "connection_errors"):
            options[f"_raise_exceptions_for_{error}"] = False
        path = cached_file(model, FILE, **options)
    if path is None or not Path(path).is_file():
        return ""
    return header_of(Path(path).read_text(encoding="utf-8", errors="replace"))
