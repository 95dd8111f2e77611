"""A rule that counts what another one leaves, for layers of any kind."""

from torch import Tensor

from repro.gradients.thresholds import Rule


class Counted(Rule):
    """Another rule; while `counting`, the entries of dnet it was given and those that are not zero after it are added up."""

    def __init__(self, rule: Rule, counting: bool = True):
        self.rule, self.counting = rule, counting
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

    def observe(self, site: int, kept: int, alive: int, total: int) -> None:
        self.rule.observe(site, kept, alive, total)
        self._count(kept, total)

    def __call__(self, dnet: Tensor, site: int = 0) -> Tensor:
        self.rule(dnet, site)
        if self.counting:
            self._count(int(dnet.count_nonzero()), dnet.numel())
        return dnet

    def _count(self, kept: int, total: int) -> None:
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
