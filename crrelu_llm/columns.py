"""Aligned columns of text, as the commands print their tables."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], sides: str = "<", indent: str = "") -> list[str]:
    """Lines with the cells of each column under each other.

    Args:
        rows: All of the same length.
        sides: `<` (left) or `>` (right) for each column; the last one holds for all that follow.
        indent: Put before each line.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = sides.ljust(len(widths), sides[-1])
    return [
        indent
        + "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=False)).rstrip()
        for row in rows
    ]
