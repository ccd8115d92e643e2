"""What each arm is, in plain words."""

from typing import Any

from crrelu_llm.comparison.report.contents import Report
from crrelu_llm.comparison.report.tables import Cell, Table

_NAMES = {"crrelu": "CRReLU", "relu": "ReLU", "gelu": "GELU", "silu": "SiLU", "mish": "Mish", "elu": "ELU"}


def arms(report: Report) -> Table:
    """One row a trained arm."""
    table = Table(["arm", "what it is"], words=2)
    originals = sorted({site["original"] for arm in report.get("arms", []) for site in _sites(arm)})
    for arm in report.get("arms", []):
        words = _native(originals) if arm.get("activation") == "native" else _swapped(arm)
        table.rows.append([Cell(arm["arm"], arm=arm["arm"]), Cell(words)])
    return table


def _sites(arm: dict[str, Any]) -> list[dict[str, Any]]:
    return (arm.get("patch") or {}).get("sites") or []


def _native(originals: list[str]) -> str:
    own = f" ({', '.join(originals)})" if originals else ""
    return f"The model as it is, with its own activation{own}."


def _swapped(arm: dict[str, Any]) -> str:
    options = {**((arm.get("patch") or {}).get("options") or {}), **(arm.get("options") or {})}
    activation = str(arm.get("activation"))
    words = _NAMES.get(activation, activation)
    if options.get("layers") is not None or options.get("every"):
        words += " in some layers only"
    if options.get("calibration") == "none":
        words += ", put in the place of the model's own activation as it is"
    else:
        words += ", fitted to compute what the model's own activation computed"
        words += "; the layer after it was fitted too" if options.get("calibration") == "refit" else ""
    if activation == "crrelu" and options.get("epsilon_per"):
        learned = "frozen" if str(options.get("epsilon_learning_rate", "")) in ("0", "0.0") else "learned"
        words += f"; ε is {learned}, one a {options['epsilon_per']}"
    return words + "."
