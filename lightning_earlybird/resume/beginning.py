"""Whether a fit goes on with what a callback knows, or begins anew."""

from __future__ import annotations

import weakref

import lightning.pytorch as pl

# Beside the callbacks and not in them, where a weak reference would keep them from being copied and pickled.
_LAST: weakref.WeakKeyDictionary[pl.Callback, weakref.ref[pl.LightningModule]] = weakref.WeakKeyDictionary()


def begins_anew(trainer: pl.Trainer, module: pl.LightningModule, callback: pl.Callback) -> bool:
    """Whether this fit is the first of a training; to be asked once in each fit, in a callback's ``setup``.

    The same Trainer may be given another module, which it trains from the step that it has come to: the step alone
    does not tell. A checkpoint's state is loaded after ``setup``, whatever this says.

    Args:
        trainer: The Trainer of the fit.
        module: Its LightningModule.
        callback: Who asks.
    """
    last = _LAST.get(callback)
    _LAST[callback] = weakref.ref(module)
    return trainer.global_step == 0 or last is None or last() is not module
