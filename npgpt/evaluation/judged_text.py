"""Which text a model is judged on, and which part of it was held out. No losses are computed here."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.storage.checkpoint import Checkpoint
from npgpt.text.dataset import fingerprint, split
from npgpt.text.reading import Track, read_ids, read_text


def judged_text(
    checkpoint: Checkpoint, asked: str | None, hint: str, track: Track | None = None, unknown: str = "error"
) -> tuple[str, np.ndarray, np.ndarray | None]:
    """The text to judge a model on: (its path, its ids, the held-out ids).

    asked: the path that the user gave; None means the text that the model was trained on.
    hint: how the user can name a text, for messages.
    track: shows the progress of reading; see `read_ids`.
    unknown: what to do with characters that the tokenizer does not know: "error", "skip" or "replace".

    The held-out ids are None if the model was not trained on this text. Raises RequestError if there is no such text.
    """
    path, trained = asked or checkpoint.source, checkpoint.train_config
    if path is None or (asked is None and trained is None):
        raise RequestError(f"this checkpoint does not say what text it was trained on; {hint}")
    if asked is None and not Path(path).is_file():
        raise RequestError(f"the text it was trained on, {path}, is not here; {hint}")
    if unknown == "error":
        _, ids = read_ids(path, checkpoint.tokenizer, track)
    else:
        text = checkpoint.tokenizer.without_unknown(read_text(path), replace=unknown == "replace")
        ids = checkpoint.tokenizer.encode_array(text)
    held_out = None
    if trained is not None and fingerprint(ids) == checkpoint.fingerprint:
        held_out = split(ids, trained.val_fraction)[1]
    if asked is None and held_out is None:
        raise RequestError(f"{path} is no longer the text this model was trained on; {hint} to judge the model on another")
    return path, ids, held_out
