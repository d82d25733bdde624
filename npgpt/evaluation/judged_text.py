"""Which text a model is judged on, and which part of it was held out. No losses are computed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.storage.checkpoint import Checkpoint
from npgpt.text.dataset import length_to_train_on
from npgpt.text.reading import EncodedText, Track, read_texts
from npgpt.text.record import TextRecord
from npgpt.text.sources import STDIN, Sources
from npgpt.text.tokenizer import UnknownCharacterError, text_size


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
        name, own = _read_again(checkpoint, record, "the text it was trained on", hint, track)
        if checkpoint.val_text:
            val_name, val = _read_again(checkpoint, checkpoint.val_text, "its held-out text", hint, track)
            return JudgedText(f"all of {val_name}, which was held out", val.ids, True, own.ids)
        train, held_out = own.ids[: own.n_train], own.ids[own.n_train :]
        if not len(held_out):
            return JudgedText(f"all of {name}, and the model was trained on every character of it", own.ids, False, train)
        return JudgedText(f"the held-out part of {name}", held_out, True, train)
    sources, tokenizer = Sources(asked), checkpoint.tokenizer
    text = _read(checkpoint, sources, track, record, unknown=unknown)
    if record is None or trained is None or not record.is_beginning_of(text.ids, tokenizer):
        ids = text.ids
        if not tokenizer.is_characters and text.n_train < len(ids):  # it was split, as the text of the run would be
            ids = tokenizer.encode_array(tokenizer.decode(ids))
        return JudgedText(f"all of {sources}", ids)
    train, judged = text.ids[: text.n_train], text.ids[text.n_train :]
    added = text_size(tokenizer, text.ids)[0] - record.n_characters if record.n_characters else 0
    parts = [f"the held-out part of {sources}"] if text_size(tokenizer, judged)[0] > added else []
    parts += [f"the {added:,} characters that were added to {sources}"] if added else []
    if not parts:
        return JudgedText(f"all of {sources}, and the model was trained on every character of it", text.ids, False, train)
    return JudgedText(" and ".join(parts), judged, True, train)


def _read(
    checkpoint: Checkpoint,
    sources: Sources,
    track: Track | None,
    record: TextRecord | None,
    limit: int | None = None,
    unknown: str = "error",
) -> EncodedText:
    """A text, split where the run of the checkpoint split its training text.

    record: of the text. A held-out text of its own is not split.
    """
    tokenizer = checkpoint.tokenizer
    is_split = checkpoint.train_config is not None and record is not None and record is checkpoint.text
    fraction = checkpoint.train_config.val_fraction if checkpoint.train_config and is_split else 0.0

    def train_on(n: int) -> int:
        return length_to_train_on(min(n, record.n_characters or n) if record else n, fraction) if is_split else n

    def known(piece: str) -> str:
        return tokenizer.without_unknown(piece, replace=unknown == "replace")

    _, (text,) = read_texts([sources], tokenizer, track, limit, train_on, str if unknown == "error" else known)
    return text


def _read_again(
    checkpoint: Checkpoint, record: TextRecord, what: str, hint: str, track: Track | None
) -> tuple[str, EncodedText]:
    """(the name of a text of the run, its ids as the run had them). Raises RequestError if it is another text now."""
    missing = [path for path in record.sources if path == STDIN or not Path(path).exists()]
    if missing:
        raise RequestError(f"{what}, {record}, is not here; {hint}")
    sources = Sources(record.sources)
    try:
        text = _read(checkpoint, sources, track, record, record.n_characters)
    except UnknownCharacterError:
        text = EncodedText(np.zeros(0, dtype=np.uint8), 0)
    if not record.is_beginning_of(text.ids, checkpoint.tokenizer):
        raise RequestError(f"{record} is no longer the text this model was trained on; {hint} to judge the model on another")
    n = record.n_characters
    has_grown = n is not None and sum(sources.characters.values()) > n
    return f"the first {n:,} characters of {record}" if has_grown else str(record), text
