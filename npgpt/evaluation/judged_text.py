"""Which text a model is judged on, and which part of it was held out. No losses are computed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.storage.checkpoint import Checkpoint
from npgpt.text.characters import UnknownCharacterError
from npgpt.text.dataset import TextRecord, split
from npgpt.text.reading import Track, read_ids, read_text
from npgpt.text.sources import STDIN, Sources


@dataclass(frozen=True)
class JudgedText:
    """A text to judge a model on.

    what: which part of which text it is, in words. ids: the tokens to predict. is_held_out: whether they are held-out tokens of
    the run. trained_on: the tokens that the model was trained on; None if it was not trained on this text.
    """

    what: str
    ids: np.ndarray
    is_held_out: bool = False
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

    If the text of the run has grown since, it is judged up to its old end. If the user gave it, what was added is judged too,
    because the model has not seen it. Raises RequestError if there is no such text.
    """
    record, trained = checkpoint.text, checkpoint.train_config
    if not asked and (record is None or not record.sources or trained is None):
        raise RequestError(f"this checkpoint does not say what text it was trained on; {hint}")
    if not asked:
        assert record is not None
        name, ids = _read_again(checkpoint, record, "the text it was trained on", hint, track)
        assert trained is not None
        if checkpoint.val_text:
            val_name, val_ids = _read_again(checkpoint, checkpoint.val_text, "its held-out text", hint, track)
            return JudgedText(f"all of {val_name}, which was held out", val_ids, True, ids)
        train, held_out = split(ids, trained.val_fraction)
        if not len(held_out):
            return JudgedText(f"all of {name}, and the model was trained on every character of it", ids, False, train)
        return JudgedText(f"the held-out part of {name}", held_out, True, train)
    sources = Sources(asked)
    if unknown == "error":
        _, ids = read_ids(sources, checkpoint.tokenizer, track)
    else:
        text = checkpoint.tokenizer.without_unknown(read_text(sources), replace=unknown == "replace")
        ids = checkpoint.tokenizer.encode_array(text)
    n = record.length_in(ids) if record and trained else None
    if n is None or trained is None:
        return JudgedText(f"all of {sources}", ids)
    train, held_out = split(ids[:n], trained.val_fraction)
    parts = [f"the held-out part of {sources}"] if len(held_out) else []
    parts += [f"the {len(ids) - n:,} characters that were added to {sources}"] if n < len(ids) else []
    if not parts:
        return JudgedText(f"all of {sources}, and the model was trained on every character of it", ids, False, train)
    return JudgedText(" and ".join(parts), ids[len(train) :], True, train)


def _read_again(
    checkpoint: Checkpoint, record: TextRecord, what: str, hint: str, track: Track | None
) -> tuple[str, np.ndarray]:
    """(the name of a text of the run, its ids as the run had them). Raises RequestError if it is another text now."""
    missing = [path for path in record.sources if path == STDIN or not Path(path).exists()]
    if missing:
        raise RequestError(f"{what}, {record}, is not here; {hint}")
    sources = Sources(record.sources)
    try:
        _, ids = read_ids(sources, checkpoint.tokenizer, track, record.n_tokens)
    except UnknownCharacterError:
        ids = np.zeros(0, dtype=np.uint8)
    if record.length_in(ids) is None:
        raise RequestError(f"{record} is no longer the text this model was trained on; {hint} to judge the model on another")
    has_grown = sum(sources.characters.values()) > len(ids)
    return f"the first {len(ids):,} characters of {record}" if has_grown else str(record), ids
