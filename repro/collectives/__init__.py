"""Collective operations over point-to-point messages, their cost model, and the training schedules they serve.

from repro.collectives import allreduce
allreduce(tensor, "linear pipeline")   # in place, over torch.distributed's process group
"""

from importlib import import_module

_HOMES = {
    "operations": ("allreduce", "broadcast", "reduce"),
    "schedules": ("ALGORITHMS", "COLLECTIVES", "schedule"),
    "transport": ("CollectiveError",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    """Imported when asked for, so that costs and schedules come without torch."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
