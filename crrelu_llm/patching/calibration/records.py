"""What calibration says about one site."""

from dataclasses import dataclass


@dataclass
class Record:
    """What calibration did to one site.

    Attributes:
        kept: The level that the site ended with: the one asked for, or the best below it.
        relative_error: Root mean square of (new − original) over that of the original, given the same input, at the
            MLP's product, each token weighted as for the fit, on tokens that were held back.
        relative_error_naive: The same right after a plain swap.
        scale_mean: Mean of |scale|.
        note: Why less was kept than was asked for.
        changed_weights: Whether the following projection is no longer the checkpoint's.
    """

    kept: str
    relative_error: float
    relative_error_naive: float
    scale_mean: float = 1.0
    note: str | None = None
    changed_weights: bool = False
