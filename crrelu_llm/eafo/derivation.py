"""A derivation in full: the two forms of a correction, its extension to the whole line, and where it fails."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from crrelu_llm.eafo.correction import Correction, corrected
from crrelu_llm.eafo.formulas import Formula, shown
from crrelu_llm.errors import InputError

# The points at which the correction is tabulated, in standard deviations from the mean.
_POINTS = (-3.0, -2.0, -1.5, -1.0, -0.5, -0.1, 0.1, 0.5, 1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Extension:
    """A correction shared by all rising intervals, extended to the whole line with a free factor ε.

    Attributes:
        bump: The sympy expression multiplied by ε, with the sign chosen so that it starts with a plus.
        name: `CRReLU` if relu + ε·bump is CRReLU, with its centre and width; else None.
        sign: The sign of ε for which E log|f′| falls where the theory applies, including moving boundary values; 0
            if that rate does not exist.
    """

    bump: Any
    name: str | None
    sign: int


def extension(correction: Correction) -> Extension | None:
    """The step from a correction to a new activation; None if the intervals do not share one bump."""
    import sympy

    found = [formula.direction for formula in correction.formulas if formula.direction is not None]
    if not found or any(sympy.simplify(one - found[0]) != 0 for one in found[1:]):
        return None
    if len(correction.formulas) == 1 and correction.activation.kinks == ():
        return None  # smooth: it already holds on the whole line
    try:
        corrected(correction, 0.0)
    except InputError:
        return None  # a pole
    sign = -1 if found[0].could_extract_minus_sign() else 1
    total = correction.rate() + correction.boundary_rate()
    falls = int(-np.sign(total)) * sign if np.isfinite(total) else 0
    return Extension(sign * found[0], _crrelu(correction), falls)


def _crrelu(correction: Correction) -> str | None:
    """CRReLU's name if relu's correction is that of a normal density, the only density with a linear score."""
    density = correction.density
    if correction.activation.name != "relu" or not np.isfinite(density.std):
        return None
    t = density.mean + density.std * np.linspace(-4, 4, 33)
    if not np.allclose(density.log_derivative(t), (density.mean - t) / density.std**2, rtol=1e-9, atol=1e-12):
        return None
    standard = (density.mean, density.std) == (0, 1)
    return "CRReLU" if standard else f"CRReLU with centre {density.mean:g} and width {density.std:g}"


def document(correction: Correction) -> dict[str, Any]:
    """Everything about a correction as plain values, with formulas in sympy's notation and in LaTeX.

    Returns:
        `activation`, `density`, `density_formula`, `pieces` (`low`, `high`, `forward`, `direction`, `inverse`; None
        for a missing formula), `latex`, `extension` (`bump`, `name`, `sign`, `latex`) or None, `excluded` (`low`,
        `high`, `reason`), `rate` and `boundary_rate` (nats per unit of ε), and `values` (`t`, `activation`,
        `correction`, `applies`).
    """
    import sympy

    t = sympy.Symbol("t", real=True)
    density = correction.density
    formula, step = density.expression(t), extension(correction)
    points = density.center + density.spread * np.array(_POINTS)
    rows = (points, correction.activation.value(points), correction.forward(points), correction.applies(points))
    return {
        "activation": correction.activation.name,
        "density": density.name,
        "density_formula": None if formula is None else str(formula),
        "pieces": [_piece(found) for found in correction.formulas],
        "latex": correction.latex or None,
        "extension": step
        and {
            "bump": str(shown(step.bump)),
            "name": step.name,
            "sign": step.sign,
            "latex": sympy.latex(shown(step.bump)),
        },
        "excluded": [
            {"low": _round(entry.low), "high": _round(entry.high), "reason": entry.reason}
            for entry in correction.excluded
        ],
        "rate": correction.rate(),
        "boundary_rate": _round(correction.boundary_rate()),
        "values": [
            {"t": float(x), "activation": float(f), "correction": float(c), "applies": bool(ok)}
            for x, f, c, ok in zip(*rows, strict=True)
        ],
    }


def _piece(formula: Formula) -> dict[str, Any]:
    def text(value: Any) -> str | None:
        return None if value is None else str(shown(value))

    return {
        "low": str(formula.low),
        "high": str(formula.high),
        "forward": text(formula.forward),
        "direction": text(formula.direction),
        "inverse": text(formula.inverse),
    }


def _round(value: float) -> float:
    return round(value, 6) + 0.0  # no −0


def text(found: dict[str, Any]) -> str:
    """The document as readable lines."""
    lines = [f"{found['activation']} × {found['density']}"]
    if found["density_formula"]:
        lines.append(f"  density        p(t) = {found['density_formula']}")
    if not found["pieces"]:
        lines.append("  no closed form (the density or the activation has no formula); values are below")
    for piece in found["pieces"]:
        where = f"{piece['low']} < t < {piece['high']}".replace("oo", "∞")
        if piece["forward"] is None:
            lines.append(f"  {where}: none, f′ = 0")
            continue
        lines.append(f"  {where}:")
        lines.append(f"    forward      c(t) = p′ − p·f″/f′ = {piece['forward']}")
        lines.append(f"    direction    {piece['direction']}")
        lines.append(f"    inverse      η(x) = {piece['inverse'] or 'no elementary inverse; computed numerically'}")
    if found["extension"]:
        bump, name, sign = (found["extension"][key] for key in ("bump", "name", "sign"))
        lines.append(f"  extended to the whole line with a free ε: f(t) + ε·{bump}" + (f"   = {name}" if name else ""))
        if sign:
            side = "<" if sign < 0 else ">"
            lines.append(f"    to first order and where the theory applies, E log|f′| falls for ε {side} 0")
        if any("f′ = 0" in entry["reason"] and entry["low"] < entry["high"] for entry in found["excluded"]):
            lines.append("    on the flat stretch f has entropy −∞, which any ε ≠ 0 raises")
    lines.append(
        f"  E log|f′|      changes by {found['rate']:+.5g}·ε nats along c with the boundary values held, and by "
        f"{found['boundary_rate']:+.5g}·ε through them"
    )
    for entry in found["excluded"]:
        where = f"at {entry['low']:g}" if entry["low"] == entry["high"] else f"{entry['low']:g} to {entry['high']:g}"
        lines.append(f"  does not apply {where}: {entry['reason']}")
    if not found["pieces"]:
        lines.append("        t        f(t)        c(t)")
        lines += [
            f"  {row['t']:+7.3f}  {row['activation']:+10.5f}  "
            + (f"{row['correction']:+10.5f}" if np.isfinite(row["correction"]) else "         –")
            + ("" if row["applies"] else "  (does not apply)")
            for row in found["values"]
        ]
    return "\n".join(lines)


def summary(found: dict[str, Any]) -> str:
    """The document as one line of a table."""
    directions = list(dict.fromkeys(piece["direction"] for piece in found["pieces"] if piece["direction"]))
    stretches = sum(entry["low"] < entry["high"] for entry in found["excluded"])
    shown = "; ".join(directions) or "numerically only"
    note = f"   ({stretches} stretch{'es' * (stretches > 1)} excluded)" if stretches else ""
    return f"{found['activation']:12}  {found['density']:22}  {shown}{note}"
