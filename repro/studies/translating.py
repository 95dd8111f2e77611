"""The translator of zhu2017: LSTM encoder and decoder, with or without attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from repro.studies.sentences import LONGEST, SentenceTrial, Task, Written

if TYPE_CHECKING:
    from repro.models.sentences import Recurrent


@dataclass(frozen=True, kw_only=True)
class TranslationTrial(SentenceTrial):
    """Translation of sentence pairs, `corpus` as in `repro.datasets.pairs.load_pairs`; `layers` on either side."""

    kind: ClassVar[str] = "translation"
    words: ClassVar[int] = 25

    attention: bool = False

    def task(self, recurrent: Recurrent) -> Task:
        from repro.datasets.pairs import load_pairs, pair_batches
        from repro.models.translation import Translator

        corpus = load_pairs(self.corpus, **self.options())
        model = Translator(
            len(corpus.source),
            len(corpus.target),
            self.embedding,
            self.hidden,
            self.layers,
            self.attention,
            self.dropout,
            recurrent,
        )

        def batches(split, rng):
            return ((one.source, one.lengths, one.target) for one in pair_batches(corpus, split, self.batch, rng))

        def written() -> Iterator[Written]:
            for one in pair_batches(corpus, "test", self.batch):
                sources = one.source.T.tolist()
                outputs = model.translate(one.source, one.lengths, LONGEST)
                rows = zip(sources, one.lengths.tolist(), one.references, outputs, strict=True)
                for source, length, reference, output in rows:
                    given = " ".join(corpus.source.decode(source[:length]))
                    yield Written(given, [reference], corpus.target.decode(output))

        return Task(model, batches, written)

    def label(self) -> str:
        return super().label().replace("translation", "translation with attention" if self.attention else "translation")
