"""Backward passes that have no derivative of their own."""

from collections.abc import Callable
from functools import wraps

import torch
from torch.autograd.function import once_differentiable

from repro.errors import ReproError


def once(backward: Callable) -> Callable:
    """torch's `once_differentiable`, which is silent where gradients of gradients are asked for and start from a constant."""

    @wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled():
            raise ReproError("create_graph=True: the gradients of this package cannot be differentiated again")
        with torch.autocast(gradients[0].device.type, enabled=False):  # in the numbers of the forward pass
            return differentiable_once(ctx, *gradients)

    differentiable_once = once_differentiable(backward)
    return checked
