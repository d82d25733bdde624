"""What the losses of a finished run say, and what to change next. One line of text; nothing is changed here."""

from __future__ import annotations

import math
import shlex

from npgpt.config.settings import GPTConfig, TrainConfig
from npgpt.storage.header import Progress
from npgpt.training.events import Outcome

MUCH_FALLEN = 0.005  # a smaller fall of a loss over the last quarter of a run counts as none
MUCH_REPEATED = 0.05  # a larger share of the held-out text that also occurs in the training text makes its loss useless


def advice(progress: Progress, config: TrainConfig, model: GPTConfig, outcome: Outcome, repeated_share: float = 0.0) -> str:
    """One line: what the losses of a run show, and the setting to change next. Empty after an interruption.

    repeated_share: the share of the held-out text that also occurs in the training text, from 0 to 1.
    """
    lower = f"lower the learning rate (--lr {min(config.lr / 3, 1e-3):.1g}, it was {config.lr:g})"
    if config.optimizer == "muon":
        lower += f" and that of Muon (--muon-lr {min(config.muon_lr / 3, 0.02):.1g}, it was {config.muon_lr:g})"
    if outcome is Outcome.DIVERGED:
        return (
            f"The loss or a gradient became infinite or NaN after step {progress.step}: start again, {lower} or use a longer "
            "warm-up (--warmup-steps)."
        )
    rows = [row for row in progress.history if row[0] > progress.judged_since]
    if outcome is Outcome.INTERRUPTED:
        return ""
    if model.vocab_size == 1:
        return "The text has one distinct character, so there is nothing to learn: use another text."
    if repeated_share > MUCH_REPEATED:
        return (
            f"{repeated_share:.0%} of the held-out text also occurs in the training text, so the validation loss says little "
            "about new text: remove the copies, or hold out another text."
        )
    if len(rows) < 2:
        return (
            "There are too few evaluations to judge the run: train longer (--steps) or evaluate more often (--eval-interval)."
        )
    first_train, last_train = rows[0][1], rows[-1][1]
    if last_train > math.log(model.vocab_size) + 0.1:
        return f"The training loss, {last_train:.2f}, is worse than guessing ({math.log(model.vocab_size):.2f}): {lower}."
    if last_train > first_train + 0.1:
        return f"The training loss rose from {first_train:.2f} to {last_train:.2f}, so training diverged: {lower}."
    # Judge by the validation loss, if there is one.
    losses = [row[1] if row[2] is None else row[2] for row in rows]
    best, last, noise = min(losses), losses[-1], rows[-1][3] or 0.0
    best_step = rows[losses.index(best)][0]
    if rows[-1][2] is not None and last > best + max(0.01 * best, 0.5 * noise):
        return (
            f"Over-fitting since step {best_step}: the validation loss rose from {best:.2f} to {last:.2f}; the training loss "
            f"is {last_train:.2f}. More text helps most. Otherwise use more dropout (--dropout "
            f"{min(0.5, model.dropout + 0.1):.1f}) or a smaller model."
        )
    if last < 0.01:
        return f"The {'training' if rows[-1][2] is None else 'validation'} loss is {last:.4f}: the text is completely learned."
    which = "training" if rows[-1][2] is None else "validation"
    late = -1 - max(1, len(rows) // 4)  # the last quarter of the run begins here
    if last < min(losses[: late + 1]) * (1 - MUCH_FALLEN) or (len(rows) < 4 and last == best):
        rise = "" if config.schedule == "constant" else "; the learning rate rises again first"
        return f"The {which} loss was still falling at the end: train longer (--resume --steps {2 * config.steps}{rise})."
    if which == "validation" and last_train < rows[late][1] * (1 - MUCH_FALLEN) and last_train < last - noise:
        return (
            f"At the end the training loss was still falling and the validation loss, {best:.2f}, was not: the model begins to "
            f"learn the text by heart. More text helps most. Otherwise use more dropout (--dropout "
            f"{min(0.5, model.dropout + 0.1):.1f}) or a smaller model."
        )
    return (
        f"The {which} loss has levelled off at {best:.2f}: more steps alone will help little. Change one thing, such as a "
        f"larger model (--n-embd {2 * model.n_embd}) or a longer context (--block-size {2 * model.block_size})."
    )


def with_out(line: str, out: str) -> str:
    """The advice with `--out` before `--resume`, unless the run has the default name."""
    return line if out == "model.npz" else line.replace("--resume", f"--out {shlex.quote(out)} --resume")
