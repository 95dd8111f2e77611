"""Backends that misbehave, and how a process of `repro.sparse.worker` is made to know them."""

import importlib
import os
import time

from repro.errors import ReproError
from repro.sparse import worker
from repro.sparse.peers import Backend


def right(weights, x):
    return lambda: weights @ x


def wrong(weights, x):
    return lambda: 1.001 * (weights @ x)


def failing(weights, x):
    raise ValueError("no such matrix")


def dying(weights, x):
    os._exit(3)


def dying_later(weights, x):
    calls = []

    def call():
        calls.append(1)
        if len(calls) > 1:
            os._exit(4)
        return weights @ x

    return call


def hanging(weights, x):
    time.sleep(60)


def absent(weights, x):
    importlib.import_module("a_library_that_nobody_has")


def unable(weights, x):
    raise ReproError("this processor is too old")


def unable_when_sparse(weights, x):
    if (weights == 0).mean() > 0.6:
        raise ReproError("too many zeros")
    return lambda: weights @ x


def telling_threads(weights, x):
    raise ReproError(" ".join(os.environ[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "NUMBA", "OPENBLAS")))


TOYS = {
    function.__name__.replace("_", " "): Backend(runtime, function, sparse)
    for function, runtime, sparse in (
        (right, "toy", True),
        (wrong, "toy", False),
        (failing, "toy", False),
        (dying, "frail", False),
        (dying_later, "frail", False),
        (hanging, "slow", False),
        (absent, "toy", False),
        (unable, "toy", False),
        (unable_when_sparse, "toy", True),
        (telling_threads, "toy", False),
    )
}


def serve(descriptor: int) -> None:
    worker.BACKENDS.update(TOYS)
    worker.serve(descriptor)
