"""Measures where in a model two activations differ, without any training: by layer, and by part of the curve.

    python why.py MODEL PATCHED DATA OUTPUT.json [--tokens 4096]

MODEL is the original, PATCHED a patched copy made by `crrelu patch` or run.py (in <model>/patched), DATA text that was
not used for calibration. By layer: the increase of the loss when only that layer has PATCHED's activation, with its
standard error over blocks of text. By part of the curve: the share of a site's inputs there, and the share of the
squared difference of the two slopes, and of the two values, that comes from there.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import crrelu_llm  # noqa: F401  (loads patched checkpoints)
from crrelu_llm.patching import find_sites, loading
from crrelu_llm.patching.calibration.taps import tapped
from crrelu_llm.patching.calibration.tokens import calibration_blocks

EDGES = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "patched", "data"):
        parser.add_argument(name)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    model, patched = loading.load_model(args.model), loading.load_model(args.patched)
    tokenizer = loading.load_tokenizer(args.model)
    blocks = calibration_blocks(args.data, tokenizer, args.tokens, model.config)
    paths = [site["path"] for site in patched.config.crrelu["sites"]]
    modules = {path: patched.get_submodule(path) for path in paths}
    found = {
        "model": Path(args.model).name,
        "patched": Path(args.patched).parent.name,
        "tokens": blocks.numel(),
        "by_layer": by_layer(model, patched, modules, blocks),
        "by_curve": by_curve(model, modules, blocks),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(text(found))


@torch.no_grad()
def losses(model: nn.Module, blocks: Tensor) -> Tensor:
    """Mean loss per token of each block, `(blocks,)`, float64."""
    found = []
    for batch in blocks.split(4):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        found.append(nll.double().mean(1))
    return torch.cat(found)


def by_layer(model: Any, patched: Any, modules: dict[str, nn.Module], blocks: Tensor) -> dict[str, Any]:
    """The loss with each single site swapped, and with all sites swapped, minus the original loss."""
    before = losses(model, blocks)
    found = {"loss": before.mean().item(), "all": _grown(losses(patched, blocks) - before), "sites": {}}
    for path, module in tqdm(modules.items(), desc="One layer at a time", unit="layer"):
        owner, _, attribute = path.rpartition(".")
        original = getattr(model.get_submodule(owner), attribute)
        setattr(model.get_submodule(owner), attribute, module)
        found["sites"][path] = _grown(losses(model, blocks) - before)
        setattr(model.get_submodule(owner), attribute, original)
    return found


def _grown(differences: Tensor) -> dict[str, float]:
    return {
        "difference": differences.mean().item(),
        "standard_error": (differences.std() / math.sqrt(len(differences))).item(),
    }


def by_curve(model: Any, modules: dict[str, nn.Module], blocks: Tensor) -> list[dict[str, float | None]]:
    """For each interval of inputs: its share of the inputs, and of the squared differences of slopes and of values."""
    edges, sums = torch.tensor(EDGES), torch.zeros(3, len(EDGES) + 1, dtype=torch.float64)

    def seen(path: str, x: Tensor, y: Tensor, other: Tensor | None, result: Tensor) -> None:
        parts = torch.bucketize(x.detach().float(), edges).flatten()
        before, after = (_slope_and_value(module, x) for module in (originals[path], modules[path]))
        squares = [torch.ones_like(x), (after[0] - before[0]) ** 2, (after[1] - before[1]) ** 2]
        for row, square in zip(sums, squares, strict=True):
            row.index_add_(0, parts, square.double().flatten())

    originals = {path: model.get_submodule(path) for path in modules}
    sites = [site for site in find_sites(model) if site.path in modules]
    with torch.no_grad(), tapped(model, sites, seen) as report:
        for batch in tqdm(blocks.split(4), desc="The curve", unit="batch"):
            model(input_ids=batch, use_cache=False)
            report()
    shares = sums / sums.sum(1, keepdim=True)
    ends = (None, *EDGES, None)
    names = ("inputs", "slope", "value")
    return [
        {"from": ends[i], "to": ends[i + 1], **{name: shares[row, i].item() for row, name in enumerate(names)}}
        for i in range(len(EDGES) + 1)
    ]


def _slope_and_value(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().float().requires_grad_()
        y = module(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
    return slope, y.detach()


def text(found: dict[str, Any]) -> str:
    """Both tables in Markdown."""
    layers = found["by_layer"]
    lines = [f"{found['model']}, {found['patched']}: loss {layers['loss']:.4f} on {found['tokens']} tokens", ""]
    lines += ["| layer | increase of the loss | ± |", "| --- | ---: | ---: |"]
    for path, entry in [*layers["sites"].items(), ("all", layers["all"])]:
        lines.append(f"| {path} | {entry['difference']:+.5f} | {entry['standard_error']:.5f} |")
    lines += ["", "| input | share of inputs | of the squared slope difference | of the squared value difference |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    for part in found["by_curve"]:
        shares = " | ".join(f"{part[name]:.1%}" for name in ("inputs", "slope", "value"))
        low, high = ("" if end is None else f"{end:g}" for end in (part["from"], part["to"]))
        lines.append(f"| {low} to {high} | {shares} |".replace("|  to", "| up to").replace(" to  |", " and more |"))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
