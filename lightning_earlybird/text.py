"""How tables and times are written as plain text."""

from collections.abc import Collection, Sequence


def aligned(head: Sequence[str], body: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """A table as fixed-width text.

    Args:
        head: The names of the columns.
        body: One sequence of cells per line, as many as there are columns.
        left: Indices of the columns that are aligned to the left, as words are; the others to the right, as numbers.

    Returns:
        Lines without a trailing newline, the second one a rule.
    """
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, body)])


def duration(seconds: float) -> str:
    """A time for people, to two or three digits: ``350 ms``, ``4.2 s``, ``42 s``, ``3 min 20 s``, ``2.1 h``, ``3.5 d``.

    Args:
        seconds: At least 0.

    Returns:
        The time in the unit that suits it.
    """
    # Each limit lies where the smaller unit would round up to the larger one, so that no "60 s" is ever written.
    if seconds == 0 or 9.95 <= seconds < 59.5:
        return f"{seconds:.0f} s"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    if seconds < 47.95 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} d"
