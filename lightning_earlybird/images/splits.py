"""The names under which people keep the parts of a data set."""

from __future__ import annotations

_SPELLINGS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


def canonical_split(name: str) -> str:
    """``train``, ``validation`` or ``test`` for all their usual spellings; any other name as it is."""
    return next((split for split, spellings in _SPELLINGS.items() if name.lower() in spellings), name)


def is_split_name(name: str) -> bool:
    """Whether this is a usual name of a split."""
    return any(name.lower() in spellings for spellings in _SPELLINGS.values())
