"""A recurrent model of several tasks: shared layers, a linear head for each task (Caruana 1997, "Multitask Learning")."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from repro.errors import ReproError
from repro.models.language import State


class MultitaskModel(nn.Module):
    """`forward(tokens (T, B), state) -> {task: logits (T, B, classes)}, state`; without a state the layers start from zeros.

    `tasks`: number of classes of each task, by name. `symbols`, `hidden`, `layers` and `recurrent` as of
    `repro.models.language.LanguageModel`; the embedding is as wide as the layers. Raises ReproError if there is no task and for
    a size below 1.
    """

    def __init__(
        self, symbols: int, hidden: int, layers: int, tasks: Mapping[str, int], recurrent: Callable[[int, int], nn.Module]
    ):
        super().__init__()
        if not tasks:
            raise ReproError("a model of several tasks has none: at least one is needed")
        classes = {f"classes of {task}": count for task, count in tasks.items()}
        for name, size in ({"symbols": symbols, "hidden": hidden, "layers": layers} | classes).items():
            if size < 1:
                raise ReproError(f"{name} of the model of several tasks is {size}: it must be at least 1")
        self.embedding = nn.Embedding(symbols, hidden)
        self.layers = nn.ModuleList(recurrent(hidden, hidden) for _ in range(layers))
        self.heads = nn.ModuleDict({task: nn.Linear(hidden, count) for task, count in tasks.items()})

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[dict[str, Tensor], State]:
        x = self.embedding(tokens)
        carried = []
        for layer, before in zip(self.layers, state or [None] * len(self.layers), strict=True):
            x, after = layer(x, before)
            carried.append(after)
        return {task: head(x) for task, head in self.heads.items()}, carried
