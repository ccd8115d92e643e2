"""Compares a calibration on the GPU with one on the CPU: the same model, the same tokens, two patched checkpoints.

    calibration.py GPU_CHECKPOINT CPU_CHECKPOINT OUT.json

The exit status is 1 unless these agree: the perplexity after the patch within PERPLEXITY; ε, scale, shift, gain and
offset with a median relative difference within MEDIAN; and the curves of at least CURVES_WITHIN of the channels within
CURVE of their size. Single channels may differ more: if two sets of numbers fit a channel equally well, the rounding
of its inputs decides between them.
"""

import json
import sys
from pathlib import Path
from typing import Any

PERPLEXITY = 0.005
MEDIAN = 0.01
CURVE, CURVES_WITHIN = 0.02, 0.98
NAMES = ("epsilon", "scale", "shift", "gain", "offset")


def main(argv: list[str]) -> int:
    if len(argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    first, second, out = map(Path, argv)
    for directory in (first, second):
        if not (directory / "patch_report.json").is_file():
            print(f"calibration: {directory} holds no patched checkpoint: that calibration failed", file=sys.stderr)
            return 2
    found = compare(first, second)
    out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    return 0 if found["agree"] else 1


def compare(first: Path, second: Path) -> dict[str, Any]:
    """The differences between two calibrations, and whether they are within the limits."""
    import torch

    ours, theirs = _numbers(first), _numbers(second)
    reports = [json.loads((path / "patch_report.json").read_text()) for path in (first, second)]
    after = [report["perplexity"]["after"] for report in reports]
    differences: dict[str, dict[str, float]] = {}
    for name in NAMES:
        a, b = (torch.cat([site[name] for site in numbers.values()]) for numbers in (ours, theirs))
        relative = (a - b).abs() / torch.maximum(a.abs(), b.abs()).clamp_min(1e-6)
        apart = {"median": relative.median().item(), "q99": relative.quantile(0.99).item(),
                 "within_1_percent": (relative <= 0.01).float().mean().item()}  # fmt: skip
        differences[name] = apart
    curves = torch.cat([_curves_apart(ours[path], theirs[path]) for path in ours])
    ratio = after[0] / after[1]
    within = (curves <= CURVE).float().mean().item()
    agree = (
        abs(ratio - 1) <= PERPLEXITY
        and within >= CURVES_WITHIN
        and all(entry["median"] <= MEDIAN for entry in differences.values())
    )
    return {
        "agree": agree,
        "perplexity": after,
        "perplexity_before": [report["perplexity"]["before"] for report in reports],
        "perplexity_ratio": ratio,
        "parameters": differences,
        "curves": {"median": curves.median().item(), "q99": curves.quantile(0.99).item(), "within": within},
        "allowed": {"perplexity": PERPLEXITY, "median": MEDIAN, "curve": CURVE, "curves_within": CURVES_WITHIN},
        "channels": len(curves),
        "seconds": [report["calibration"]["seconds"] for report in reports],
        "forward_seconds": [report["calibration"]["forward_seconds"] for report in reports],
    }


def _numbers(directory: Path) -> dict[str, dict[str, Any]]:
    """ε and the four of each site, `(channels,)` each, float64."""
    from safetensors import safe_open

    sites: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                site, _, name = key.rpartition(".")
                if name in NAMES:
                    sites.setdefault(site, {})[name] = tensors.get_tensor(key).double()
    sites = {site: values for site, values in sites.items() if set(values) == set(NAMES)}
    for values in sites.values():
        values["epsilon"] = values["epsilon"].expand_as(values["scale"])
    return sites


def _curves_apart(first: dict[str, Any], second: dict[str, Any]) -> Any:
    """For each channel: the root mean square of the difference, relative to the curve's, for inputs from −4 to 4."""
    import torch

    x = torch.linspace(-4, 4, 161, dtype=torch.float64)[:, None]

    def curve(site: dict[str, Any]) -> Any:
        t = site["scale"] * (x + site["shift"])
        return site["gain"] * (t.clamp_min(0) + site["epsilon"] * t * torch.exp(-t * t / 2)) + site["offset"]

    ours, theirs = curve(first), curve(second)
    return ((ours - theirs).square().mean(0) / theirs.square().mean(0).clamp_min(1e-12)).sqrt()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
