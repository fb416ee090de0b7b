"""A zoo of denoisers: every structure that users train, tiny, with one call each."""

import functools
from collections.abc import Callable

import torch
from models import Denoiser

from lightning_earlybird.structure import Verification, trace_plan, verify_plan
from zoo.by_hand import BY_HAND
from zoo.diffusers_models import DIFFUSERS
from zoo.edm import EDM

SECTIONS: dict[str, dict[str, Callable[[], Denoiser]]] = {
    "Models of diffusers": DIFFUSERS,
    "In the styles of ADM, EDM and EDM2": EDM,
    "Written by hand": BY_HAND,
}
ZOO = {name: build for networks in SECTIONS.values() for name, build in networks.items()}


def member(name: str, seed: int = 0) -> Denoiser:
    """A denoiser with reproducible weights and inputs, in evaluation mode; the random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = ZOO[name]()
    found.network.eval()
    return found


@functools.cache
def verified(name: str) -> tuple[Denoiser, Verification]:
    """A denoiser with its verified plan; shared between tests, which must not change it."""
    found = member(name)
    plan = trace_plan(found.network, found.args, found.kwargs)
    return found, verify_plan(found.network, plan, found.args, found.kwargs)
