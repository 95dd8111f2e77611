"""The captioner of zhu2017: an LSTM that is shown an image's features once and writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from repro.errors import one_of
from repro.studies.sentences import LONGEST, SentenceTrial, Task, Written

if TYPE_CHECKING:
    from repro.models.sentences import Recurrent

CORPORA = ("made",)  # MS-COCO's files are no part of any registry: `repro.datasets.captions.read_coco` takes the reader's own


@dataclass(frozen=True, kw_only=True)
class CaptionTrial(SentenceTrial):
    """Captions of made images (`repro.datasets.madecaptions`)."""

    kind: ClassVar[str] = "captions"
    code_version: ClassVar[int] = 2  # images without a scene of another
    words: ClassVar[int] = 10

    def __post_init__(self):
        super().__post_init__()
        one_of("corpus of captions", self.corpus, CORPORA)

    def task(self, recurrent: Recurrent) -> Task:
        import numpy as np
        import torch

        from repro.datasets import madecaptions
        from repro.datasets.captions import caption_batches, caption_vocabulary
        from repro.models.captioning import Captioner

        images = madecaptions.load(**self.options())
        vocabulary = caption_vocabulary(images["train"])
        model = Captioner(
            madecaptions.FEATURES, len(vocabulary), self.embedding, self.hidden, self.layers, self.dropout, recurrent
        )

        def batches(split, rng):
            return ((one.features, one.captions) for one in caption_batches(images[split], vocabulary, self.batch, rng))

        def written() -> Iterator[Written]:
            for start in range(0, len(images["test"]), self.batch):
                chunk = images["test"][start : start + self.batch]
                outputs = model.describe(torch.from_numpy(np.stack([image.features for image in chunk])), LONGEST)
                for image, output in zip(chunk, outputs, strict=True):
                    references = [tuple(caption.split()) for caption in image.captions]
                    yield Written(image.name, references, vocabulary.decode(output))

        return Task(model, batches, written)
