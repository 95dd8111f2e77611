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
REGROWTHS = ("update", "listing", "copy")


class GradualPruner:
    """Algorithm 1 of Narang et al. 2017 over any model with `nn.RNN/GRU/LSTM/Linear`, or layers that name their weights alike.

    `schedule`: one schedule, or one per role ("recurrent", "input", "output"); roles left out stay dense. `grouping`: which
    weights share a threshold: "type" (one per role, the paper), "layer" (one per matrix) or "all" (one, hard pruning). `skip`:
    parameters or modules to leave dense.

    `regrowth`: how a pruned weight may return. "update", the prose: the update of one step may lift it from zero to the
    threshold, so magnitudes are taken before masking. "listing": Algorithm 1 masks the stored weight before it recomputes the
    mask, so a zero stays zero. "copy": an unmasked copy goes on collecting the updates and decides (where re-added weights
    start from is not said in the paper; here, from the copy).

    Masks multiply the weights in place: fused recurrent kernels stay in use, gradients stay dense. `state_dict` holds
    iteration, masks and copies; build the pruner after moving the model to its device.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule | dict[str, Schedule],
        *,
        grouping: str = "type",
        skip: tuple[str, ...] = (),
        regrowth: str = "update",
    ):
        one_of("grouping", grouping, GROUPINGS)
        one_of("regrowth", regrowth, REGROWTHS)
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
        self.regrowth = regrowth
        self.weights = {name: parameter for name, (_, parameter) in weights.items()}
        self.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self.weights.items()}
        self._multipliers: dict[str, Tensor] = {}  # masks in the weights' dtype, from the first refresh on
        self._hidden: dict[str, Tensor] = {}  # "copy": what the copy holds where the mask is zero
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
                self._before_refresh(names)
                self._refresh(group, schedule, names)
        self._zero(self._multipliers)
        self.iteration += 1

    def _before_refresh(self, names: list[str]) -> None:
        """Bring the weights into the state whose magnitudes decide."""
        if self.regrowth == "listing":
            self._zero(names)
        for name in names:
            if name in self._hidden:
                self.weights[name].add_(self._hidden.pop(name))

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

    def _zero(self, names) -> None:
        for name in names:
            if (mask := self._multipliers.get(name)) is None:
                continue
            weight = self.weights[name]
            if self.regrowth == "copy":
                lost = weight * (1 - mask)
                self._hidden[name] = lost + self._hidden[name] if name in self._hidden else lost
            weight.mul_(mask)

    def threshold_of(self, name: str) -> float:
        """Epsilon at the last refresh of this matrix; 0 before the first."""
        return self.thresholds[self._group_of[name]]

    def layer_sparsity(self) -> dict[str, float]:
        """Share of masked weights of every pruned matrix."""
        return {name: 1 - mask.count_nonzero().item() / mask.numel() for name, mask in self.masks.items()}

    def state_dict(self) -> dict:
        return {
            "iteration": self.iteration,
            "masks": dict(self.masks),
            "thresholds": dict(self.thresholds),
            "hidden": dict(self._hidden),
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises ReproError when the masks belong to another model."""
        if state["masks"].keys() != self.masks.keys():
            raise ReproError(f"masks are of {', '.join(state['masks'])}, this model prunes {', '.join(self.masks)}")
        for name, mask in state["masks"].items():
            if mask.shape != self.masks[name].shape:
                theirs, ours = tuple(mask.shape), tuple(self.masks[name].shape)
                raise ReproError(f"the mask of {name} has shape {theirs}, this model's has {ours}: it is of another model")
        self.iteration = state["iteration"]
        self.thresholds = dict(state["thresholds"])
        self._multipliers = {}
        for name, mask in state["masks"].items():
            self.masks[name] = mask.to(self.weights[name].device)
            if not mask.all():
                self._set_mask(name, self.masks[name])
        self._hidden = {name: hidden.to(self.weights[name].device) for name, hidden in state["hidden"].items()}
        with torch.no_grad():
            for name, mask in self._multipliers.items():
                self.weights[name].mul_(mask)


class PrintedSignPruner(GradualPruner):
    """Algorithm 1 exactly as printed, `mask = |w| < epsilon`: it keeps the small weights. For the ablation only."""

    def keep(self, magnitudes: Tensor, epsilon: float) -> Tensor:
        return magnitudes < epsilon
