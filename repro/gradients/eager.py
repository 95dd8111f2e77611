"""Functions that torch.compile is to leave as they are."""

from collections.abc import Callable
from functools import wraps

import torch


def eager(function: Callable) -> Callable:
    """`torch.compiler.disable`, applied at the first call: to import torch's compiler takes as long as to import torch."""

    @wraps(function)
    def run(*arguments, **keywords):
        disabled = getattr(function, "_disabled", None)
        if disabled is None:
            disabled = function._disabled = torch.compiler.disable(function)
        return disabled(*arguments, **keywords)

    return run
