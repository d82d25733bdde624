"""Resuming: what a run may change on the way, and what it must keep. No steps are taken here."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.storage.checkpoint import Checkpoint

MODEL_MAY_CHANGE = ("dropout",)  # everything else is the shape of the model, which its weights have
MACHINE_SETTINGS = ("threads", "processes", "device", "tf32", "bf16")  # they change rounding alone; the trainer says so
# After a change of one of these, validation losses are not comparable with earlier ones.
JUDGING = ("text", "held-out text", "val_fraction", "eval_tokens")

Changes = dict[str, tuple[Any, Any]]  # by name of the setting: (before, now)


def changes_since(last: Checkpoint, now: Checkpoint, ids: np.ndarray) -> Changes:
    """What a run that continues from `last` does differently from its next step on.

    now: the state of the run that continues. ids: its text.

    Raises RequestError, naming everything that must stay and does not: the shape of the model, the text up to its old end,
    and what is held out, of which nothing may be text that was trained on.
    """
    assert last.train_config is not None
    of_model = _differing(last.config, now.config)
    of_training = {k: v for k, v in _differing(last.train_config, now.train_config).items() if k not in MACHINE_SETTINGS}
    same = _length_of_same_text(last, now, ids)
    shape = {k: v for k, v in of_model.items() if k not in MODEL_MAY_CHANGE}
    fraction_before, fraction = of_training.get("val_fraction", (0.0, 0.0))
    refusals = []
    if same is None:
        was = f" ({last.text}, as it was then)" if last.text and last.text.sources else ""
        refusals.append(
            f"the text is not the one it was trained on{was}; give that text, perhaps with more at its end, or start a new run"
        )
    if shape:
        refusals.append(f"{_listed(shape, '{name} was {before} and is now {now}')}; a model keeps its shape; start a new run")
    if fraction > fraction_before:
        refusals.append(
            f"val_fraction was {fraction_before:g} and is now {fraction:g}, which would hold out text that it was trained on; "
            "keep it or lower it"
        )
    if "optimizer" in of_training:
        before, now_used = of_training["optimizer"]
        refusals.append(f"the optimizer was {before} and is now {now_used}, which cannot use its state; start a new run")
    if refusals:
        raise RequestError(f"cannot resume: {'. Also, '.join(refusals)}")
    changes = of_model | of_training
    if same is not None and same < len(ids):
        changes["text"] = (f"{same:,} tokens", f"{len(ids):,} tokens")
    if (last.val_text and last.val_text.sha256) != (now.val_text and now.val_text.sha256):
        changes["held-out text"] = (last.val_text or "a part of the text", now.val_text or "a part of the text")
    return changes


def _length_of_same_text(last: Checkpoint, now: Checkpoint, ids: np.ndarray) -> int | None:
    """How many tokens at the beginning of `ids` are the text that `last` was trained on; None if it is another text."""
    if last.text is None or last.tokenizer != now.tokenizer:
        return None
    return last.text.length_in(ids)


def described(changes: Changes) -> str:
    """The changes in one line, such as `lr 0.0003 (was 0.001), batch_size 16 (was 32)`."""
    return _listed(changes, "{name} {now} (was {before})")


def _listed(changes: Changes, form: str) -> str:
    return ", ".join(form.format(name=name, before=_value(b), now=_value(n)) for name, (b, n) in changes.items())


def _value(value: Any) -> str:
    return "automatic" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _differing(before: Any, now: Any) -> Changes:
    pairs = {f.name: (getattr(before, f.name), getattr(now, f.name)) for f in dataclasses.fields(before)}
    return {name: (b, n) for name, (b, n) in pairs.items() if b != n}
