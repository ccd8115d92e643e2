"""`crrelu patch`: turns a checkpoint into a patched checkpoint."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from crrelu_llm.cli import options
from crrelu_llm.cli.parser import Parser
from crrelu_llm.errors import InputError
from crrelu_llm.files import alone

_IMAGES = 1000  # labelled images to measure accuracy on


def _parser() -> Parser:
    parser = Parser(
        prog="crrelu patch",
        description="Swap the activation of every MLP of a checkpoint and save the result.",
        epilog="example: crrelu patch HuggingFaceTB/SmolLM2-135M-Instruct --epsilon_per channel "
        "--output_dir smollm2-crrelu --plot",
    )
    add = parser.add_argument
    options.add_model(parser)
    add("--output_dir", required=True, help="directory to write; it must not exist, or be empty")
    names = "crrelu, or any name of transformers' ACT2FN, or one a layer: 0-5=relu,6-=crrelu (default: crrelu)"
    add("--activation", default="crrelu", help=names)
    options.add_patch(parser)
    add("--fold", action="store_true", help="move scale, shift, gain and offset into the weights, where biases allow")
    text = "text for perplexity (images for accuracy, for an image model) before and after, or none"
    add("--perplexity_data", help=f"{text} (default: builtin:docstrings, or the calibration images)")
    add("--perplexity_tokens", type=int, default=6144, help="number of tokens for perplexity (default: 6144)")
    add("--plot", action="store_true", help="also draw the report by layer: patch_report.png in the output directory")
    add("--standalone", action="store_true", help="also make it load without crrelu_llm, by trust_remote_code=True")
    add("--dtype", help=f"dtype to load and save the weights in {options.OWN_DTYPE}")
    options.add_trust_remote_code(parser)
    options.add_json(parser, what="patch_report.json")
    return parser


def run(argv: list[str]) -> int:
    """Runs the command."""
    args = _parser().parse_args(argv)
    output_dir = options.new_directory(args.output_dir)
    from crrelu_llm.patching.config import PatchConfig
    from crrelu_llm.patching.transform import patch_checkpoint

    config = PatchConfig(**{entry.name: getattr(args, entry.name) for entry in fields(PatchConfig)})
    about = _about(args)
    perplexity, measured_on = _measurement(args, about)
    dtype = args.dtype or _dtype(about)
    with alone(output_dir.parent, "crrelu patch", f".{output_dir.name}.lock"):
        options.new_directory(output_dir)  # another call may have made it meanwhile
        report = patch_checkpoint(
            args.model,
            config,
            output_dir,
            dtype,
            args.fold,
            perplexity,
            measured_on,
            args.standalone,
            trust_remote_code=args.trust_remote_code,
        )
    if args.plot:
        from crrelu_llm.patching.report_plot import PLOT, plot_report

        plot_report(report, output_dir / PLOT)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report, output_dir)
    return 0


def _about(args: argparse.Namespace) -> Any:
    from crrelu_llm.patching import loading

    return loading.load_config(args.model, trust_remote_code=args.trust_remote_code)


def _dtype(about: Any) -> str:
    import torch

    from crrelu_llm.precision import choose_dtype

    name, why = choose_dtype([about], "cuda" if torch.cuda.is_available() else "cpu")
    if why:
        print(why, file=sys.stderr)
    return name


def _measurement(args: argparse.Namespace, about: Any) -> tuple[Callable[[Any, Any], Any] | None, dict[str, Any]]:
    """A function that measures the model, with its data already read, and what the report says of the data."""
    from crrelu_llm.patching import loading

    data, tokens = args.perplexity_data or "builtin:docstrings", args.perplexity_tokens
    if data == "none":
        return None, {}
    if tokens <= 1:
        raise InputError(f"--perplexity_tokens must be 2 or more, not {tokens}")
    code = {"trust_remote_code": args.trust_remote_code}
    if loading.head_of(about) == loading.IMAGE_CLASSIFIER:
        from crrelu_llm.patching.calibration.pixels import TEXT, measure_images

        data = args.perplexity_data or args.calibration_data
        if data == TEXT:
            return None, {}
        found = measure_images(data, loading.load_processor(args.model, **code), about, _IMAGES)
        return (None, {}) if found is None else (lambda model, _: found[0](model), {"images": found[1], "data": data})
    from crrelu_llm.data.blocks import is_calibration_text, language_modelling_blocks
    from crrelu_llm.evaluation.perplexity import perplexity
    from crrelu_llm.patching.calibration.tokens import block_size

    tokenizer = loading.load_tokenizer(args.model, **code)
    blocks = language_modelling_blocks(data, tokenizer, tokens, block_size(about), split="test")
    if args.calibration != "none" and is_calibration_text(args.calibration_data, data):
        print(
            f"{data} has one split: perplexity is measured on the calibration text, which flatters the patched model; "
            "give other --perplexity_data",
            file=sys.stderr,
        )
    return (lambda model, _: perplexity(model, blocks)), {"tokens": blocks.numel(), "data": data}


def _print(report: dict[str, Any], output_dir: Path) -> None:
    print(f"{report['model_type']}: {len(report['sites'])} sites -> {report['activation']}")
    for site in report["sites"]:
        epsilon = "" if site["epsilon_mean"] is None else f"  epsilon {site['epsilon_mean']:+.4f}"
        if site["center"] is not None:
            epsilon += f"  center {site['center']:+.3f}  width {site['width']:.3f}"
        error = ""
        if site["relative_error"] is not None:
            naive = site["relative_error_naive"]
            error = f"  relative error {site['relative_error']:.3f} ({naive:.3f} with the plain swap)"
        note = f"  {site['note']}" if site.get("note") else ""
        print(f"  {site['path']}  {site['original']}  {site['num_channels']} channels{epsilon}{error}{note}")
    asked = report["options"]["calibration"]
    lower = [site["kept"] for site in report["sites"] if site["note"]]
    if lower:
        print(
            f"  {len(lower)} of {len(report['sites'])} sites kept less than {asked}: {', '.join(sorted(set(lower)))}"
        )
    for item in report["skipped"]:
        print(f"  left alone: {item['path']}  ({item['reason']})")
    if (spent := report["calibration"]) is not None:
        needed = spent["forward_seconds"]
        ratio = f", {spent['seconds'] / needed:.1f} times as long as its two forward passes" if needed else ""
        print(f"calibrated in {spent['seconds']:.0f} s{ratio}")
    for name, form in (("perplexity", ".2f"), ("accuracy", ".4f"), ("loss", ".4f")):
        if found := report.get(name):
            naive = "" if found["after_naive"] is None else f", {found['after_naive']:{form}} with the plain swap"
            as_it_was = f"{found['patched']:{form}} as it was patched, " if "patched" in found else ""
            count = f"{found['tokens']} tokens" if "tokens" in found else f"{found['images']} images"
            print(
                f"{name} on {count} of {found['data']}: {as_it_was}{found['before']:{form}} before, "
                f"{found['after']:{form}} after{naive}"
            )
    print(f"saved to {output_dir} in {report['seconds']:.0f} s", file=sys.stderr)
