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
        paths: str | Sequence[str],
        val_path: str | None = None,
        tokenizer: CharTokenizer | None = None,
        written: Iterable[Path] = (),
        track: Track | None = None,
    ) -> Corpus:
        """Read the texts; see `Sources` for the paths, and `read_ids` for the tokenizer and the errors.

        written: files that the run will write; they are never read.
        """
        paths, written = [paths] if isinstance(paths, str) else list(paths), [path.resolve() for path in written]
        named = [*paths, *([] if val_path is None else [val_path])]
        if named.count(STDIN) > 1:
            raise RequestError("standard input (-) can be read only once")
        for path in named:
            if path != STDIN and Path(path).resolve() in written:
                raise RequestError(f"{path} is one of the files this run would write; choose another --out")
        if val_path is None:
            sources = Sources(paths, written)
            tokenizer, (ids,) = read_ids_of([sources], tokenizer, track)
            return cls(tokenizer, ids, None, sources)
        val_sources = Sources(val_path, written)  # a folder in `paths` may hold these files; they are not trained on
        held_out = {Path(name).resolve() for name in val_sources.names if name != STDIN}
        both = [path for path in paths if path != STDIN and Path(path).resolve() in held_out]
        if both:
            raise RequestError(f"{both[0]} is to be trained on and to be held out; name it once")
        sources = Sources(paths, [*written, *held_out])
        tokenizer, (ids, val_ids) = read_ids_of([sources, val_sources], tokenizer, track)
        return cls(tokenizer, ids, val_ids, sources, val_sources)

    def dataset(self, block_size: int, training: TrainConfig) -> Dataset:
        return Dataset(self.ids, block_size, training.batch_size, training.val_fraction, training.seed, self.val_ids)

    def beginning(self, n: int) -> Corpus:
        """At most the first n tokens of each text."""
        return replace(self, ids=self.ids[:n], val_ids=None if self.val_ids is None else self.val_ids[:n])

    def number_held_out(self, val_fraction: float) -> int:
        """How many tokens are held out."""
        return int(len(self.ids) * val_fraction) if self.val_ids is None else len(self.val_ids)
