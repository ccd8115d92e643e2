"""`crrelu card`: a Hugging Face model card of a patched checkpoint."""

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from crrelu_llm.cli.parser import Parser
from crrelu_llm.errors import DiskError, InputError

if TYPE_CHECKING:
    from crrelu_llm.report.schema import Report


def _parser() -> Parser:
    parser = Parser(
        prog="crrelu card",
        description="Write the model card (README.md) of a patched checkpoint: ε of every layer, how it was "
        "calibrated and trained, and the results of a comparison or an evaluation, in the metadata too.",
        epilog="example: crrelu card smollm2-crrelu --report comparison --arm crrelu:epsilon_per=channel",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="output_dir of `crrelu patch`, `sft` or `dpo`")
    add("--report", metavar="D", help="output_dir of `crrelu compare` or `eval`, whose results go into the card")
    add("--arm", help="the arm of the report that this checkpoint is (default: its only CRReLU arm)")
    add("--output", metavar="FILE", help="default: README.md in the checkpoint")
    add("--overwrite", action="store_true", help="replace a card that is there")
    add("--push_to_hub", action="store_true", help="also upload the card; needs --hub_model_id")
    add("--hub_model_id", metavar="NAME", help="the repository on the Hub")
    add("--hub_token", metavar="TOKEN", help="default: the one that `hf auth login` has stored")
    return parser


def run(argv: list[str]) -> int:
    """Runs the command."""
    args = _parser().parse_args(argv)
    if args.push_to_hub and not args.hub_model_id:
        raise InputError("--push_to_hub needs --hub_model_id, the repository to push to")
    checkpoint = Path(args.checkpoint)
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint}: no such directory; give the output_dir of `crrelu patch`, `sft` or `dpo`")
    path = Path(args.output) if args.output else checkpoint / "README.md"
    if path.exists() and not args.overwrite and not _is_of_patch(path):
        raise InputError(f"{path} is there already; add --overwrite to replace it, or choose another --output")
    from crrelu_llm.comparison.card import card

    text = card(checkpoint, _report(args.report), args.arm)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    except OSError as error:
        raise DiskError(f"{path} could not be written: {str(error.strerror).lower()}") from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
    print(f"saved to {path}", file=sys.stderr)
    if args.push_to_hub:
        from huggingface_hub import ModelCard

        print(ModelCard(text).push_to_hub(args.hub_model_id, token=args.hub_token))
    return 0


def _is_of_patch(path: Path) -> bool:
    from crrelu_llm.patching import readme

    return path.is_file() and readme.is_ours(path.read_text(encoding="utf-8", errors="replace"))


def _report(name: str | None) -> "Report | None":
    if name is None:
        return None
    from crrelu_llm.report.schema import Report

    path = Path(name) / "report.json" if Path(name).is_dir() else Path(name)
    return Report.read(path, f"--report {path}")
