"""Which text a model is judged on, and which part of it was held out. No losses are computed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.storage.checkpoint import Checkpoint
from npgpt.text.dataset import TextRecord, split
from npgpt.text.reading import Track, read_ids, read_text
from npgpt.text.sources import STDIN, Sources


@dataclass(frozen=True)
class JudgedText:
    """A text to judge a model on.

    name: what to call it. ids: all of it. held_out: the ids that the model was not trained on; None if the model was not
    trained on this text. trained_on: the ids that it was trained on.
    """

    name: str
    ids: np.ndarray
    held_out: np.ndarray | None = None
    trained_on: np.ndarray | None = None


def judged_text(
    checkpoint: Checkpoint, asked: Sequence[str], hint: str, track: Track | None = None, unknown: str = "error"
) -> JudgedText:
    """The text to judge a model on.

    asked: the files or folders that the user gave; none means the text that the model was trained on, or the held-out text of
    its own that the run had.
    hint: how the user can name a text, for messages.
    track: shows the progress of reading; see `read_ids`.
    unknown: what to do with characters that the tokenizer does not know: "error", "skip" or "replace".

    A text that has grown since is judged up to its old end. Raises RequestError if there is no such text.
    """
    record, trained = checkpoint.text, checkpoint.train_config
    if not asked and (record is None or not record.sources or trained is None):
        raise RequestError(f"this checkpoint does not say what text it was trained on; {hint}")
    if not asked:
        assert record is not None
        ids, n = _ids_again(checkpoint, record, "the text it was trained on", hint, track)
        if checkpoint.val_text:
            val, n_val = _ids_again(checkpoint, checkpoint.val_text, "its held-out text", hint, track)
            return JudgedText(str(checkpoint.val_text), ids[:n], val[:n_val], ids[:n])
    else:
        sources = Sources(asked)
        if unknown == "error":
            _, ids = read_ids(sources, checkpoint.tokenizer, track)
        else:
            text = checkpoint.tokenizer.without_unknown(read_text(asked), replace=unknown == "replace")
            ids = checkpoint.tokenizer.encode_array(text)
        known = record.length_in(ids) if record and trained else None
        if known is None:
            return JudgedText(str(sources), ids)
        n = known
    assert trained is not None
    train, held_out = split(ids[:n], trained.val_fraction)
    name = ", ".join(asked) or str(record)
    return JudgedText(name if n == len(ids) else f"the first {n:,} characters of {name}", ids[:n], held_out, train)


def _ids_again(checkpoint: Checkpoint, record: TextRecord, what: str, hint: str, track: Track | None) -> tuple[np.ndarray, int]:
    """(the ids of a text of the run, how many of them the run had). Raises RequestError if it is not the same text now."""
    missing = [path for path in record.sources if path == STDIN or not Path(path).exists()]
    if missing:
        raise RequestError(f"{what}, {record}, is not here; {hint}")
    _, ids = read_ids(record.sources, checkpoint.tokenizer, track)
    n = record.length_in(ids)
    if n is None:
        raise RequestError(f"{record} is no longer the text this model was trained on; {hint} to judge the model on another")
    return ids, n
