"""Resuming: what a run may change on the way, and what it must keep. No steps are taken here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from npgpt.config.fields import RequestError
from npgpt.config.settings import GPTConfig, TrainConfig
from npgpt.storage.checkpoint import Checkpoint
from npgpt.text.dataset import Dataset
from npgpt.text.record import TextRecord
from npgpt.text.tokenizer import Tokenizer, text_size

MODEL_MAY_CHANGE = ("dropout",)  # everything else is the shape of the model, which its weights have
MACHINE_SETTINGS = ("threads", "processes", "device", "tf32", "bf16")  # they change rounding alone; the trainer says so


class FinishedError(RequestError):
    """There is nothing left to do for a run that was to continue."""


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
    last: Checkpoint,
    model: GPTConfig,
    training: TrainConfig,
    tokenizer: Tokenizer,
    dataset: Dataset,
    val_text: TextRecord | None,
) -> Changes:
    """What a run that continues from `last` does differently from its next step on.

    model, training, tokenizer, dataset, val_text: of the run that continues.

    Raises RequestError if `last` holds no training state, has no step left to take, or has another tokenizer. It also names
    everything that must stay and does not: the shape of the model, the optimiser, the text up to its old end, and the part of
    it that is held out, into which nothing may come that was trained on.
    """
    if last.optimizer_state is None or last.train_config is None:
        raise RequestError(
            "this checkpoint holds no training state to resume from; a run's NAME.last.npz does, if it is read by "
            "load(path, with_optimizer=True); train --from starts a new run with its weights"
        )
    if last.tokenizer != tokenizer:
        raise RequestError(
            "cannot resume: the vocabulary is not the one it was trained with; use the checkpoint's tokenizer, or start a new "
            "run"
        )
    of_model = _differing(last.config, model)
    of_training = {k: v for k, v in _differing(last.train_config, training).items() if k not in MACHINE_SETTINGS}
    same = last.text is not None and last.text.is_beginning_of(dataset.ids, last.tokenizer)
    shape = {k: v for k, v in of_model.items() if k not in MODEL_MAY_CHANGE}
    fraction_before, fraction = of_training.get("val_fraction", (0.0, 0.0))
    refusals = []
    if not same:
        was = f" ({last.text}, as it was then)" if last.text and last.text.sources else ""
        more = ", perhaps with more at its end" if last.text and last.text.n_characters else ""
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
    if last.step >= training.steps:
        raise FinishedError(f"nothing to do: the run is at step {last.step} already; ask for more than that with --steps")
    assert last.text is not None
    settings = of_model | of_training
    length = text_size(last.tokenizer, dataset.ids)[0]
    length_before = last.text.n_characters or length
    if length_before < length:
        settings["text"] = (f"{length_before:,} characters", f"{length:,} characters")
    if (last.val_text and last.val_text.sha256) != (val_text and val_text.sha256):
        settings["held-out text"] = (_described(last.val_text), _described(val_text))
    same_held_out = not settings.keys() & {"held-out text", "val_fraction"} and ("text" not in settings or val_text is not None)
    n = len(dataset.val) - 1
    return Changes(settings, same_held_out and _evaluated(last.train_config, n) == _evaluated(training, n))


def _evaluated(config: TrainConfig, n: int) -> int:
    """How many of n held-out tokens an evaluation predicts."""
    return min(config.eval_tokens or n, n)


def _described(val_text: TextRecord | None) -> str:
    if val_text is None:
        return "a part of the text"
    return f"{str(val_text) or 'a text'} of {val_text.n_characters:,} characters"


def _listed(changes: dict[str, tuple[Any, Any]], form: str) -> str:
    return ", ".join(form.format(name=name, before=_value(b), now=_value(n)) for name, (b, n) in changes.items())


def _value(value: Any) -> str:
    return "automatic" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _differing(before: Any, now: Any) -> dict[str, tuple[Any, Any]]:
    pairs = {f.name: (getattr(before, f.name), getattr(now, f.name)) for f in dataclasses.fields(before)}
    return {name: (b, n) for name, (b, n) in pairs.items() if b != n}
