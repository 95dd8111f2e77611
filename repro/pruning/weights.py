"""Which weights of a model can be pruned, what they do, and how many of them are zero."""

from dataclasses import dataclass

from torch import Tensor, cat, nn

from repro.errors import ReproError
from repro.pruning.schedules import magnitude_quantile

ROLES = ("recurrent", "input", "output")


def _role(module: nn.Module, name: str) -> str | None:
    if name.startswith(("weight_hh", "weight_hr")):
        return "recurrent"
    if name.startswith("weight_ih"):
        return "input"
    return "output" if isinstance(module, nn.Linear) and name == "weight" else None


def prunable_weights(model: nn.Module, skip: tuple[str, ...] = ()) -> dict[str, tuple[str, nn.Parameter]]:
    """Name -> (role, parameter) of every weight matrix the paper prunes; biases, norms and convolutions are not among them.

    Roles: "recurrent" (`weight_hh*`, and the projection `weight_hr*`), "input" (`weight_ih*`), "output" (`nn.Linear`).
    `skip`: names of parameters or of modules to leave dense. Raises ReproError for a name that matches nothing.
    """
    found: dict[str, tuple[str, nn.Parameter]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            role = _role(module, name.rpartition(".")[2])
            tied = any(parameter is other for _, other in found.values())  # counted and pruned once
            if role is not None and not tied:
                found[name] = (role, parameter)
    for unwanted in skip:
        matching = [name for name in found if name == unwanted or name.startswith(f"{unwanted}.")]
        if not matching:
            raise ReproError(f"nothing to skip under {unwanted!r}: prunable weights are {', '.join(found)}")
        for name in matching:
            del found[name]
    return found


def dense_quantiles(model: nn.Module, percentile: float = 0.9, skip: tuple[str, ...] = ()) -> dict[str, float]:
    """q by role: the `percentile` quantile of the magnitudes in a trained dense model (Narang et al. 2017, section 3).

    All matrices of a role are taken together; the paper does not say how it combines the layers of a type.
    """
    groups: dict[str, list[Tensor]] = {}
    for role, parameter in prunable_weights(model, skip).values():
        groups.setdefault(role, []).append(parameter.detach().abs().flatten())
    return {role: magnitude_quantile(cat(parts), percentile) for role, parts in groups.items()}


@dataclass(frozen=True)
class Sparsity:
    """Exact counts. `roles`: role -> (non-zero, all) of the prunable weights; `total`: the same over *all* parameters."""

    roles: dict[str, tuple[int, int]]
    layers: dict[str, tuple[int, int]]
    total: tuple[int, int]

    def fraction(self, role: str = "total") -> float:
        """Share of zeros of a role, or of all parameters, as the paper's Table 3 counts them ("total")."""
        nonzero, count = self.total if role == "total" else self.roles[role]
        return 1 - nonzero / count

    def by_role(self) -> dict[str, float]:
        """Share of zeros: recurrent, input, output, total."""
        return {role: self.fraction(role) for role in (*self.roles, "total")}


def sparsity(model: nn.Module) -> Sparsity:
    """Counts the zeros of a model by role, by matrix and in total."""
    roles: dict[str, tuple[int, int]] = {}
    layers: dict[str, tuple[int, int]] = {}
    for name, (role, parameter) in prunable_weights(model).items():
        nonzero, count = int(parameter.count_nonzero()), parameter.numel()
        before = roles.get(role, (0, 0))
        roles[role] = (before[0] + nonzero, before[1] + count)
        layers[name] = (nonzero, count)
    everything = sum(p.numel() for p in model.parameters())
    pruned = sum(count - nonzero for nonzero, count in layers.values())
    ordered = {role: roles[role] for role in ROLES if role in roles}
    return Sparsity(ordered, layers, (everything - pruned, everything))
