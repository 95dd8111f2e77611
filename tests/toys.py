"""Small trials for the engine's tests, in a module of their own so that spawned and Dask workers can import them.

Each execution leaves a line in a side file of the folder TOYS_LOG, so that tests can count what was really run.
"""

import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from repro.engine import Outcome, Store, Trial, run_trials
from repro.errors import ReproError
from repro.files import write_atomically


def log(name: str, line: object) -> None:
    """Append a line; O_APPEND writes of this size are atomic, so processes may share a file."""
    with open(Path(os.environ["TOYS_LOG"]) / name, "a") as stream:
        stream.write(f"{line}\n")


def logged(folder: Path, name: str) -> list[str]:
    """The lines that executions have left."""
    path = folder / name
    return path.read_text().splitlines() if path.exists() else []


@dataclass(frozen=True, kw_only=True)
class Toy(Trial):
    """Sleeps, squares, tells."""

    study: ClassVar[str] = "toys"
    kind: ClassVar[str] = "toy"
    value: int
    sleep: float = 0.0

    def seconds(self):
        return self.sleep or 0.01

    def label(self):
        return f"toy {self.value}"

    def run(self, context, *needed):
        log("toy", self.value)
        time.sleep(self.sleep)
        return Outcome({"square": self.value**2, "threads": context.threads, "pid": os.getpid()})


@dataclass(frozen=True, kw_only=True)
class Walk(Trial):
    """A random walk of `steps` steps with a checkpoint after each: position and generator state."""

    study: ClassVar[str] = "toys"
    kind: ClassVar[str] = "walk"
    steps: int
    seed: int = 0
    pause: float = 0.05

    def seconds(self):
        return self.steps * self.pause

    def run(self, context, *needed):
        log("walkers", os.getpid())
        generator, path = random.Random(self.seed), []
        if context.checkpoint.exists():
            state, path = json.loads(context.checkpoint.read_text())
            generator.setstate((state[0], tuple(state[1]), state[2]))
        while len(path) < self.steps:
            log(f"walk{self.seed}", len(path))
            path.append(generator.gauss(0, 1))
            write_atomically(context.checkpoint, json.dumps([generator.getstate(), path]))
            time.sleep(self.pause)
        return Outcome({"end": sum(path)}, {"path": {"step": list(range(self.steps)), "at": path}})


@dataclass(frozen=True, kw_only=True)
class Sum(Trial):
    """Adds up the squares of the toys it needs."""

    study: ClassVar[str] = "toys"
    kind: ClassVar[str] = "sum"
    values: tuple[int, ...]

    def needs(self):
        return tuple(Toy(value=value) for value in self.values)

    def run(self, context, *needed):
        log("sum", self.values)
        return Outcome({"sum": sum(record.metrics["square"] for record in needed), "first": needed[0].metrics["square"]})


@dataclass(frozen=True, kw_only=True)
class Faulty(Trial):
    """Fails as told: "user" (a ReproError), "bug" (unexpected), "exit", "nothing" (no outcome), "killed" (by the system, at
    every attempt), "killed once"."""

    study: ClassVar[str] = "toys"
    kind: ClassVar[str] = "faulty"
    how: str

    def run(self, context, *needed):
        log("faulty", self.how)
        if self.how == "user":
            raise ReproError("the corpus is missing in /nowhere: run `repro data`")
        if self.how == "bug":
            raise UnpicklableError("weights", "biases")
        if self.how == "exit":
            sys.exit(3)
        if self.how == "nothing":
            return None
        if self.how == "killed" or len(logged(Path(os.environ["TOYS_LOG"]), "faulty")) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return Outcome({"survived": True})


class UnpicklableError(Exception):
    """Cannot be rebuilt from its own arguments, like many libraries' exceptions: pickling it breaks a process pool."""

    def __init__(self, left, right):
        super().__init__(f"{left} do not fit {right}")


@dataclass(frozen=True, kw_only=True)
class AfterFaulty(Trial):
    """Needs a trial that fails."""

    study: ClassVar[str] = "toys"
    kind: ClassVar[str] = "after-faulty"

    def needs(self):
        return (Faulty(how="user"),)

    def run(self, context, *needed):
        raise AssertionError("run, although what it needs has failed")


@dataclass(frozen=True, kw_only=True)
class Clock(Trial):
    """A timing: notes when it was running, so that a test can see that nothing else was."""

    study: ClassVar[str] = "toys"
    kind: ClassVar[str] = "clock"
    timing: ClassVar[bool] = True
    number: int
    after: int | None = None

    def needs(self):
        return () if self.after is None else (Toy(value=self.after),)

    def run(self, context, *needed):
        begin = time.time()
        time.sleep(0.4)
        return Outcome({"begin": begin, "end": time.time(), "threads": context.threads, "pid": os.getpid()})


@dataclass(frozen=True, kw_only=True)
class Pinned(Trial):
    """Tells how many threads the libraries of its process take."""

    study: ClassVar[str] = "toys"
    kind: ClassVar[str] = "pinned"

    def run(self, context, *needed):
        before = "numpy" in sys.modules
        import numpy
        from threadpoolctl import threadpool_info

        numpy.ones((2, 2)) @ numpy.ones((2, 2))
        blas = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
        return Outcome({"early": before, "blas": max(blas), "omp": os.environ["OMP_NUM_THREADS"]})


def coordinate(root: str, what: str) -> None:
    """A coordinator for tests that kill one: `python -c "import toys; toys.coordinate(root, what)"`."""
    trials = {
        "mixed": [*(Toy(value=i, sleep=0.1) for i in range(6)), Walk(steps=25, seed=1)],
        "toys": [Toy(value=i, sleep=0.15) for i in range(8)],
        "clocks": [Clock(number=i) for i in range(4)],
        "endless": [Toy(value=0), Walk(steps=10_000)],
    }[what]
    # A suite started in the background (nohup, some CI) hands down an ignored SIGINT; a coordinator at a terminal has it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run_trials(trials, Store(root), jobs=2, progress=sys.stderr)
    except KeyboardInterrupt as error:
        sys.exit(str(error))
