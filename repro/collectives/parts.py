"""A model's parameters divided into the parts in which they travel between ranks."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from repro.collectives.operations import broadcast
from repro.errors import ReproError


class Part:
    """Parameters that travel together; their gradients are views of one message. Raises ReproError if dtypes differ."""

    def __init__(self, name: str, parameters: list[nn.Parameter]):
        if len(kinds := {f"{p.dtype} on {p.device}" for p in parameters}) > 1:
            raise ReproError(f"{name} has parameters of {', '.join(sorted(kinds))}: they must be alike to be one message")
        self.name, self.parameters = name, parameters
        self.gradient = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
        self.missing = 0  # parameters whose gradient is not formed yet

    def clear(self) -> None:
        """Begin a new gradient."""
        self.gradient.zero_()
        for parameter, view in self._views(self.gradient):
            parameter.grad = view
        self.missing = len(self.parameters)

    @torch.no_grad()
    def broadcast(self, algorithm: str, *, group: dist.ProcessGroup, **options) -> None:
        """Give all ranks the parameters of rank 0."""
        values = torch.cat([p.flatten() for p in self.parameters])
        broadcast(values, algorithm, group=group, **options)
        if group.rank() != 0:
            for parameter, value in self._views(values):
                parameter.copy_(value)

    def _views(self, flat: Tensor) -> Iterable[tuple[nn.Parameter, Tensor]]:
        pieces = flat.split([p.numel() for p in self.parameters])
        return ((p, piece.view(p.shape)) for p, piece in zip(self.parameters, pieces, strict=True))


def divide(model: nn.Module, layers: Iterable[nn.Module]) -> dict[nn.Parameter, Part]:
    """The part of each trained parameter: one part a layer, with what no layer before it has.

    Raises ReproError when there are none, some in no layer, or some of different dtypes in one layer.
    """
    names = {module: name or "the model" for name, module in model.named_modules()}
    part_of = {}
    for module in layers:
        if new := [p for p in module.parameters() if p.requires_grad and p not in part_of]:
            part_of |= dict.fromkeys(new, Part(names[module], new))
    if left := [name for name, p in model.named_parameters() if p.requires_grad and p not in part_of]:
        raise ReproError(f"no layer holds {', '.join(left)}: `layers` must hold all trained parameters")
    if not part_of:
        raise ReproError("nothing to train: the model has no parameter that requires a gradient")
    return part_of
