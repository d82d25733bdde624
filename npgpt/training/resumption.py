"""Resuming: what a run may change on the way, and what it must keep. No steps are taken here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from npgpt.config.fields import RequestError
from npgpt.config.settings import GPTConfig, TrainConfig
from npgpt.storage.checkpoint import Checkpoint
from npgpt.text.dataset import Dataset, TextRecord, fingerprint, split

MODEL_MAY_CHANGE = ("dropout",)  # everything else is the shape of the model, which its weights have
MACHINE_SETTINGS = ("threads", "processes", "device", "tf32", "bf16")  # they change rounding alone; the trainer says so


@dataclass(frozen=True)
class Changes:
    """What a resumed run does differently: (before, now) by the name of the setting.

    comparable: whether the validation losses before and after are of the same tokens.
    """

    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    comparable: bool = True

    def __str__(self) -> str:
        """In one line, such as `lr 0.0003 (was 0.001), batch_size 16 (was 32)`."""
        return _listed(self.settings, "{name} {now} (was {before})")


def changes_since(
    last: Checkpoint, model: GPTConfig, training: TrainConfig, dataset: Dataset, val_text: TextRecord | None
) -> Changes:
    """What a run that continues from `last` does differently from its next step on.

    model, training, dataset, val_text: of the run that continues.

    Raises RequestError, naming everything that must stay and does not: the shape of the model, the optimiser, the text up to
    its old end, and the part of it that is held out, into which nothing may come that was trained on.
    """
    assert last.train_config is not None
    of_model = _differing(last.config, model)
    of_training = {k: v for k, v in _differing(last.train_config, training).items() if k not in MACHINE_SETTINGS}
    same = None if last.text is None else last.text.length_in(dataset.ids)
    shape = {k: v for k, v in of_model.items() if k not in MODEL_MAY_CHANGE}
    fraction_before, fraction = of_training.get("val_fraction", (0.0, 0.0))
    refusals = []
    if same is None:
        was = f" ({last.text}, as it was then)" if last.text and last.text.sources else ""
        more = ", perhaps with more at its end" if last.text and last.text.n_tokens else ""
        refusals.append(f"the text is not the one it was trained on{was}; give that text{more}, or start a new run")
    if shape:
        refusals.append(f"{_listed(shape, '{name} was {before} and is now {now}')}; a model keeps its shape; start a new run")
    if fraction > fraction_before:
        refusals.append(
            f"val_fraction was {fraction_before:g} and is now {fraction:g}, which would hold out text that it was trained on; "
            "keep it or lower it"
        )
    if "optimizer" in of_training:
        before, now = of_training["optimizer"]
        refusals.append(f"the optimizer was {before} and is now {now}, which cannot use its state; start a new run")
    if refusals:
        raise RequestError(f"cannot resume: {'. Also, '.join(refusals)}")
    assert same is not None
    settings = of_model | of_training
    if same < len(dataset.ids):
        settings["text"] = (f"{same:,} tokens", f"{len(dataset.ids):,} tokens")
    if (last.val_text and last.val_text.sha256) != (val_text and val_text.sha256):
        settings["held-out text"] = (_described(last.val_text), _described(val_text))
    held_out = last.val_text or TextRecord.of(split(dataset.ids[:same], last.train_config.val_fraction)[1])
    n = len(dataset.val) - 1
    comparable = held_out.sha256 == fingerprint(dataset.val) and _evaluated(last.train_config, n) == _evaluated(training, n)
    return Changes(settings, comparable)


def _evaluated(config: TrainConfig, n: int) -> int:
    """How many of n held-out tokens an evaluation predicts."""
    return min(config.eval_tokens or n, n)


def _described(val_text: TextRecord | None) -> str:
    if val_text is None:
        return "a part of the text"
    return f"{str(val_text) or 'a text'} of {val_text.n_tokens:,} tokens"


def _listed(changes: dict[str, tuple[Any, Any]], form: str) -> str:
    return ", ".join(form.format(name=name, before=_value(b), now=_value(n)) for name, (b, n) in changes.items())


def _value(value: Any) -> str:
    return "automatic" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _differing(before: Any, now: Any) -> dict[str, tuple[Any, Any]]:
    pairs = {f.name: (getattr(before, f.name), getattr(now, f.name)) for f in dataclasses.fields(before)}
    return {name: (b, n) for name, (b, n) in pairs.items() if b != n}
