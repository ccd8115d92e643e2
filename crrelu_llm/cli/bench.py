"""`crrelu bench op|mlp|train`: speed and memory of CRReLU against GELU, in one process."""

import argparse
import json
import shlex
import sys
from typing import Any

from crrelu_llm.cli import options
from crrelu_llm.cli.parser import Parser

_DTYPES = ("float32", "bfloat16", "float16")
_HOW = (
    "The cases are timed in turns. The table has medians with quartiles, and the peak of what torch allocates on top "
    "of what it held before."
)


def _parser() -> Parser:
    parser = Parser(
        prog="crrelu bench",
        description=f"Time and memory of CRReLU against GELU, in one process. {_HOW}",
        epilog="example: crrelu bench op --shapes 4096x3072 --output_dir bench --plot",
    )
    what = parser.add_subparsers(dest="what", metavar="op|mlp|train", required=True)
    op = what.add_parser(
        "op",
        help="activations and gated products: each CRReLU backend, GELU, SiLU, ReLU, torch.compile, Liger",
        description="Activations and gated products alone. The bandwidth counts the bytes that must be read and "
        f"written at least; the table compares it with a copy into a new tensor. {_HOW}",
        epilog="example: crrelu bench op --shapes 4096x3072 16384x1536 --dtypes bfloat16 --output_dir bench --plot",
    )
    op.add_argument(
        "--shapes",
        nargs="+",
        type=_shape,
        default=[(4096, 3072), (16384, 1536)],
        metavar="RxC",
        help="rows x columns of one input (default: 4096x3072 16384x1536)",
    )
    mlp = what.add_parser(
        "mlp",
        help="the training step of a stack of MLPs",
        description=f"Forward and backward pass of a stack of MLPs, plain (as in GPT-2) and gated (Llama). {_HOW}",
        epilog="example: crrelu bench mlp --layers 8 --hidden 576 --width 1536 --tokens 2048 --dtypes float32",
    )
    for name, default, text in (
        ("layers", 4, "number of MLPs in the stack"),
        ("hidden", 768, "size of the input and output"),
        ("width", 3072, "size of the activation"),
        ("tokens", 1024, "rows of the input"),
    ):
        mlp.add_argument(f"--{name}", type=options.count, default=default, help=f"{text} (default: {default})")
    train = what.add_parser(
        "train",
        help="one fine-tuning step of a model",
        description="Forward pass, loss, backward pass and AdamW step of a model as it is, with GELU and with CRReLU, "
        f"on random tokens. {_HOW}",
        epilog="example: crrelu bench train HuggingFaceTB/SmolLM2-135M-Instruct --batch_size 4 --length 512",
    )
    options.add_model(train)
    train.add_argument("--batch_size", type=options.count, default=4, help="rows of tokens (default: 4)")
    train.add_argument("--length", type=options.count, default=128, help="tokens a row (default: 128)")
    for action, dtypes in ((op, ["float32", "bfloat16"]), (mlp, ["float32"]), (train, ["float32"])):
        _add_common(action, dtypes)
    return parser


def _add_common(parser: argparse.ArgumentParser, dtypes: list[str]) -> None:
    add = parser.add_argument
    add("--dtypes", nargs="+", choices=_DTYPES, default=dtypes, help=f"(default: {' '.join(dtypes)})")
    options.add_epsilon_per(parser)
    add("--repeats", type=options.count, default=20, help="rounds of measurements (default: 20)")
    options.add_device(parser)
    add("--output_dir", help="directory for bench.json; without it, nothing is written")
    add("--plot", action="store_true", help="also draw bench.png in the output directory")
    options.add_json(parser)


def run(argv: list[str]) -> int:
    """Runs the command."""
    args = _parser().parse_args(argv)
    output_dir = options.writable_if_given(args.output_dir, args.plot)
    from crrelu_llm.bench.table import text
    from crrelu_llm.environment import environment
    from crrelu_llm.files import plain, write_json
    from crrelu_llm.kernels import choice
    from crrelu_llm.quiet import quieten_libraries

    device = _device(args.device)
    choice.forced()  # a wrong name in the environment is said before anything is measured
    quieten_libraries()
    about = environment()
    document = {
        "device": about["device"] if device.type == "cuda" else "cpu",
        "bench": args.what,
        "command": shlex.join(["crrelu", "bench", *argv]),
        "environment": about,
        "epsilon_per": args.epsilon_per,
        "repeats": args.repeats,
    }
    document = plain(document | _measure(args, device))
    if output_dir is not None:
        write_json(output_dir / "bench.json", document)
        if args.plot:
            from crrelu_llm.bench.bar_plot import PLOT, plot

            plot(document, output_dir / PLOT)
        _say(f"saved to {output_dir}")
    print(json.dumps(document, indent=2, ensure_ascii=False) if args.json else text(document))
    return 0


def _measure(args: argparse.Namespace, device: Any) -> dict[str, Any]:
    common = {"dtypes": args.dtypes, "epsilon_per": args.epsilon_per, "repeats": args.repeats}
    if args.what == "op":
        from crrelu_llm.bench import op

        return op.run(args.shapes, **common, device=device, say=_say)
    if args.what == "mlp":
        from crrelu_llm.bench import mlp

        return mlp.run(args.layers, args.hidden, args.width, args.tokens, **common, device=device, say=_say)
    from crrelu_llm.bench import train

    return train.run(args.model, args.batch_size, args.length, **common, device=device, say=_say)


def _say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


def _device(name: str) -> Any:
    import torch

    cuda = options.device(name) == "cuda"
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; write rows x columns, such as 4096x3072")
    return shape
