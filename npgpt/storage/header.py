"""The schema of `checkpoint.json`: everything in a checkpoint that is not an array. Knows no model.

`encode_header` refuses whatever `parse_header` would refuse. A new key needs a new format number, an entry in KEYS and a
check in FIELDS. Every older format still loads.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from npgpt.storage.archive import HEADER, MAX_HEADER_BYTES, CheckpointError, UnusableError, first_few, shortened

# Format 1 had no hashes, no machine and no crash. Format 2 had `source` and `fingerprint` in place of the two texts. Format 3
# had `n_tokens` in place of `n_characters`, and always a vocabulary of characters.
FORMAT = 4

LONGEST_HISTORY = 10_000  # evaluations that a checkpoint remembers

KEYS = {  # by format number
    1: {"format", "config", "vocabulary", "train_config", "progress", "source", "fingerprint", "optimizer_steps"},
}
KEYS[2] = KEYS[1] | {"machine", "crash", "sha256"}
KEYS[3] = KEYS[2] - {"source", "fingerprint"} | {"text", "val_text"}
KEYS[4] = KEYS[3]


# ---------------------------------------------------------------- checks of one value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**63
    return isinstance(value, float) and math.isfinite(value)


def _or_none(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: value is None or check(value)


def _is_line(value: Any) -> bool:
    """Whether a text can be shown on one line as it is."""
    return isinstance(value, str) and all(map(_fits_a_line, value)) and len(value) < 5000


def _fits_a_line(c: str) -> bool:
    return c.isprintable() or unicodedata.category(c) == "Zs"  # such as a no-break space, which file names may have


def _is_vocabulary(value: Any) -> bool:
    """Whether a text can be encoded as UTF-8. JSON escapes can spell single surrogates, which cannot."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _is_history(value: Any) -> bool:
    checks = (_is_count, _is_number, _or_none(_is_number), _or_none(_is_number))
    return isinstance(value, list) and all(
        isinstance(row, list) and len(row) == len(checks) and all(check(n) for check, n in zip(checks, row, strict=True))
        for row in value
    )


def _is_progress(value: Any) -> bool:
    checks = {f.name: f.metadata["check"] for f in dataclasses.fields(Progress)}
    return isinstance(value, dict) and all(name in checks and checks[name](v) for name, v in value.items())


# ---------------------------------------------------------------- the schema


def _checked(check: Callable[[Any], Any], default: Any) -> Any:
    """A field of Progress with a check for values that are read from a file."""
    return dataclasses.field(default=default, metadata={"check": check})


@dataclass
class Progress:
    """How far a run has come. With the weights and the optimiser's state, it is all that resuming needs."""

    step: int = _checked(_is_count, default=0)  # steps done
    best_step: int = _checked(_is_count, default=0)  # the step with the lowest validation loss
    best_loss: float | None = _checked(_or_none(_is_number), default=None)
    judged_since: int = _checked(_is_count, default=0)  # losses of evaluations up to this step are of other held-out tokens
    stale_evaluations: int = _checked(_is_count, default=0)  # evaluations since the best one
    loss_sum: float = _checked(_is_number, default=0.0)  # training losses since the last evaluation, added up
    loss_count: int = _checked(_is_count, default=0)  # how many of them
    # One row for each evaluation: step, training loss, validation loss, its standard error.
    history: list[list[Any]] = dataclasses.field(default_factory=list, metadata={"check": _is_history})

    def forget_best(self) -> None:
        """Forget the best evaluation so far: the next one becomes the best."""
        self.best_loss, self.best_step, self.stale_evaluations = None, 0, 0

    def judge_anew(self) -> None:
        """From now on, other held-out tokens are judged: forget the best evaluation, and do not compare with earlier ones."""
        self.forget_best()
        self.judged_since = self.step

    def with_start(self, val_loss: float) -> Progress:
        """The progress of a run that starts with a trained model, once that model was judged."""
        return dataclasses.replace(self, best_loss=val_loss, best_step=self.step)

    def with_evaluation(self, train_loss: float, val_loss: float | None, val_stderr: float | None) -> Progress:
        """The progress after an evaluation at this step. Without a validation loss, every evaluation is the best."""
        best = val_loss is None or self.best_loss is None or val_loss < self.best_loss
        history = [*self.history, [self.step, train_loss, val_loss, val_stderr]][-LONGEST_HISTORY:]
        after = dataclasses.replace(self, loss_sum=0.0, loss_count=0, history=history)
        if best:
            after.best_loss, after.best_step, after.stale_evaluations = val_loss, self.step, 0
        else:
            after.stale_evaluations += 1
        return after


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))


def _is_text(value: Any) -> bool:
    """Whether this is a TextRecord as a dictionary."""
    return (
        isinstance(value, dict)
        and set(value) == {"sources", "sha256", "n_characters"}
        and isinstance(value["sources"], list)
        and all(map(_is_line, value["sources"]))
        and _or_none(_is_sha256)(value["sha256"])
        and _or_none(_is_count)(value["n_characters"])
    )


FIELDS: dict[str, Callable[[Any], Any]] = {
    "config": lambda value: isinstance(value, dict),
    "vocabulary": _or_none(_is_vocabulary),  # None: the tokenizer is in a member of its own
    "train_config": _or_none(lambda value: isinstance(value, dict)),
    "progress": _is_progress,
    "source": _or_none(_is_line),  # of the formats 1 and 2
    "fingerprint": _or_none(_is_sha256),  # of the formats 1 and 2
    "text": _or_none(_is_text),
    "val_text": _or_none(_is_text),
    "optimizer_steps": _or_none(_is_count),
    "machine": _or_none(lambda value: isinstance(value, dict) and all(_is_line(n) for pair in value.items() for n in pair)),
    "crash": _or_none(_is_line),
    "sha256": lambda value: isinstance(value, dict) and all(isinstance(v, str) for v in value.values()),
}


def encode_header(header: dict[str, Any]) -> bytes:
    """The header as JSON. Raises ValueError for a header that `parse_header` would refuse."""
    for key in KEYS[FORMAT] - {"format"}:
        if not FIELDS[key](header[key]):
            raise ValueError(f"{key} cannot be saved: {str(header[key])[:200]!r}")
    data = json.dumps({"format": FORMAT} | header, ensure_ascii=False, allow_nan=False).encode()
    if len(data) > MAX_HEADER_BYTES:
        raise ValueError(f"the checkpoint's {HEADER} would take {len(data):,} bytes, at most {MAX_HEADER_BYTES:,} are allowed")
    return data


def parse_header(data: bytes) -> dict[str, Any]:
    """The header with the keys and types of the newest format, whatever its format. What an older format lacks is None.

    Raises CheckpointError.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not allowed")

    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=unique_names, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its {HEADER} cannot be used ({error})") from None
    if not isinstance(header, dict) or "format" not in header:
        raise UnusableError(f"is not an npgpt checkpoint: its {HEADER} has no format")
    number = header["format"]
    if type(number) is not int or number not in KEYS:
        raise UnusableError(f"has checkpoint format {shortened(number)}, this version reads {' and '.join(map(str, KEYS))}")
    wrong = sorted(KEYS[number] ^ set(header))
    if wrong:
        names = first_few([shortened(key) for key in wrong])
        raise CheckpointError(f"its {HEADER} cannot be used (missing or unknown: {names})")
    if number == 3:
        header |= {key: _text_of_format_3(header[key]) for key in ("text", "val_text")}
    for key, is_valid in FIELDS.items():
        needed = key == "vocabulary" and number < 4
        if key in header and not (is_valid(header[key]) and not (needed and header[key] is None)):
            raise CheckpointError(f"its {HEADER} cannot be used ({key} is {shortened(header[key])})")
    if number < 3 and (header["source"] or header["fingerprint"]):
        sources = [] if header["source"] is None else [header["source"]]
        header["text"] = {"sources": sources, "sha256": header["fingerprint"], "n_characters": None}
    return {key: header.get(key) for key in KEYS[FORMAT]}


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object whose names are all different. Raises ValueError if one occurs twice."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _text_of_format_3(text: Any) -> Any:
    """The record of a text of format 3, with the names of format 4. A name of format 4 in it becomes an unknown one."""
    names = {"n_tokens": "n_characters", "n_characters": "n_tokens"}
    return {names.get(key, key): value for key, value in text.items()} if isinstance(text, dict) else text


def one_line(text: str) -> str:
    """The text with escapes for characters that are not printable or not UTF-8. A file name may have such characters."""
    return "".join(c if _fits_a_line(c) else c.encode("unicode_escape").decode() for c in text)
