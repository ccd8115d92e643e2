"""The correction of an activation as formulas by sympy, if the activation and the density have formulas."""

from dataclasses import dataclass
from typing import Any

# Formulas with more operations are not simplified: sympy takes minutes for GELU × Student's t.
_SMALL = 30
_LONG = 1000


@dataclass(frozen=True)
class Formula:
    """The correction between two kinks, as sympy expressions of the real symbol `t` (forward) or `x` (inverse).

    Attributes:
        low, high: The interval of pre-activations t.
        forward: c(t), simplified; None where f′ = 0.
        direction: `forward` without its positive constant factor, which a learnable ε absorbs.
        inverse: η(x), where x is the output; None if the inverse is not elementary.
    """

    low: Any
    high: Any
    forward: Any
    direction: Any
    inverse: Any


def shown(formula: Any) -> Any:
    """A formula for display, with its floats rounded to six digits; None stays None."""
    import sympy

    if formula is None:
        return None
    return formula.xreplace({number: sympy.Float(number, 6) for number in formula.atoms(sympy.Float)})


def latex_or_none(formula: Any) -> str:
    """A formula in LaTeX, or a note that there is none."""
    import sympy

    return r"\text{none, } f' = 0" if formula is None else sympy.latex(shown(formula))


class Shorthand:
    """Replaces numbers with many digits by letters, because sympy's simplifier takes minutes with such numbers."""

    def __init__(self) -> None:
        self.letters: dict[Any, Any] = {}

    def shorten(self, expression: Any) -> Any:
        """The expression with a positive letter for the absolute value of each long number."""
        import sympy

        long = {number for number in expression.atoms(sympy.Rational) if max(abs(number.p), number.q) > _LONG}
        for number in long:
            self.letters.setdefault(abs(number), sympy.Dummy(positive=True))
        return expression.xreplace({number: sympy.sign(number) * self.letters[abs(number)] for number in long})

    def restore(self, expression: Any) -> Any:
        """The expression with its numbers restored, as floats."""
        import sympy

        return expression.subs({letter: sympy.Float(number, 17) for number, letter in self.letters.items()})


def formula(low: Any, high: Any, f: Any, p: Any, t: Any, short: Shorthand) -> Formula:
    """The correction of one piece of an activation.

    Args:
        low, high: The ends of the piece.
        f, p: The piece and the density, as sympy expressions of `t`.
        t: Their real symbol.
        short: The letters for long numbers, shared by all pieces.
    """
    import sympy

    f, p = short.shorten(f), short.shorten(p)
    # On one side of 0, |t| and sign(t) are known.
    sign = {"positive": True} if low == 0 else {"negative": True} if high == 0 else {}
    known = sympy.Symbol("t", real=True, **sign)
    f, p, t = f.subs(t, known), p.subs(t, known), known
    slope = sympy.diff(f, t)
    if slope == 0:
        return Formula(low, high, None, None, None)
    ratio = sympy.diff(f, t, 2) / slope
    # Both, because the simplifier turns sigmoid's ratio into tanh, and then misses that it is 0 for a logistic p.
    forward = _shorter(*(_shortest(sympy.diff(p, t) - p * form) for form in (ratio, _shortest(ratio))))
    factor, direction = forward.as_independent(t, as_Add=False)
    if factor.could_extract_minus_sign():
        direction = -direction
    plain = {known: sympy.Symbol("t", real=True)}
    inverse = _inverse_form(f, p, t)
    found = (forward.subs(plain), direction.subs(plain), inverse)
    return Formula(low, high, *(None if entry is None else short.restore(entry) for entry in found))


def _shortest(expression: Any) -> Any:
    import sympy

    candidates = [sympy.factor_terms(expression)]
    if sympy.count_ops(expression) < _SMALL:
        candidates += [sympy.factor(expression), sympy.factor(sympy.simplify(expression))]
    return _shorter(*candidates)


def _shorter(*candidates: Any) -> Any:
    import sympy

    return min(candidates, key=sympy.count_ops)


def _inverse_form(f: Any, p: Any, t: Any) -> Any:
    """η(x) for an f with an elementary inverse; otherwise η is computed numerically."""
    import sympy

    x = sympy.Symbol("x", real=True)
    y = _inverse_of(f, t, x)
    if y is None:
        return None
    slope = sympy.diff(y, x)
    return _shortest(-(p.subs(t, y) * sympy.diff(y, x, 2) / slope + sympy.diff(p, t).subs(t, y) * slope))


def _inverse_of(f: Any, t: Any, x: Any) -> Any:
    import sympy

    log, exp = sympy.log, sympy.exp
    for candidate, inverse in (
        (log(1 + exp(t)), log(exp(x) - 1)),
        (sympy.tanh(t), sympy.atanh(x)),
        (1 / (1 + exp(-t)), log(x / (1 - x))),
        (t**2, sympy.sqrt(x)),
    ):
        if f == candidate:
            return inverse
    if f.is_polynomial(t) and sympy.degree(f, t) == 1:
        return x / sympy.diff(f, t)
    scale = sympy.expand(sympy.diff(f, t) * exp(-t))
    if not scale.free_symbols:  # α·(eᵗ − 1)
        return log(1 + x / scale)
    return None
