"""`crrelu export`: a patched model for other runtimes."""

import json
import sys
from pathlib import Path
from typing import Any

from crrelu_llm.cli import options
from crrelu_llm.cli.parser import Parser
from crrelu_llm.errors import InputError
from crrelu_llm.files import alone


def _parser() -> Parser:
    parser = Parser(
        prog="crrelu export",
        description="Write a patched model for another runtime, load it there, and compare it with torch: logits, "
        "greedy continuation and tokens a second. `transformers` writes a checkpoint that loads without this package.",
        epilog="example: crrelu export smollm2-crrelu --format onnx --output_dir smollm2-onnx. GGUF (llama.cpp) has "
        "no CRReLU: `crrelu patch MODEL --activation silu --calibration none` goes back to the model's own "
        "activation, and prints the cost in perplexity.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="output_dir of `crrelu patch`, `sft` or `dpo`, or a hub name")
    add("--format", required=True, help="onnx, openvino, executorch or transformers")
    add("--output_dir", required=True, help="directory to write; it must not exist, or be empty")
    add("--dtype", default="float32", help="dtype to export in (default: float32)")
    add("--max_length", type=int, default=512, help="executorch: tokens of the longest text (default: 512)")
    options.add_trust_remote_code(parser)
    options.add_json(parser, what="export_report.json")
    return parser


def run(argv: list[str]) -> int:
    """Runs the command."""
    args = _parser().parse_args(argv)
    from crrelu_llm.export.formats import require

    require(args.format, args.dtype)
    if args.max_length < 2:
        raise InputError(f"--max_length must be 2 or more, not {args.max_length}")
    output_dir = options.new_directory(args.output_dir)
    from crrelu_llm.export.export import export_model

    with alone(output_dir.parent, "crrelu export", f".{output_dir.name}.lock"):
        options.new_directory(output_dir)  # another call may have made it meanwhile
        report = export_model(
            args.model, args.format, output_dir, args.dtype, args.max_length, args.trust_remote_code, _tell
        )
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report, output_dir)
    return 0


def _tell(text: str) -> None:
    print(f"{text} …", file=sys.stderr, flush=True)


def _print(report: dict[str, Any], output_dir: Path) -> None:
    speed = report["tokens_per_second"]
    print(f"{report['model_type']} -> {report['format']}, {report['dtype']}, run by {report['runtime']}")
    for file in report["files"]:
        print(f"  {file['name']}  {file['bytes'] / 1e6:.1f} MB")
    if not report["cache"]:
        limit = f", at most {report['max_length']} tokens" if report["max_length"] else ""
        print(f"  the graph has no cache: each token computes the whole text{limit}")
    print(
        f"largest difference of logits: {report['largest_logit_difference']:.2g} (largest logit "
        f"{report['largest_logit']:.3g}, {report['compared_tokens']} tokens)"
    )
    equal = "equal" if report["greedy_equal"] else "NOT equal"
    print(f"greedy continuation, {report['greedy_tokens']} tokens: {equal}")
    print(
        f"tokens a second: torch {speed['torch']:.1f}, {report['runtime']} {speed['runtime']:.1f} "
        f"({report['threads']} threads)"
    )
    print(f"saved to {output_dir} in {report['seconds']:.0f} s", file=sys.stderr)
