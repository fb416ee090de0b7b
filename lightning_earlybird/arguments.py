"""Checks of constructor arguments that callbacks share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException


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


def check_fraction(name: str, value: object, meaning: str) -> None:
    """Refuse what is no number in [0, 1].

    Raises:
        ValueError: The message names the argument and says what it is.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} must lie in [0, 1]: it is {meaning}.")


def plain_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings as checkpoints can carry them: NumPy's floats are floats, but do not load with weights_only=True."""
    return {name: float(value) if isinstance(value, float) else value for name, value in settings.items()}


def check_resumed(given: Mapping[str, object], saved: Mapping[str, object]) -> None:
    """Refuse to go on from a checkpoint under other settings than those that its masks or tickets were made under.

    Args:
        given: Argument name -> value of the callback that is resumed.
        saved: The same from the checkpoint; what it lacks is not compared.

    Raises:
        MisconfigurationException: The message names the argument.
    """
    for name, value in given.items():
        if name in saved and saved[name] != value:
            raise MisconfigurationException(
                f"{name}={value!r} does not fit the checkpoint, whose masks and tickets were made with "
                f"{name}={saved[name]!r}. Resume with that value, or begin a new training."
            )


def check_state_version(callback: object, state: Mapping[str, object], newest: int) -> None:
    """Refuse the state of a callback in a format that is not known.

    Args:
        callback: Whose state it is.
        state: What a checkpoint holds of it.
        newest: The format version that is written now.

    Raises:
        MisconfigurationException: The message names the version.
    """
    version = state.get("format_version")
    if type(version) is not int or not 1 <= version <= newest:
        raise MisconfigurationException(
            f"ckpt_path: the state of {type(callback).__name__} has format_version={version!r}, and this "
            f"lightning-earlybird reads 1 to {newest}. Upgrade it, or begin a new training."
        )


@contextmanager
def reading_state(callback: object) -> Iterator[None]:
    """For the block that takes over a callback's state: what it stumbles over means that the checkpoint is damaged.

    Errors that say what does not fit (``ValueError``) pass.

    Raises:
        MisconfigurationException: The message names the callback and what is wrong.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise MisconfigurationException(
            f"ckpt_path: the state of {type(callback).__name__} is damaged ({type(error).__name__}: {error}). Resume "
            "from another checkpoint."
        ) from error


def taken(state: Mapping[str, object], name: str, *kinds: type) -> Any:
    """A value out of a state that nobody vouches for.

    Args:
        state: What a checkpoint holds.
        name: Which value.
        *kinds: The types that it may have, and no other.

    Raises:
        KeyError: It is missing.
        TypeError: It has another type.
    """
    value = state[name]
    if type(value) not in kinds:
        expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise TypeError(f"{name!r} is a {type(value).__name__}, expected {expected}")
    return value
