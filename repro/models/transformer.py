"""A small causal Transformer over symbols (Vaswani et al. 2017, arXiv 1706.03762), as in GPT-2: pre-norm, learned positions."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from repro.errors import ReproError


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), four times as wide within; (B, T, width) -> (B, T, width).

    A position attends to itself and those before it. All products of weights are four `nn.Linear`: queries, keys and values
    together, the heads' output, and the two of the feed-forward network. Outputs of the `INNER` ones stay within the block,
    those of the others are added to x.
    """

    INNER = ("queries_keys_values", "widen")

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.gather = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.queries_keys_values(self.before_attention(x))
        parts = projected.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, T, width of a head)
        attended = scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.gather(attended.transpose(1, 2).flatten(2))
        return x + self.narrow(gelu(self.widen(self.before_feed(x))))


class Transformer(nn.Module):
    """`forward(tokens (T, B)) -> logits (T, B, symbols)` for the symbol after each; T at most `longest`.

    `symbols`: size of the vocabulary; `width`: of embedding and blocks; `layers`: blocks. No dropout; the decoder has its own
    weights. Embedding and positions start from N(0, 0.02), as in GPT-2.

    Raises ReproError for a size below 1, a width that the heads do not divide, and a longer sequence.
    """

    def __init__(self, symbols: int, width: int, layers: int, heads: int, longest: int):
        super().__init__()
        sizes = {"symbols": symbols, "width": width, "layers": layers, "heads": heads, "longest": longest}
        for name, size in sizes.items():
            if size < 1:
                raise ReproError(f"{name} of the Transformer is {size}: it must be at least 1")
        if width % heads:
            raise ReproError(f"a Transformer of width {width} has {heads} heads: their number must divide the width")
        self.embedding, self.positions = nn.Embedding(symbols, width), nn.Embedding(longest, width)
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.decoder = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.norm(self.stream(tokens))).transpose(0, 1)

    def stream(self, tokens: Tensor) -> Tensor:
        """What embedding and blocks have added up, (B, T, width): the last norm and the decoder read it."""
        steps, longest = len(tokens), self.positions.num_embeddings
        if steps > longest:
            raise ReproError(f"a sequence of {steps} symbols: this Transformer has positions for {longest}")
        x = self.embedding(tokens.t()) + self.positions(torch.arange(steps, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return x
