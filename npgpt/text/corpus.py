"""What a model is trained and judged on: a text, perhaps a held-out text of its own, and their tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.config.settings import TrainConfig
from npgpt.text.characters import CharTokenizer
from npgpt.text.dataset import Dataset
from npgpt.text.reading import Track, read_ids_of
from npgpt.text.sources import STDIN, Sources


@dataclass(frozen=True)
class Corpus:
    """A text as ids, and a held-out text of its own as ids, or None if a part of the text is held out.

    The sources say which files the texts came from.
    """

    tokenizer: CharTokenizer
    ids: np.ndarray
    val_ids: np.ndarray | None = None
    sources: Sources | None = None
    val_sources: Sources | None = None

    @classmethod
    def read(
        cls,
        paths: Sequence[str],
        val_path: str | None = None,
        tokenizer: CharTokenizer | None = None,
        written: Iterable[Path] = (),
        track: Track | None = None,
    ) -> Corpus:
        """Read the texts; see `Sources` for the paths, and `read_ids` for the tokenizer and the errors.

        written: files that the run will write; they are never read.
        """
        written = list(written)
        given = [paths] if val_path is None else [paths, [val_path]]
        named = [path for group in given for path in group]
        if named.count(STDIN) > 1:
            raise RequestError("standard input (-) can be read only once")
        for path in named:
            if Path(path).resolve() in [file.resolve() for file in written]:
                raise RequestError(f"{path} is one of the files this run would write; choose another --out")
        texts = [Sources(group, written) for group in given]
        tokenizer, ids = read_ids_of(texts, tokenizer, track)
        val_ids, val_sources = (ids[1], texts[1]) if val_path is not None else (None, None)
        return cls(tokenizer, ids[0], val_ids, texts[0], val_sources)

    def dataset(self, block_size: int, training: TrainConfig) -> Dataset:
        return Dataset(self.ids, block_size, training.batch_size, training.val_fraction, training.seed, self.val_ids)

    def beginning(self, n: int) -> Corpus:
        """At most the first n tokens of each text."""
        return replace(self, ids=self.ids[:n], val_ids=None if self.val_ids is None else self.val_ids[:n])

    def number_held_out(self, val_fraction: float) -> int:
        """How many tokens are held out."""
        return int(len(self.ids) * val_fraction) if self.val_ids is None else len(self.val_ids)
