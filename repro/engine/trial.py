"""What a trial is: one training run, timing or simulation, fully described by a frozen dataclass and named by its key.

The key is the SHA-256 of the canonical JSON of what makes the trial different from its defaults, so adding a field with
a default changes no key and no record is lost. What may change the low-order bits only (versions, threads, commit) is
recorded, not hashed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from repro.engine.provenance import machine_fingerprint
from repro.errors import ReproError

if TYPE_CHECKING:
    from repro.engine.store import Record


@dataclass(frozen=True)
class Context:
    """What the engine lends to a running trial.

    `checkpoint`: a path the trial may write (atomically) and read back, so that a killed run goes on from it; the
    engine deletes it once the record is stored. `threads`: how many threads the trial's process has been given.
    """

    checkpoint: Path
    threads: int


@dataclass(frozen=True)
class Outcome:
    """What a trial found out.

    `metrics`: one plain value per name (NumPy and torch scalars are turned into Python's). `curves`: per name a mapping
    of equally long columns, `{"loss": {"step": [...], "value": [...]}}`. `diverged`: the run ended in NaN or infinity;
    a result, not an error. Raises ReproError when a metric is not a number, string, bool or None, or when a curve's
    columns differ in length.
    """

    metrics: dict[str, float | int | str | None]
    curves: dict[str, dict[str, list]] = field(default_factory=dict)
    diverged: bool = False

    def __post_init__(self):
        metrics = {name: _plain(value) for name, value in self.metrics.items()}
        curves = {
            name: {column: [_plain(value) for value in _plain(values)] for column, values in columns.items()}
            for name, columns in self.curves.items()
        }
        for name, value in metrics.items():
            _require_scalar(value, f"metric {name!r}")
        for name, columns in curves.items():
            lengths = {column: len(values) for column, values in columns.items()}
            if len(set(lengths.values())) > 1:
                raise ReproError(f"the columns of curve {name!r} must be equally long, but they have {lengths}")
            for column, values in columns.items():
                for value in values:
                    _require_scalar(value, f"curve {name!r}, column {column!r}")
        object.__setattr__(self, "metrics", metrics)
        object.__setattr__(self, "curves", curves)


@dataclass(frozen=True, kw_only=True)
class Trial(ABC):
    """One trial; a study subclasses it as a frozen, keyword-only dataclass.

    Fields may be str, int, float, bool, None, tuples of those, and nested frozen dataclasses (other trials too);
    anything else is refused when the trial is built. `code_version` is raised when the code comes to mean something
    else, `timing` marks trials whose result is a duration: they run alone, with all threads, after all others, and
    their key also hashes the machine.
    """

    study: ClassVar[str]
    kind: ClassVar[str]
    code_version: ClassVar[int] = 1
    timing: ClassVar[bool] = False

    def __post_init__(self):
        _fields(self)

    def identity(self) -> dict[str, Any]:
        """What is hashed: study, kind, code version, the fields that differ from their defaults, the keys of the trials
        this one needs (a result built on another one's record is another result when that one changes), and the machine
        if `timing`.
        """
        identity = {"study": self.study, "kind": self.kind, "code_version": self.code_version, "fields": _changed(self)}
        if needs := self.needs():
            identity["needs"] = [trial.key() for trial in needs]
        if self.timing:
            identity["machine"] = machine_fingerprint()
        return identity

    def key(self) -> str:
        """The trial's name in the store: 64 hexadecimal digits."""
        return digest(self.identity())

    def describe(self) -> dict[str, Any]:
        """Every field, defaults included, as plain JSON values; a nested dataclass becomes a mapping that names its
        class.
        """
        return _fields(self)

    def needs(self) -> tuple[Trial, ...]:
        """Trials whose records must exist before this one starts; they are handed to `run` in this order."""
        return ()

    def seconds(self) -> float:
        """A rough estimate of the run time on one core, for plans, progress and the order of work."""
        return 1.0

    def label(self) -> str:
        """A short human name for progress lines."""
        return " ".join([self.kind, *(f"{name}={_short(value)}" for name, value in _changed(self).items())])

    @abstractmethod
    def run(self, context: Context, *needed: Record) -> Outcome:
        """Do the work. Heavy imports (torch) belong inside, so that planning stays quick; raise ReproError for a user's
        mistake.
        """


def seed_for(study: str, replicate: int, purpose: str) -> int:
    """A stable 63-bit seed for one purpose ("weights", "batches", ...) of one replicate.

    It never depends on the method under test, so the arms of a comparison are paired.
    """
    return int.from_bytes(hashlib.sha256(canonical([study, replicate, purpose]).encode()).digest()[:8]) >> 1


def canonical(value: Any) -> str:
    """The one JSON text of a JSON value: keys sorted, no white space, ASCII only, floats as `repr`; NaN and infinity
    are refused.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of `canonical(value)`, hexadecimal."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def _fields(instance: Any) -> dict[str, Any]:
    """All fields of a dataclass as JSON values."""
    owner = type(instance).__name__
    return {f.name: _jsonable(getattr(instance, f.name), f"{owner}.{f.name}", _fields) for f in dataclasses.fields(instance)}


def _changed(instance: Any) -> dict[str, Any]:
    """The fields that differ from their defaults (those without a default always), as JSON values."""
    changed = {}
    for f in dataclasses.fields(instance):
        name = f"{type(instance).__name__}.{f.name}"
        value = _jsonable(getattr(instance, f.name), name, _changed)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if default is dataclasses.MISSING or value != _jsonable(default, name, _changed):
            changed[f.name] = value
    return changed


def _jsonable(value: Any, name: str, fields_of) -> Any:
    """`value` as JSON; nested dataclasses through `fields_of`. Raises ReproError naming the field when it cannot be
    JSON.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ReproError(f"{name} is {value}: a trial is described by finite numbers only")
        # 0 and 0.0 are equal, so two equal trials would have two keys if the hashed text kept the difference.
        return int(value) if fields_of is _changed and value.is_integer() else float(value)
    if isinstance(value, tuple):
        return [_jsonable(item, f"{name}[{i}]", fields_of) for i, item in enumerate(value)]
    if isinstance(value, Trial):
        version = {"code_version": value.code_version} if fields_of is _changed else {}
        return {"study": value.study, "kind": value.kind, **version, **fields_of(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and value.__dataclass_params__.frozen:
        return {"class": type(value).__name__, **fields_of(value)}
    raise ReproError(
        f"{name} is a {type(value).__name__} ({value!r:.60}): a trial holds str, int, float, bool, None, "
        "tuples of those and nested frozen dataclasses"
    )


def _plain(value: Any) -> Any:
    """Python values for NumPy and torch scalars and arrays; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _require_scalar(value: Any, name: str) -> None:
    if not (value is None or isinstance(value, str | bool | int | float)):
        raise ReproError(f"{name} is a {type(value).__name__}: an outcome holds numbers, strings, bools and None")


def _short(value: Any) -> str:
    """A field's value in a label: a nested dataclass as its own changed fields."""
    if isinstance(value, Mapping):
        named = ("class", "study", "kind", "code_version")
        return "(" + " ".join(f"{name}={_short(item)}" for name, item in value.items() if name not in named) + ")"
    if isinstance(value, list):
        return "x".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
