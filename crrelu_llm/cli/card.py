"""`crrelu card`: a Hugging Face model card of a patched checkpoint."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from crrelu_llm.cli.parser import Parser
from crrelu_llm.errors import DiskError, InputError
from crrelu_llm.files import write_text

if TYPE_CHECKING:
    from crrelu_llm.report.schema import Report


def _parser() -> Parser:
    parser = Parser(
        prog="crrelu card",
        description="Write the model card (README.md) of a patched checkpoint: ε of every layer, how the model was "
        "calibrated and trained, and the results of a comparison or an evaluation, also in the metadata.",
        epilog="example: crrelu card smollm2-crrelu --report comparison --arm crrelu:epsilon_per=channel",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="output_dir of `crrelu patch`, `sft` or `dpo`")
    add("--report", metavar="D", help="output_dir of `crrelu compare` or `eval`: the results to put into the card")
    add("--arm", help="the arm of the report that this checkpoint belongs to (default: its only CRReLU arm)")
    add("--output", metavar="FILE", help="default: README.md in the checkpoint")
    add("--overwrite", action="store_true", help="replace an existing card")
    add("--push_to_hub", action="store_true", help="also upload the card to --hub_model_id")
    add("--hub_model_id", metavar="NAME", help="the repository on the Hub")
    add("--hub_token", metavar="TOKEN", help="default: the token that `hf auth login` stored")
    return parser


def run(argv: list[str]) -> int:
    """Runs the command."""
    args = _parser().parse_args(argv)
    if args.push_to_hub and not args.hub_model_id:
        raise InputError("--push_to_hub needs --hub_model_id, the repository on the Hub")
    checkpoint = Path(args.checkpoint)
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint}: no such directory; give the output_dir of `crrelu patch`, `sft` or `dpo`")
    path = Path(args.output) if args.output else checkpoint / "README.md"
    if path.exists() and not args.overwrite and not _is_of_patch(path):
        raise InputError(f"{path} already exists; add --overwrite to replace it, or choose another --output")
    from crrelu_llm.comparison.card import card

    text = card(checkpoint, _report(args.report), args.arm)
    try:
        write_text(path, text)
    except OSError as error:  # a file in the place of a directory, or the reverse
        raise DiskError(f"{path} could not be written: {str(error.strerror).lower()}") from error
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
