"""Trials, their records, and how what is missing gets run. Knows nothing of papers, and imports without torch."""

from repro.engine.executors import dask_executor, local_executor
from repro.engine.frames import curves, frame
from repro.engine.plan import Plan, plan
from repro.engine.progress import duration
from repro.engine.runner import run_trials
from repro.engine.store import Record, Store
from repro.engine.trial import Context, Outcome, Trial, seed_for

__all__ = [
    "Context",
    "Outcome",
    "Plan",
    "Record",
    "Store",
    "Trial",
    "curves",
    "dask_executor",
    "duration",
    "frame",
    "local_executor",
    "plan",
    "run_trials",
    "seed_for",
]
