"""The trial behind exhibit `places`: where in dnet the zeros of one step are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from repro.engine import Context, Outcome
from repro.studies.gates import FollowedTrial

PLACES = 10  # parts into which a sequence is divided
NO_RULE, STATIC, SHARE = "no rule", "static", "share"


@dataclass(frozen=True, kw_only=True)
class PlacesTrial(FollowedTrial):
    """One step within a dense character training: its zeros of dnet by layer, gate and place in the sequence.

    The `training` is followed for a share `after` of its updates. The gradient of the batch that comes next is then taken with
    "no rule", under the "static" threshold t of `t`, and under the static t up to which a `share` of the entries of the dense
    dnet lie, all layers together ("share").

    Curve `places`, a row for each `rule`, `layer` (0: next to the input), `gate` and `place` (tenth of the sequence, 0 to 9):
    how many `entries` dnet has there, and how many of them are `zeros`. Metric `t_of_share`.
    """

    kind: ClassVar[str] = "places"

    t: float
    share: float

    def seconds(self) -> float:
        return 1 + (self.after + 20 / self.training.steps) * self.training.seconds()

    def label(self) -> str:
        return f"places of zeros within {self.training.label()}"

    def run(self, context: Context) -> Outcome:
        from repro.gradients import Static
        from repro.studies.probing import probe, recorded

        course, step = self.followed()

        def loss():
            return course.mean_loss(step)

        of_share = probe(course.model, loss).quantile(self.share)
        rows = [
            {"rule": rule, "layer": layer} | row
            for rule, t in ((NO_RULE, 0.0), (STATIC, self.t), (SHARE, of_share))
            for layer, record in enumerate(recorded(course.model, loss, Static(t)))
            for row in _by_place(record)
        ]
        return Outcome({"t_of_share": of_share}, {"places": {name: [row[name] for row in rows] for name in rows[0]}})


def _by_place(record) -> list[dict]:
    """Zeros and entries of each gate in each part of the sequence."""
    zeros, entries = [by_cause.sum(1) for by_cause in record.zeros], record.totals
    rows = []
    for place in range(PLACES):
        steps = [step for step in range(len(entries)) if step * PLACES // len(entries) == place]
        if not steps:
            continue  # of a sequence with fewer steps
        for i, gate in enumerate(record.gates):
            counts = {"zeros": sum(int(zeros[step][i]) for step in steps), "entries": sum(entries[step] for step in steps)}
            rows.append({"gate": gate, "place": place} | counts)
    return rows
