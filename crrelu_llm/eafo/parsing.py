"""Parses densities on the command line: `normal(0,2)`, `0.3*normal(-1,1) + 0.7*laplace`, `samples:x.npy`."""

import ast
from pathlib import Path
from typing import Any

import numpy as np

from crrelu_llm.eafo import density as densities
from crrelu_llm.eafo import estimates
from crrelu_llm.eafo.density import Density
from crrelu_llm.errors import InputError

NAMES = ("normal", "logistic", "laplace", "student_t")
HOW = "write NAME or NAME(parameters), a sum like 0.3*normal(-1,1) + 0.7*laplace, or samples:FILE.npy"


def density(text: str) -> Density:
    """Reads a density.

    Args:
        text: `normal`, `normal(mean=0.5,std=2)`, `logistic(loc,scale)`, `laplace(loc,scale)`,
            `student_t(df,loc,scale)`, a weighted sum of these, or `samples:` with a .npy or text file of numbers.

    Raises:
        InputError: The text cannot be parsed, or is not a density.
    """
    if text.startswith("samples:"):
        return estimates.from_samples(_samples(Path(text.removeprefix("samples:"))), name=text)
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise InputError(f"--density {text!r} cannot be read; {HOW}.") from None
    terms = _terms(tree, text)
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]
    return densities.mixture([part for _, part in terms], [weight for weight, _ in terms])


def _samples(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise InputError(
            f"--density samples:{path} cannot be read ({why}); give a .npy file or a text file of numbers."
        ) from None


def _terms(tree: ast.expr, text: str) -> list[tuple[float, Density]]:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        return _terms(tree.left, text) + _terms(tree.right, text)
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Mult):
        return [(_number(tree.left, text), _named(tree.right, text))]
    return [(1.0, _named(tree, text))]


def _named(tree: ast.expr, text: str) -> Density:
    call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
    name = call.func.id if isinstance(call.func, ast.Name) else None
    if name not in NAMES:
        raise InputError(f"--density {text!r}: no density {ast.unparse(call.func)!r} ({', '.join(NAMES)}); {HOW}.")
    values = [_number(entry, text) for entry in call.args]
    named = {str(entry.arg): _number(entry.value, text) for entry in call.keywords}
    try:
        return getattr(densities, name)(*values, **named)
    except TypeError as error:
        raise InputError(
            f"--density {text!r}: {str(error).removeprefix(name)}".replace("()", name) + f"; {HOW}."
        ) from None


def _number(tree: ast.expr, text: str) -> float:
    try:
        return float(ast.literal_eval(tree))
    except (ValueError, TypeError):
        raise InputError(f"--density {text!r}: {ast.unparse(tree)!r} is not a number; {HOW}.") from None
