"""What each arm is, in plain words."""

import re
from typing import Any

from crrelu_llm.report.schema import Arm, Report
from crrelu_llm.report.tables import Cell, Table

_NAMES = {"crrelu": "CRReLU", "relu": "ReLU", "gelu": "GELU", "silu": "SiLU", "mish": "Mish", "elu": "ELU"}

_OF_A_RECIPE = ("calibration", "epsilon_per", "layers", "every", "epsilon_learning_rate", "activation_l1")


def arms(report: Report) -> Table:
    """One row for each trained arm."""
    table = Table(["arm", "what it is"], words=2)
    originals = sorted({site["original"] for arm in report.arms for site in arm.sites})
    for arm in report.arms:
        words = _native(originals) if arm.activation == "native" else _swapped(arm, report.recipe)
        table.rows.append([Cell(arm.arm, arm=arm.arm), Cell(words)])
    return table


def _native(originals: list[str]) -> str:
    own = f" ({', '.join(originals)})" if originals else ""
    return f"The unpatched model, with its own activation{own}."


def _swapped(arm: Arm, recipe: dict[str, Any]) -> str:
    options = {key: recipe[key] for key in _OF_A_RECIPE if key in recipe}
    options |= {**((arm.patch or {}).get("options") or {}), **arm.options}
    words = _name(arm.activation)
    if options.get("layers") is not None or options.get("every"):
        words += " in some layers only"
    if options.get("calibration") == "none":
        words += ", in place of the model's own activation, without fitting"
    else:
        words += ", fitted to imitate the model's own activation"
        words += "; the layer after it was fitted too" if options.get("calibration") == "refit" else ""
    if options.get("activation_l1"):
        words += "; an L1 term pushes its outputs towards 0"
    if "crrelu" in arm.activation and options.get("epsilon_per"):
        rate = options.get("epsilon_learning_rate")
        learned = "frozen" if rate is not None and float(rate) == 0 else "learned"
        words += f"; ε is {learned}, one per {options['epsilon_per']}"
    return words + "."


def _name(activation: str) -> str:
    """`ReLU`, or `ReLU in layers 0-5, CRReLU in layers 6-` if layers differ."""
    parts = re.findall(r"([\d,-]+)=([^,=]+)", activation)
    if not parts:
        return _NAMES.get(activation, activation)
    return ", ".join(f"{_NAMES.get(name, name)} in layers {layers.strip(',')}" for layers, name in parts)
