"""What a model is trained and judged on: a text, perhaps a held-out text of its own, and their tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.config.settings import TrainConfig
from npgpt.text.bpe import NewBPE
from npgpt.text.characters import MoreCharacters
from npgpt.text.dataset import Dataset, length_to_train_on
from npgpt.text.reading import Track, read_texts
from npgpt.text.sources import STDIN, Sources
from npgpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Corpus:
    """A text as ids, and a held-out text of its own as ids, or None if a part of the text is held out.

    The sources say which files the texts came from. n_train: how many of the ids are trained on, if the text was split before
    it was encoded; None if tokens are characters, so that it can be split anywhere.
    """

    tokenizer: Tokenizer
    ids: np.ndarray
    val_ids: np.ndarray | None = None
    sources: Sources | None = None
    val_sources: Sources | None = None
    n_train: int | None = None

    @classmethod
    def read(
        cls,
        paths: str | Sequence[str],
        val_path: str | None = None,
        tokenizer: Tokenizer | NewBPE | MoreCharacters | None = None,
        written: Iterable[Path] = (),
        track: Track | None = None,
        val_fraction: float = TrainConfig.val_fraction,
    ) -> Corpus:
        """Read the texts; see `Sources` for the paths, and `read_texts` for the tokenizer and the errors.

        written: files that the run will write; they are never read. val_fraction: the fraction of the characters to hold out,
        if there is no val_path.
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
            tokenizer, (text,) = read_texts([sources], tokenizer, track, train_on=lambda n: length_to_train_on(n, val_fraction))
            n_train = None if tokenizer.is_characters else text.n_train
            return cls(tokenizer, text.ids, None, sources, None, n_train)
        val_sources = Sources(val_path, written)  # a folder in `paths` may hold these files; they are not trained on
        held_out = {Path(name).resolve() for name in val_sources.names if name != STDIN}
        both = [path for path in paths if path != STDIN and Path(path).resolve() in held_out]
        if both:
            raise RequestError(f"{both[0]} is to be trained on and to be held out; name it once")
        sources = Sources(paths, [*written, *held_out])
        tokenizer, (text, val_text) = read_texts([sources, val_sources], tokenizer, track)
        return cls(tokenizer, text.ids, val_text.ids, sources, val_sources)

    def dataset(self, block_size: int, training: TrainConfig) -> Dataset:
        fraction, seed = training.val_fraction, training.seed
        return Dataset(self.ids, block_size, training.batch_size, fraction, seed, self.val_ids, self.n_train)

    def beginning(self, n: int) -> Corpus:
        """At most the first n tokens of each text."""
        val_ids = None if self.val_ids is None else self.val_ids[:n]
        n_train = self.n_train if n >= len(self.ids) else None
        return replace(self, ids=self.ids[:n], val_ids=val_ids, n_train=n_train)

    def number_held_out(self, val_fraction: float) -> int:
        """How many tokens are held out."""
        if self.val_ids is not None:
            return len(self.val_ids)
        return len(self.ids) - (length_to_train_on(len(self.ids), val_fraction) if self.n_train is None else self.n_train)
