"""A trial's key names what it computes: the same for equal trials, another for any other, and stable over the years."""

import dataclasses
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.engine import Outcome, Trial, seed_for
from repro.engine import trial as trial_module
from repro.engine.trial import canonical
from repro.errors import ReproError


@dataclass(frozen=True)
class Ramp:
    theta: float = 0.5
    phi: float = 1.5


@dataclass(frozen=True)
class Hard:
    theta: float = 0.5
    phi: float = 1.5


class Planned(Trial):
    """Described here, and never run."""

    def run(self, context, *needed):
        raise AssertionError("run")


@dataclass(frozen=True, kw_only=True)
class Dense(Planned):
    study: ClassVar[str] = "golden"
    kind: ClassVar[str] = "dense"
    width: int
    rate: float = 1e-3
    layers: tuple[int, ...] = (3, 3)
    pruning: Ramp | Hard | None = None
    name: str = "rnn"


@dataclass(frozen=True, kw_only=True)
class Sparse(Planned):
    study: ClassVar[str] = "golden"
    kind: ClassVar[str] = "sparse"
    code_version: ClassVar[int] = 2
    dense: Dense
    seed: int = 0

    def needs(self):
        return (self.dense,)


def test_golden_keys():
    """None of these may change, whatever is done to the code: every record anybody has is found by its key. You keep them by
    adding only fields that have defaults, and by raising `code_version` only when results really change."""
    keys = {
        Dense(width=704): "1b68589cb78a804631a389160ac7d9599a4ddde1f39c0f5a76ce0e4d29773996",
        Dense(
            width=704, rate=1e-4, layers=(1, 2, 3), name="größe"
        ): "774f8eb0b14ebf872d09a3bef1b5810c4dde6d10f9153c7b8139789dcacff6b8",
        Dense(width=704, pruning=Ramp(phi=2.0)): "4f0c92aa98942186a509a6730fa96663509ac66931279e4a6c5cb8e98c9ab1a8",
        Sparse(dense=Dense(width=2560), seed=1): "f5e546ddc51f7763f2457a3a1a365489153aba288356e21ac03b73101957f944",
    }
    assert {trial: trial.key() for trial in keys} == keys


def test_key_is_the_hash_of_the_non_default_fields():
    """The text under the hash, spelled out."""
    trial = Dense(width=704, rate=0.25)
    assert canonical(trial.identity()) == (
        '{"code_version":1,"fields":{"rate":0.25,"width":704},"kind":"dense","study":"golden"}'
    )
    assert trial.describe() == {"width": 704, "rate": 0.25, "layers": [3, 3], "pruning": None, "name": "rnn"}


def test_a_new_field_with_a_default_changes_no_key():
    """Neither in the trial itself nor in one that is nested in it; another value of the new field does."""

    @dataclass(frozen=True)
    class LongerRamp(Ramp):
        regrow: bool = True

    LongerRamp.__name__ = "Ramp"

    @dataclass(frozen=True, kw_only=True)
    class Longer(Dense):
        dropout: float = 0.0

    old, new = Dense(width=8, pruning=Ramp(phi=2.0)), Longer(width=8, pruning=LongerRamp(phi=2.0))
    assert new.key() == old.key()
    assert Sparse(dense=new).key() == Sparse(dense=old).key()
    assert Longer(width=8, dropout=0.1).key() != Dense(width=8).key()
    assert Longer(width=8, pruning=LongerRamp(regrow=False)).key() != Dense(width=8, pruning=Ramp()).key()


def test_what_a_result_depends_on_is_in_the_key():
    """Class of a nested choice, study, kind, code version, and the code version of the trials it is built on."""
    trial = Dense(width=8)
    assert dataclasses.replace(trial, pruning=Ramp()).key() != dataclasses.replace(trial, pruning=Hard()).key()
    assert dataclasses.replace(trial, pruning=Ramp()).key() != trial.key()
    for name, value in {"study": "other", "kind": "other", "code_version": 2}.items():
        changed = type("Dense", (Dense,), {name: value})
        assert changed(width=8).key() != trial.key()
        assert Sparse(dense=changed(width=8)).key() != Sparse(dense=trial).key()


def test_only_timing_trials_hash_the_machine(monkeypatch):
    """A duration measured elsewhere is another result; a training run elsewhere is the same one."""
    timing = type("Timed", (Dense,), {"timing": True})
    here = timing(width=8).key(), Dense(width=8).key()
    monkeypatch.setattr(trial_module, "machine_fingerprint", lambda: {"cpu": "abacus", "cores": 10})
    assert timing(width=8).key() != here[0]
    assert Dense(width=8).key() == here[1]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (math.nan, "Dense.rate is nan"),
        (math.inf, "Dense.rate is inf"),
        ([1, 2], "Dense.rate is a list"),
        ({"a": 1}, "Dense.rate is a dict"),
        (numpy.float32(1), "Dense.rate is a float32"),
        ((1, (2, {3})), r"Dense.rate\[1\]\[1\] is a set"),
        (Ramp, "Dense.rate is a type"),
    ],
)
def test_a_value_that_is_not_json_is_refused_when_the_trial_is_built(value, found):
    with pytest.raises(ReproError, match=found):
        Dense(width=1, rate=value)


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3).map(tuple) | st.builds(Ramp, inner, inner), max_leaves=6)


def _with_types(value):
    """Two values are the same specification when they are equal, and True is not 1."""
    if isinstance(value, tuple):
        return tuple(map(_with_types, value))
    if isinstance(value, Ramp):
        return Ramp, _with_types(value.theta), _with_types(value.phi)
    return (isinstance(value, bool), value)


@settings(deadline=None)
@given(values, values)
def test_keys_are_equal_exactly_when_trials_are(left, right):
    """No collision between values of different shape, no two keys for one value (0, 0.0 and -0.0 are one)."""
    same = Dense(width=0, rate=left).key() == Dense(width=0, rate=right).key()
    assert same == (_with_types(left) == _with_types(right))


@given(values)
def test_descriptions_survive_json(value):
    """What is written into a record is read back as it was."""
    described = Dense(width=0, rate=value).describe()
    assert json.loads(canonical(described)) == described


@given(st.text(), st.integers(0, 10**6), st.text())
def test_seeds_are_63_bits_and_repeatable(study, replicate, purpose):
    seed = seed_for(study, replicate, purpose)
    assert 0 <= seed < 2**63
    assert seed == seed_for(study, replicate, purpose)
    assert seed != seed_for(study, replicate + 1, purpose)
    assert seed != seed_for(study, replicate, purpose + "!")


def test_golden_seed():
    """Seeds are part of every result: they may not change either."""
    assert seed_for("narang2017", 0, "weights") == 4886916096107219904


def test_outcomes_hold_plain_values():
    """NumPy values become Python's; what JSON cannot hold, or columns of unequal length, are refused by name."""
    outcome = Outcome(
        {"loss": numpy.float32(0.5), "n": numpy.int64(3)}, {"loss": {"step": numpy.arange(2), "value": [1.0, 2.0]}}
    )
    assert outcome.metrics == {"loss": 0.5, "n": 3} and type(outcome.metrics["n"]) is int
    assert outcome.curves["loss"]["step"] == [0, 1]
    with pytest.raises(ReproError, match="metric 'model' is a object"):
        Outcome({"model": object()})
    with pytest.raises(ReproError, match="curve 'loss' must be equally long"):
        Outcome({}, {"loss": {"step": [1, 2], "value": [0.0]}})
    with pytest.raises(ReproError, match="curve 'loss', column 'value' is a list"):
        Outcome({}, {"loss": {"value": [[1]]}})


def test_the_engine_imports_without_torch():
    """Planning, listing and redrawing must not pay for torch, pandas or a cluster."""
    code = "import sys, repro.engine; print([m for m in ('torch', 'numpy', 'pandas', 'distributed') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
