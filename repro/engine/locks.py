"""Who is working on what, so that two runs on one store never do the same trial: advisory locks that die with their
process.
"""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from repro.engine.store import Store
from repro.engine.trial import Trial
from repro.errors import ReproError


def take(store: Store, trial: Trial) -> FileLock | None:
    """The trial's lock, taken without waiting, or None when another run holds it.

    All timing trials of a store share one lock: two of them at once would disturb each other. The system releases the
    lock when its process ends, however it ends. Raises ReproError when the store's folder cannot be written.
    """
    path = store.root / "timing.lock" if trial.timing else store.root / trial.study / "locks" / f"{trial.key()}.lock"
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        return None
    except OSError as error:
        raise ReproError(f"cannot write {path}: {error.strerror}; free space or choose another folder") from error
    return lock


def give_back(lock: FileLock, *, finished: bool) -> None:
    """Release a lock; once its trial is `finished` its file goes too.

    Removing it before the release is safe because whoever takes a lock looks for the record again, and there is one by
    then.
    """
    path = Path(lock.lock_file)
    if finished and path.name != "timing.lock":
        path.unlink(missing_ok=True)
    lock.release()
