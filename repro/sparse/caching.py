"""Compiled kernels kept on disk, beside their sources, so that only the first process compiles them.

numba's own `cache=True` serves neither kernels that are made by a function, which it tells apart by a pickle of what they close
over, another one in every process; nor kernels of several files, of which it watches one. Here files and machine code are named
after what is closed over, and files also after what the sources say.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from numba import njit, types
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache
from numba.core.ccallback import CFunc
from numba.core.dispatcher import Dispatcher


def kept(function: Callable) -> Dispatcher:
    """`numba.njit`, but kept.

    `function` may close over kernels, numbers, types and intrinsics, known by their names; not over addresses, which end with
    their process.
    """
    dispatcher = njit(function)
    dispatcher._cache = _kept(function)
    return dispatcher


def kept_callback(function: Callable) -> CFunc:
    """`numba.cfunc` of a function (address) -> nothing, but kept like that of `kept`."""
    callback = CFunc(function, ((types.uintp,), types.void), {}, {})
    callback._cache = _kept(function)
    callback.compile()
    return callback


def _kept(function: Callable):
    # Machine code is known by qualified names: two kernels that the same function made, read from two files, would be taken for
    # one another.
    for part in _parts(function):
        part.__qualname__ = _own_name(part)
    try:
        return _Kept(function)
    except RuntimeError:  # no folder can be written to
        return NullCache()


class _Kept(FunctionCache):
    def __init__(self, function: Callable):
        super().__init__(function)
        folders = {Path(part.__code__.co_filename).parent for part in _parts(function)} | {Path(__file__).parent}
        sources = _digest(*map(_sources, sorted(folders)))
        self._cache_file = IndexDataCacheFile(self._cache_path, f"{self._impl.filename_base}-{sources}", "")

    def save_overload(self, signature, data):
        with suppress(OSError):  # where the disk is full the next process compiles again
            super().save_overload(signature, data)

    def _index_key(self, signature, codegen):
        return signature, codegen.magic_tuple()  # with the processor


def _closed_over(function: Callable) -> list:
    return [cell.cell_contents for cell in function.__closure__ or ()]


def _parts(function: Callable) -> Iterator[Callable]:
    """The function and those it closes over."""
    yield function
    for part in _closed_over(function):
        if isinstance(part, Dispatcher):
            yield from _parts(part.py_func)


def _own_name(function: Callable) -> str:
    """The qualified name, and for a function that closes over something a digest of that."""
    name, closed_over = function.__code__.co_qualname, _closed_over(function)
    return f"{name}-{_digest(*map(_name, closed_over))}" if closed_over else name


def _name(part) -> str:
    return f"{part.py_func.__module__}.{_own_name(part.py_func)}" if isinstance(part, Dispatcher) else repr(part)


@cache
def _sources(folder: Path) -> str:
    """All kernels in a folder, which are built of each other and of those of this package."""
    return _digest(*(file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py"))))


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
