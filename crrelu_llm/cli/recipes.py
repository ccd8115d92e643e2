"""`crrelu recipes list|show|copy`: the shipped recipes and Accelerate configurations."""

import difflib
import json
from pathlib import Path

from crrelu_llm.cli import options
from crrelu_llm.cli.parser import Parser
from crrelu_llm.columns import aligned
from crrelu_llm.errors import InputError
from crrelu_llm.recipes_path import recipes_dir


def run(argv: list[str]) -> int:
    """Runs the command."""
    args = _parser().parse_args(argv)
    if args.action == "list":
        _list(args.json)
    elif args.action == "show":
        print(_find(args.name).read_text(encoding="utf-8"), end="")
    else:
        print(f"wrote {_copy(_find(args.name), Path(args.destination))}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="crrelu recipes",
        description="The shipped recipes: YAML files of TRL's own keys plus an activation section.",
        epilog="example: crrelu recipes copy smollm2-135m/dpo/config_lora my.yaml && crrelu dpo --config my.yaml",
    )
    actions = parser.add_subparsers(dest="action", metavar="list|show|copy", required=True)
    listing = actions.add_parser("list", help="print the names, each with the first line of its comment")
    options.add_json(listing, "a table", "JSON, [{name, path, summary}],")
    show = actions.add_parser("show", help="print one recipe")
    copy = actions.add_parser("copy", help="copy one recipe to a new file; never overwrites")
    for action in (show, copy):
        action.add_argument("name", metavar="NAME", help="as `list` prints it, e.g. smollm2-135m/dpo/config_lora")
    copy.add_argument("destination", metavar="DEST", help="a new file, or an existing folder")
    return parser


def _recipes() -> dict[str, Path]:
    """Maps each recipe's name (its path under `recipes/`, without `.yaml`) to its file, in order of name."""
    root = recipes_dir()
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def _find(name: str) -> Path:
    recipes = _recipes()
    wanted = name.removesuffix(".yaml")
    if wanted in recipes:
        return recipes[wanted]
    close = difflib.get_close_matches(wanted, recipes, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    raise InputError(f"no recipe is called {name!r}; {hint}`crrelu recipes list` shows all names")


def _summary(path: Path) -> str:
    """Returns the first line of a recipe's opening comment."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def _list(as_json: bool) -> None:
    recipes = _recipes()
    if as_json:
        rows = [{"name": name, "path": str(path), "summary": _summary(path)} for name, path in recipes.items()]
        print(json.dumps(rows, indent=2))
        return
    print("\n".join(aligned([(name, _summary(path)) for name, path in recipes.items()])))


def _copy(source: Path, destination: Path) -> Path:
    """Copies a recipe to a file that must not exist yet; returns the file written."""
    target = destination / source.name if destination.is_dir() else destination
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise InputError(f"{target} already exists; name another file, or remove it first") from None
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}; name another place") from None
    return target
