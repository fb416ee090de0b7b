"""Checks of constructor arguments that callbacks share."""

from collections.abc import Sequence


def check_positive(**values: int | None) -> None:
    """Refuse what is neither None nor an integer of at least 1.

    Raises:
        ValueError: The message names the argument.
    """
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} must be an integer of at least 1, or left at its default.")


def check_choice(name: str, value: object, known: Sequence[object]) -> None:
    """Refuse a value that is none of the known ones.

    Raises:
        ValueError: The message lists them.
    """
    if value not in known:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, known))}.")
