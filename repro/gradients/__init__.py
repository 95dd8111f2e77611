"""Training with thresholded gate gradients (Zhu et al. 2017) for any torch model.

`ThresholdedLSTM(..., threshold=1e-6)` is a drop-in for `nn.LSTM`, `ThresholdedGRU` for `nn.GRU`;
`threshold_linears(block, rule)` does the same to the linear layers of a module. `record(model)` measures what becomes of the
gradients.
"""

from repro.gradients.gru import ThresholdedGRU
from repro.gradients.linear import ThresholdedLinear, threshold_linears
from repro.gradients.lstm import ThresholdedLSTM
from repro.gradients.recording import CAUSES, LayerRecord, cosines, dense, dense_gradients, record
from repro.gradients.thresholds import ByRate, HeldSparsity, PrintedSigned, RelativeRMS, Rounded, Rule, Static, TopK

__all__ = [
    "CAUSES",
    "ByRate",
    "HeldSparsity",
    "LayerRecord",
    "PrintedSigned",
    "RelativeRMS",
    "Rounded",
    "Rule",
    "Static",
    "ThresholdedGRU",
    "ThresholdedLSTM",
    "ThresholdedLinear",
    "TopK",
    "cosines",
    "dense",
    "dense_gradients",
    "record",
    "threshold_linears",
]
