"""The record of a calibration for one site."""

from dataclasses import dataclass


@dataclass
class Record:
    """The result of the calibration of one site.

    Attributes:
        kept: The level that the site ended with: the requested one, or the best below it.
        relative_error: Root mean square of (new − original) over the original's, on the same inputs, measured at the
            MLP's product on held-back tokens, each weighted as in the fit.
        relative_error_naive: The same error right after a plain swap.
        scale_mean: Mean of |scale|.
        note: Why the level is lower than requested.
        changed_weights: Whether calibration changed the weights of the projection after the site.
    """

    kept: str
    relative_error: float
    relative_error_naive: float
    scale_mean: float = 1.0
    note: str | None = None
    changed_weights: bool = False
