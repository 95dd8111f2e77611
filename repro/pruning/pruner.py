"""`GradualPruner`: three lines in anybody's training loop.

pruner = GradualPruner(model, schedule)
...
optimizer.step()
pruner.step()
"""

import torch
from torch import Tensor, nn

from repro.errors import ReproError, one_of
from repro.pruning.schedules import Schedule
from repro.pruning.weights import prunable_weights

GROUPINGS = ("type", "layer", "all")


class GradualPruner:
    """Algorithm 1 of Narang et al. 2017 over any model with `nn.RNN/GRU/LSTM/Linear` or layers that name their weights alike.

    `schedule`: one schedule, or one per role ("recurrent", "input", "output"); roles left out stay dense. `grouping`: which weights
    share a threshold: "type" (one per role, the paper), "layer" (one per matrix) or "all" (one, hard pruning). `skip`: parameters or
    modules to leave dense. `regrow`: the prose lets a pruned weight return when the update of one step lifts it to the threshold, so
    magnitudes are taken before masking; False follows the listing, which masks first, so that a zero stays zero.

    Masks multiply the weights in place: fused recurrent kernels stay in use, gradients stay dense. `state_dict` holds
    iteration and masks; build the pruner after moving the model to its device.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule | dict[str, Schedule],
        *,
        grouping: str = "type",
        skip: tuple[str, ...] = (),
        regrow: bool = True,
    ):
        one_of("grouping", grouping, GROUPINGS)
        weights = prunable_weights(model, skip)
        if isinstance(schedule, dict):
            if grouping == "all":
                raise ReproError("grouping 'all' takes one schedule for all weights, not one per role")
            for role in schedule:
                one_of("role", role, sorted({role for role, _ in weights.values()}))
            weights = {name: (role, w) for name, (role, w) in weights.items() if role in schedule}
        if not weights:
            raise ReproError("nothing to prune: the model has no nn.RNN/GRU/LSTM/Linear weights left after skip")
        self.iteration = 0
        self.regrow = regrow
        self.weights = {name: parameter for name, (_, parameter) in weights.items()}
        self.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self.weights.items()}
        self._multipliers: dict[
            str, Tensor
        ] = {}  # masks in the weights' dtype, once there is a zero: cheaper than bool
        self._groups: dict[str, tuple[Schedule, list[str]]] = {}
        for name, (role, _) in weights.items():
            group = {"type": role, "layer": name, "all": "all"}[grouping]
            rule = schedule[role] if isinstance(schedule, dict) else schedule
            self._groups.setdefault(group, (rule, []))[1].append(name)
        self._group_of = {name: group for group, (_, names) in self._groups.items() for name in names}
        self.thresholds = {group: 0.0 for group in self._groups}

    @torch.no_grad()
    def step(self) -> None:
        """Call once after each optimizer step: refreshes masks that are due, zeroes the pruned weights."""
        for group, (schedule, names) in self._groups.items():
            if schedule.due(self.iteration):
                if not self.regrow:
                    self._apply(names)
                self._refresh(group, schedule, names)
        self._apply(self._multipliers)
        self.iteration += 1

    def _refresh(self, group: str, schedule: Schedule, names: list[str]) -> None:
        magnitudes = torch.cat([self.weights[name].abs().flatten() for name in names])
        epsilon = self.thresholds[group] = schedule.threshold(self.iteration, magnitudes)
        for name in names:
            self._set_mask(name, self.keep(self.weights[name].abs(), epsilon))

    def keep(self, magnitudes: Tensor, epsilon: float) -> Tensor:
        """Which weights stay: at least epsilon, as the prose has it. A zero never counts as kept."""
        return (magnitudes >= epsilon) & (magnitudes > 0)

    def _set_mask(self, name: str, mask: Tensor) -> None:
        self.masks[name] = mask
        self._multipliers[name] = mask.to(self.weights[name].dtype)

    def _apply(self, names) -> None:
        for name in names:
            if name in self._multipliers:
                self.weights[name].mul_(self._multipliers[name])

    def threshold_of(self, name: str) -> float:
        """Epsilon at the last refresh of this matrix; 0 before the first."""
        return self.thresholds[self._group_of[name]]

    def layer_sparsity(self) -> dict[str, float]:
        """Share of masked weights of every pruned matrix."""
        return {name: 1 - mask.count_nonzero().item() / mask.numel() for name, mask in self.masks.items()}

    def state_dict(self) -> dict:
        return {"iteration": self.iteration, "masks": dict(self.masks), "thresholds": dict(self.thresholds)}

    def load_state_dict(self, state: dict) -> None:
        """Raises ReproError when the masks belong to another model."""
        if state["masks"].keys() != self.masks.keys():
            raise ReproError(f"masks are of {', '.join(state['masks'])}, this model prunes {', '.join(self.masks)}")
        self.iteration = state["iteration"]
        self.thresholds = dict(state["thresholds"])
        for name, mask in state["masks"].items():
            self._set_mask(name, mask.to(self.weights[name].device))
        with torch.no_grad():
            self._apply(self._multipliers)


class PrintedSignPruner(GradualPruner):
    """Algorithm 1 exactly as printed, `mask = |w| < epsilon`: it keeps the small weights. For the ablation only."""

    def keep(self, magnitudes: Tensor, epsilon: float) -> Tensor:
        return magnitudes < epsilon
