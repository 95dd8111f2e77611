"""A rule that counts what it leaves, for layers of any kind."""

from __future__ import annotations

from torch import Tensor

from repro.gradients import Rule


class Counted(Rule):
    """Another rule; while `counting`, entries that it was given and entries that are not zero after it are added up."""

    def __init__(self, rule: Rule):
        self.rule = rule
        self.counting = False
        self.entries = self.kept = 0

    @property
    def feedback(self) -> bool:
        return self.counting or self.rule.feedback

    @property
    def signed(self) -> bool:
        return self.rule.signed

    def new_site(self) -> int:
        return self.rule.new_site()

    def known(self, site: int = 0) -> float | None:
        return self.rule.known(site)

    def threshold(self, dnet: Tensor, site: int = 0) -> float | Tensor:
        return self.rule.threshold(dnet, site)

    def observe(self, site: int, kept: int, alive: int, total: int) -> None:
        self.rule.observe(site, kept, alive, total)
        if self.counting:
            self.entries += total
            self.kept += kept

    def take(self) -> tuple[int, int]:
        """(entries, zeros among them) since the last time."""
        found = self.entries, self.entries - self.kept
        self.entries = self.kept = 0
        return found

    def state_dict(self) -> dict:
        return self.rule.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.rule.load_state_dict(state)
