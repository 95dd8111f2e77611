"""Progress in plain text: one line kept up to date on a terminal, one line per finished trial anywhere else."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from typing import TextIO

WIDTH = 10


def duration(seconds: float) -> str:
    """A length of time as people say it: `8 s`, `3 m 20 s`, `2 h 05 m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} m"


class Progress:
    """How far a run is and how long it still takes.

    `stream`: where to write, None for nowhere; `costs`: estimated seconds per trial key, for all that is to be run;
    `slots`: how many run at once. What is left is the estimate of the unfinished trials, scaled by how the finished
    ones compared with theirs.
    """

    def __init__(self, stream: TextIO | None, costs: Mapping[str, float], slots: int):
        self._stream = stream
        self._live = stream is not None and stream.isatty()
        self._costs = costs
        self._slots = slots
        self._started: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._done: set[str] = set()
        self._label = ""
        self._length = 0

    def start(self, key: str) -> None:
        """A trial has been handed to a worker (again, if its worker died)."""
        self._started[key] = time.monotonic()

    def finish(self, key: str, label: str) -> None:
        """A trial has ended, well or not, or another run has recorded it."""
        if key in self._started:
            self._seconds[key] = time.monotonic() - self._started.pop(key)
        self._done.add(key)
        self._label = label
        self._draw() if self._live else self.say(self.line())

    def tick(self) -> None:
        """Bring a terminal's line up to date."""
        if self._live:
            self._draw()

    def say(self, text: str) -> None:
        """Write a line of its own."""
        if self._stream is not None:
            self._stream.write(f"\r{text.ljust(self._length)}\n" if self._live else f"{text}\n")
            self._stream.flush()
            self._length = 0

    def close(self) -> None:
        """Leave the terminal's line as it is and go to the next."""
        if self._live and self._length:
            self._stream.write("\n")
            self._length = 0

    def seconds_left(self) -> float:
        """Estimated wall time until the last trial ends."""
        expected = sum(self._costs[key] for key in self._seconds)
        pace = sum(self._seconds.values()) / expected if expected > 0 else 1.0
        now = time.monotonic()
        left = [
            max(0.0, cost * pace - (now - self._started.get(key, now)))
            for key, cost in self._costs.items()
            if key not in self._done
        ]
        return max(sum(left) / self._slots, max(left, default=0.0))

    def line(self) -> str:
        """`[#####.....] 12/24  3 m 20 s left  sparse 2560 seed 1`."""
        total, done = len(self._costs), len(self._done)
        filled = WIDTH * done // total if total else WIDTH
        left = f"{duration(self.seconds_left())} left" if done < total else "done"
        return f"[{'#' * filled}{'.' * (WIDTH - filled)}] {done}/{total}  {left}  {self._label}".rstrip()

    def _draw(self) -> None:
        text = self.line()[: shutil.get_terminal_size().columns - 1]
        self._stream.write(f"\r{text.ljust(self._length)}")
        self._stream.flush()
        self._length = len(text)
