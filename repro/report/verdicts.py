"""Claims, the rules that decide them, and their verdicts.

The rules stand in `data/papers/<study>.toml`, written before any run where they do not say otherwise.
"""

import math
import tomllib
from dataclasses import dataclass

import numpy as np

from repro.errors import ReproError
from repro.report.published import papers_file
from repro.report.statistics import bootstrap_interval

HOLDS = "holds"
TREND = "holds as a trend"
FAILS = "fails"
UNDECIDED = "undecided"
NOT_TESTABLE = "not testable here"
VERDICTS = (HOLDS, TREND, FAILS, UNDECIDED, NOT_TESTABLE)

# exact: arithmetic or a closed form, one number; substituted: measured on other data than the paper's; machine: a time or
# rate of another machine; untestable: says why, and what is shown instead.
KINDS = ("exact", "substituted", "machine", "untestable")

# Fewer seeds than this decide nothing: two values give an interval that is only their distance.
MINIMUM_SEEDS = 3

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One checkable statement of a paper and the ranges that decide it.

    `quantity` names the function the study supplies, `definition` says what it returns, in `unit`. `holds` is the paper's
    statement with its number, `trend` the direction alone. An untestable claim has `reason` and `instead` in their place.
    A `headline` claim stands on the README.
    """

    study: str
    id: str
    topic: str
    text: str
    where: str
    exhibit: str
    paper: str
    kind: str
    quantity: str = ""
    definition: str = ""
    unit: str = ""
    holds: Range | None = None
    trend: Range | None = None
    reason: str = ""
    instead: str = ""
    headline: bool = False


@dataclass(frozen=True)
class Verdict:
    """The decision on one claim: our mean and interval (NaN where there is none), the seeds used, why, and `source`, what it
    was measured on."""

    claim: Claim
    verdict: str
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    reason: str = ""
    source: str = ""


_COMMON = {"id", "topic", "text", "where", "exhibit", "paper", "kind"}
_FIELDS = {
    "exact": _COMMON | {"quantity", "definition", "unit", "holds"},
    "substituted": _COMMON | {"quantity", "definition", "unit", "holds", "trend"},
    "machine": _COMMON | {"quantity", "definition", "unit", "holds", "trend"},
    "untestable": _COMMON | {"reason", "instead"},
}


def load_claims(study: str) -> list[Claim]:
    """The claims of `study` in the order of its file.

    Raises ReproError, naming the file and the claim, for unknown, missing or empty keys, an unknown kind, an id or quantity
    used twice, ranges that are not `[low, high]` numbers, or a `holds` range that reaches outside `trend`.
    """
    path = papers_file(study, "toml")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ReproError(f"{path} is not valid TOML: {error}") from error
    if set(content) != {"claim"}:
        raise ReproError(f"{path} holds {', '.join(sorted(content)) or 'nothing'}: it should hold [[claim]] tables only")
    claims, seen = [], set()
    for number, table in enumerate(content["claim"], start=1):
        claim = _claim(study, table, f"{path}, claim {table.get('id', f'number {number}')}")
        for name in (claim.id, claim.quantity):
            if name in seen:
                raise ReproError(f"{path}, claim {claim.id}: {name!r} is used by an earlier claim")
            seen.update({name} - {""})
        claims.append(claim)
    return claims


def _claim(study: str, table: dict, where: str) -> Claim:
    if table.get("kind") not in KINDS:
        raise ReproError(f"{where}: kind is {table.get('kind')!r}, it should be one of {', '.join(KINDS)}")
    wanted = _FIELDS[table["kind"]]
    if unknown := sorted(set(table) - wanted - {"headline"}):
        raise ReproError(f"{where}: unknown key {', '.join(unknown)}; a {table['kind']} claim has {_listed(wanted)}")
    if missing := sorted(wanted - set(table)):
        raise ReproError(f"{where}: {', '.join(missing)} is missing; a {table['kind']} claim has {_listed(wanted)}")
    values = {key: _range(value, f"{where}: {key}") if key in ("holds", "trend") else value for key, value in table.items()}
    if not isinstance(values.get("headline", False), bool):
        raise ReproError(f"{where}: headline is {values['headline']!r}, it should be true or false")
    for key, value in values.items():
        if key != "headline" and not isinstance(value, tuple) and not (isinstance(value, str) and value.strip()):
            raise ReproError(f"{where}: {key} is {value!r}, it should be a text that is not empty")
    claim = Claim(study=study, **values)
    if claim.trend and not (claim.trend[0] <= claim.holds[0] and claim.holds[1] <= claim.trend[1]):
        raise ReproError(f"{where}: holds {span(claim.holds)} reaches outside trend {span(claim.trend)}")
    return claim


def _range(value, where: str) -> Range:
    numbers = isinstance(value, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    if not numbers or len(value) != 2 or not value[0] <= value[1] or all(map(math.isinf, value)):
        raise ReproError(f"{where} is {value!r}, it should be [low, high] with low <= high, at most one of them infinite")
    return float(value[0]), float(value[1])


def _listed(names) -> str:
    return ", ".join(sorted(names))


def decide(claim: Claim, values=None, source: str = "", papers_own_data: bool = False) -> Verdict:
    """Decide `claim` from `values`: one number for an exact claim, else one value per (paired) seed.

    source: what the values were measured on ("made speech corpus, laptop profile"), told in the reason. papers_own_data: the
    run used the paper's own corpus, so a substituted claim may hold outright. `values` None or empty: nothing was run yet.

    An exact claim holds when its number lies inside `holds`, bounds included. Otherwise the 95 % bootstrap interval of
    the mean decides, and never more kindly than it allows: strictly inside `trend` holds as a trend, strictly outside
    fails, anything else (an interval that touches a bound, fewer than `MINIMUM_SEEDS` seeds, a seed that diverged) is
    undecided.
    """
    if claim.kind == "untestable":
        return Verdict(claim, NOT_TESTABLE, reason=f"{claim.reason} Instead: {claim.instead}")
    values = np.atleast_1d(np.asarray([] if values is None else values, dtype=float))
    if values.size == 0:
        return Verdict(claim, UNDECIDED, reason="No records yet.")
    if claim.kind == "exact":
        return _decide_exact(claim, values)
    return _decide_measured(claim, values, source, papers_own_data)


def prefer(larger: Verdict, smaller: Verdict) -> Verdict:
    """Of one claim in two profiles: the larger one's, unless seeds are lacking there that the smaller one has."""
    return larger if larger.n >= min(MINIMUM_SEEDS, smaller.n) else smaller


def _decide_exact(claim: Claim, values: np.ndarray) -> Verdict:
    if values.size != 1 or not np.isfinite(values[0]):
        raise ReproError(f"claim {claim.id} is exact: {claim.quantity} should be one finite number, not {values.tolist()}")
    value = float(values[0])
    inside = claim.holds[0] <= value <= claim.holds[1]
    reason = f"Recomputed exactly; the claim needs a value {span(claim.holds)}."
    return Verdict(claim, HOLDS if inside else FAILS, value, n=1, reason=reason)


def _decide_measured(claim: Claim, values: np.ndarray, source: str, papers_own_data: bool) -> Verdict:
    finite = values[np.isfinite(values)]
    diverged, n = values.size - finite.size, finite.size
    if n == 0:
        return Verdict(claim, UNDECIDED, reason=f"All {diverged} seeds diverged: there is no value to compare.")
    mean, low, high = bootstrap_interval(finite)
    caveats = [f"{diverged} of {values.size} seeds diverged and are not in the interval"] if diverged else []
    on = f" ({source})" if source else ""

    def verdict(word: str, reason: str) -> Verdict:
        return Verdict(claim, word, mean, low, high, n, ". ".join([reason + on, *caveats]) + ".", source)

    if n < MINIMUM_SEEDS:
        return verdict(UNDECIDED, f"{n} of at least {MINIMUM_SEEDS} seeds")
    if high < claim.trend[0] or low > claim.trend[1]:
        return verdict(FAILS, f"No part of the interval lies {span(claim.trend)}")
    if crossed := [bound for bound in claim.trend if low <= bound <= high]:
        bounds = " and ".join(map(_number, crossed))
        return verdict(UNDECIDED, f"The interval of {n} seeds reaches the bound {bounds}")
    if diverged:
        return verdict(UNDECIDED, f"The interval of the other seeds lies {span(claim.trend)}")
    in_paper = claim.holds[0] < low and high < claim.holds[1]
    if in_paper and papers_own_data and claim.kind == "substituted":
        return verdict(HOLDS, f"The interval lies {span(claim.holds)}, on the paper's own data")
    if claim.holds == claim.trend:
        narrower = ""
    elif in_paper:
        narrower = f"; also {span(claim.holds)}, which holding takes"
    else:
        missed = high < claim.holds[0] or low > claim.holds[1]
        narrower = f"; {'none' if missed else 'not all'} of it {span(claim.holds)}, which holding takes"
    other = "the paper's own data" if papers_own_data else "data other than the paper's"
    other = "another machine" if claim.kind == "machine" else other
    return verdict(TREND, f"The interval lies {span(claim.trend)}{narrower}; {other}")


def span(bounds: Range) -> str:
    """A range in words: above 0, below 7.2, between 5 and 15, of exactly 0."""
    low, high = bounds
    if low == high:
        return f"of exactly {_number(low)}"
    if math.isinf(low):
        return f"below {_number(high)}"
    if math.isinf(high):
        return f"above {_number(low)}"
    return f"between {_number(low)} and {_number(high)}"


def _number(value: float) -> str:
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")
