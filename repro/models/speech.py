"""Deep Speech 2 at any width: two convolutions, recurrent layers, fully connected, CTC (Narang et al. 2017, Tables 2 and 5)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from repro.errors import ReproError, one_of
from repro.models.recurrent import CLIP, BidirectionalClippedRNN, RowConvolution

CONV_KERNELS = ((41, 11), (21, 11))  # (frequency, time); frequency stride 2 in both: 161 -> 81 -> 41 bins
ROW_CONTEXT = 40  # with its batch norm 42h parameters, the number the paper's Table 5 gives for the row convolution


@dataclass(frozen=True)
class SpeechConfig:
    """Shape of a model.

    `cell`: "rnn" (bidirectional, clipped ReLU) or "gru" (forward only, row convolution); `hidden`: units a layer; `layers`:
    recurrent layers; `channels`: of both convolutions; `bins`: spectrogram bins; `time_strides`: of the two convolutions;
    `outputs`: CTC symbols with the blank; `dropout`: between layers, training only (the paper mentions none).
    """

    cell: str = "rnn"
    hidden: int = 1760
    layers: int = 7
    channels: int = 32
    bins: int = 161
    time_strides: tuple[int, int] = (2, 1)
    outputs: int = 29
    dropout: float = 0.0

    def __post_init__(self):
        one_of("cell", self.cell, ("rnn", "gru"))
        # The first kernel spans 41 bins; far below, torch 2.13's CPU convolution (oneDNN) crashes in its weight gradient.
        for name, least in (("hidden", 1), ("layers", 1), ("channels", 1), ("bins", 41), ("outputs", 1)):
            if getattr(self, name) < least:
                raise ReproError(f"SpeechConfig.{name} is {getattr(self, name)}: it must be at least {least}")

    def scaled(self, hidden: int) -> "SpeechConfig":
        """The same model at another width."""
        return replace(self, hidden=hidden)


# The paper prints 95,054 parameters for the RNN model's output layer; no alphabet gives it, 54 symbols give 95,094.
PAPER = {
    **{f"rnn{h}": SpeechConfig("rnn", h, layers=7, outputs=54) for h in (704, 1760, 2560, 3072)},
    **{f"gru{h}": SpeechConfig("gru", h, layers=3, outputs=29) for h in (2560, 3568)},
}


class Convolution(nn.Module):
    """Strided convolution over (frequency, time), batch norm of every (channel, bin) over real frames only, clipped ReLU.

    Input (B, C, F, T) with frames past `lengths` zero; output likewise, with the shortened lengths.
    """

    def __init__(self, channels_in: int, channels: int, kernel: tuple[int, int], time_stride: int, bins_in: int):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(channels_in, channels, kernel, (2, time_stride), padding, bias=False)
        self.bins = (bins_in - 1) // 2 + 1
        self.norm = nn.BatchNorm1d(channels * self.bins)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        lengths = (lengths - 1).div(self.conv.stride[1], rounding_mode="floor") + 1
        batch, channels, bins, frames = y.shape
        packed = pack_padded_sequence(y.permute(3, 0, 1, 2).reshape(frames, batch, -1), lengths)
        packed = packed._replace(data=self.norm(packed.data).clamp(0.0, CLIP))
        padded, _ = pad_packed_sequence(packed, total_length=frames)
        return padded.reshape(frames, batch, channels, bins).permute(1, 2, 3, 0), lengths


class FullyConnected(nn.Module):
    """Linear without bias, batch norm, clipped ReLU, on packed frames: h^2 + 2h parameters."""

    def __init__(self, size: int):
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)
        self.norm = nn.BatchNorm1d(size)

    def forward(self, packed: PackedSequence) -> PackedSequence:
        return packed._replace(data=self.norm(self.linear(packed.data)).clamp(0.0, CLIP))


class SpeechModel(nn.Module):
    """`forward(features (B, T, bins), lengths (B,)) -> log-probabilities (T', B, outputs), lengths (B,)`.

    Utterances must come longest first (`repro.datasets` batches them so). `layers` lists (name, module) in the order of the
    paper's tables.
    """

    def __init__(self, config: SpeechConfig):
        super().__init__()
        self.config = config
        bins, channels, h = config.bins, config.channels, config.hidden
        self.conv0 = Convolution(1, channels, CONV_KERNELS[0], config.time_strides[0], bins)
        self.conv1 = Convolution(channels, channels, CONV_KERNELS[1], config.time_strides[1], self.conv0.bins)
        sizes = [channels * self.conv1.bins] + [h] * (config.layers - 1)
        layer = BidirectionalClippedRNN if config.cell == "rnn" else nn.GRU
        self.recurrent = nn.ModuleList(layer(size, h) for size in sizes)
        self.dropout = nn.Dropout(config.dropout)
        self.row = RowConvolution(h, ROW_CONTEXT) if config.cell == "gru" else None
        self.row_norm = nn.BatchNorm1d(h) if config.cell == "gru" else None
        self.fully_connected = FullyConnected(h)
        self.ctc = nn.Linear(h, config.outputs)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = features.transpose(1, 2).unsqueeze(1)
        x, lengths = self.conv0(x, lengths)
        x, lengths = self.conv1(x, lengths)
        packed = pack_padded_sequence(x.permute(3, 0, 1, 2).flatten(2), lengths)
        for layer in self.recurrent:
            packed = packed._replace(data=self.dropout(packed.data))
            packed = layer(packed) if self.config.cell == "rnn" else layer(packed)[0]
        if self.row is not None:
            packed = self.row(packed)
            packed = packed._replace(data=self.row_norm(packed.data).clamp(0.0, CLIP))
        packed = self.fully_connected(packed)
        logits = self.ctc(self.dropout(packed.data))
        scores, _ = pad_packed_sequence(packed._replace(data=logits.log_softmax(-1)))
        return scores, lengths

    def parameter_table(self) -> list[tuple[str, int]]:
        """(layer, parameters) in the order of the paper's Tables 2 and 5."""
        rows = [("conv0", self.conv0), ("conv1", self.conv1)]
        rows += [(f"recurrent{i}", layer) for i, layer in enumerate(self.recurrent)]
        counts = [(name, sum(p.numel() for p in module.parameters())) for name, module in rows]
        if self.row is not None:
            counts.append(("row convolution", self.row.weight.numel() + 2 * self.config.hidden))
        counts.append(("fully connected", sum(p.numel() for p in self.fully_connected.parameters())))
        counts.append(("ctc", sum(p.numel() for p in self.ctc.parameters())))
        return counts


def parameter_table(config: SpeechConfig) -> list[tuple[str, int]]:
    """`SpeechModel(config).parameter_table()` without allocating a weight (torch's meta device)."""
    with torch.device("meta"):
        return SpeechModel(config).parameter_table()
