"""Three papers on sparse recurrent networks, reproduced: pruning, thresholded gradients, collectives.

Downstairs packages (`repro.pruning`, `repro.models`, `repro.datasets`, `repro.sparse`, `repro.training`) are plain torch
and can be used on their own; upstairs (`repro.studies`, `repro.engine`, `repro.report`) runs the study.
"""

__version__ = "0.1.0"
