"""`crrelu env`: versions, private parts they lack, device, and which CRReLU backend is used here and why."""

import json
from typing import Any

from crrelu_llm.cli import options
from crrelu_llm.cli.parser import Parser

_SIZES = {"small": 1 << 14, "large": 1 << 24}
_DTYPES = ("float32", "bfloat16")


def run(argv: list[str]) -> int:
    """Runs the command."""
    parser = Parser(
        prog="crrelu env",
        description="What a bug report needs: the versions of the libraries, what this package relies on in "
        "them and does not find, the device, and which backend computes CRReLU here and why.",
        epilog="example: crrelu env --json",
    )
    options.add_json(parser, "text")
    args = parser.parse_args(argv)
    from crrelu_llm.quiet import quieten_libraries

    quieten_libraries()
    from crrelu_llm.compat import problems
    from crrelu_llm.environment import environment
    from crrelu_llm.kernels import choice

    override = choice.override()
    document = {
        "environment": environment(),
        "problems": problems(),
        "override": None if override is None else {"backend": override[0], "source": override[1]},
        "backends": [row for device in _devices() for row in _chosen(device)],
    }
    print(json.dumps(document, indent=2, ensure_ascii=False) if args.json else _text(document))
    return 0


def _devices() -> list[Any]:
    import torch

    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def _chosen(device: Any) -> list[dict[str, Any]]:
    """The backend that computes CRReLU on a device, for each dtype and size."""
    import torch

    from crrelu_llm.kernels import choice

    name = "" if device.type == "cpu" else torch.cuda.get_device_name(device)
    rows = []
    for dtype in _DTYPES:
        for size, elements in _SIZES.items():
            backend, reason = choice.choose(device, getattr(torch, dtype), elements)
            about = {"device": str(device), "device_name": name, "dtype": dtype, "size": size, "elements": elements}
            rows.append(about | {"backend": backend, "reason": reason})
    return rows


def _text(document: dict[str, Any]) -> str:
    about = document["environment"]
    lines = [f"{name:<14}{version}" for name, version in about["versions"].items()]
    keys = ("python", "platform", "processor", "device", "threads")
    lines += [f"{key:<14}{about[key]}" for key in keys]
    found = document["problems"]
    state = "some are missing:" if found else "all there"
    lines += ["", f"private parts of these libraries that this package relies on: {state}"]
    lines += [f"  {problem}" for problem in found]
    override = document["override"]
    chosen = f"{override['backend']}, set by {override['source']}" if override else "the best one for each call"
    lines += ["", f"CRReLU backend: {chosen}"]
    for row in document["backends"]:
        where = f"{row['device']} {row['device_name']}".strip()
        what = f"{row['dtype']}, {row['size']} ({row['elements']:,} elements)"
        lines.append(f"  {where}  {what:<42}  {row['backend']}: {row['reason']}")
    return "\n".join(lines)
