"""What to train in a given time: candidates are timed on this machine and text, and judged by what they were measured to reach.

Nothing is trained for good here, and no flag is parsed.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.config.settings import PRESETS, GPTConfig, TrainConfig
from npgpt.engine.backend import Backend
from npgpt.model.gpt import GPT
from npgpt.text.characters import CharTokenizer
from npgpt.text.dataset import Dataset
from npgpt.training.memory import check_memory, estimate_memory
from npgpt.training.trainer import SECONDS_FOR_PROCESSES, End, Evaluation, Outcome, Step, Trainer

EVALUATIONS = 8  # fewer where they would take more than FOR_EVALUATIONS even so
FOR_EVALUATIONS = 0.08  # of the time, at most
FOR_TIMING = 0.02  # of the time, on the one that is chosen
RESERVE = 0.02  # of the time, for checkpoints and what else is not timed here
LONGEST_TIMED = 1 << 22  # characters of a text that timing looks at
CHOSEN = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "lr", "dropout")  # what a candidate is


@dataclass(frozen=True)
class Candidate:
    """Settings, and validation losses they reached on tiny Shakespeare: runs of so many steps, each to its end."""

    settings: dict[str, Any]
    reached: tuple[tuple[int, float], ...]  # (steps, loss), steps rising

    def expected(self, steps: int) -> float | None:
        """The loss after a run of so many steps, between those measured on a logarithmic scale, and beyond the last one as
        after it; None below the first."""
        if steps < self.reached[0][0]:
            return None
        measured, losses = zip(*self.reached, strict=True)
        return float(np.interp(np.log(steps), np.log(measured), losses))


# What learned fastest of some thirty configurations, each for 20 seconds to 5 minutes on two cores, and of two for 20. Depth
# and width pay late, a window of 128 early; dropout costs more than it gives to models this small, unless the text is read
# many times over. The last is nanoGPT's for a GPU, with the loss it publishes.
CANDIDATES = (
    Candidate(
        {"n_layer": 1, "n_embd": 128, "block_size": 64, "batch_size": 12, "lr": 6e-3},
        ((325, 2.341), (1500, 1.831), (3000, 1.734), (15_000, 1.602)),
    ),
    Candidate(
        {"n_layer": 1, "n_embd": 128, "block_size": 128, "batch_size": 8, "lr": 6e-3},
        ((2800, 1.700), (11_500, 1.578), (26_700, 1.566)),
    ),
    Candidate(
        {"n_layer": 2, "n_embd": 128, "block_size": 128, "batch_size": 8, "lr": 4e-3},
        ((2900, 1.697), (5800, 1.598), (13_300, 1.519), (42_000, 1.512)),  # the last with dropout 0.1
    ),
    Candidate({k: v for k, v in PRESETS["char"].items() if k in CHOSEN}, ((5000, 1.470),)),
)


@dataclass(frozen=True)
class Plan:
    """What to train, and why in two lines."""

    model: GPTConfig
    training: TrainConfig
    reasons: tuple[str, str]


@dataclass(frozen=True)
class _Timed:
    candidate: Candidate
    model: GPTConfig
    training: TrainConfig
    step_seconds: float

    def steps_in(self, seconds: float) -> int:
        return int(seconds / self.step_seconds)


def plan(
    until: float,
    ids: np.ndarray,
    tokenizer: CharTokenizer,
    backend: Backend,
    fixed: Mapping[str, Any],
    candidates: tuple[Candidate, ...] = CANDIDATES,
) -> Plan:
    """Choose model, batch, learning rate and steps for training on `ids` that is to end at `until`, a time of
    `time.perf_counter`. `fixed` are settings somebody has chosen already. Raises RequestError when there is no time for a
    step, or no candidate goes with the text and what is fixed."""
    seconds = until - time.perf_counter()
    processes = fixed.get("processes")
    if processes is None:
        fixed = {**fixed, "processes": seconds > SECONDS_FOR_PROCESSES}  # as the run itself will do
    sample = ids[:LONGEST_TIMED]
    choices: list[tuple[float, _Timed]] = []
    refused = RequestError(f"there is no time for a step in {seconds:.2g} s; give it more --minutes")
    for candidate in candidates:
        try:
            model, training = _configs(candidate, fixed, tokenizer)
            if choices and not _could_do(candidate, model, training, choices[-1][1], seconds):
                continue
            if backend.name == "cpu":
                check_memory(model, training)
            timed = _time(candidate, model, training, sample, tokenizer, backend, (0.002 * seconds, 0.02 * seconds))
        except RequestError as error:  # it does not go with what is fixed, or with so short a text
            refused = error
            continue
        expected = candidate.expected(timed.steps_in((1 - FOR_EVALUATIONS) * seconds))
        if expected is not None or not choices:
            choices.append((math.inf if expected is None else expected, timed))
    if not choices:
        raise refused
    choices.sort(key=lambda choice: choice[0])
    best = choices[0][1]

    def epochs(steps: int) -> float:
        return steps * best.training.batch_size * best.model.block_size / (len(ids) * (1 - best.training.val_fraction))

    if "dropout" not in fixed and "dropout" not in best.candidate.settings:
        dropout = dropout_for(epochs(best.steps_in(seconds)), best.model.num_parameters())
        best = dataclasses.replace(best, model=dataclasses.replace(best.model, dropout=dropout))
    longest = FOR_TIMING * seconds
    best = _time(best.candidate, best.model, best.training, sample, tokenizer, backend, (min(20.0, longest), longest))
    evaluation_seconds, eval_tokens = _evaluations(best, ids, tokenizer, backend, seconds, fixed.get("eval_tokens"))
    left = until - time.perf_counter() - RESERVE * seconds
    if "eval_interval" in fixed:
        interval = fixed["eval_interval"]
        steps = int(left / (best.step_seconds + evaluation_seconds / interval))
    else:
        evaluations = max(1, min(EVALUATIONS, int(FOR_EVALUATIONS * seconds / evaluation_seconds)))
        steps = best.steps_in(left - evaluations * evaluation_seconds)
        interval = -(-steps // evaluations)
    if steps < 1:
        raise RequestError(
            f"there is no time for a step, which takes {best.step_seconds:.2g} s, once it was timed; give it more --minutes"
        )
    training = dataclasses.replace(
        best.training,
        processes=processes,
        steps=steps,
        warmup_steps=fixed.get("warmup_steps", min(100, steps // 10)),
        eval_interval=interval,
        eval_tokens=eval_tokens,
    )
    return Plan(best.model, training, _reasons(choices, best, training, fixed, epochs(steps)))


def _reasons(
    choices: list[tuple[float, _Timed]], best: _Timed, training: TrainConfig, fixed: Mapping[str, Any], epochs: float
) -> tuple[str, str]:
    why = _in_short(best)
    if fixed.keys() & set(CHOSEN):
        why += ": the rest of a configuration you have chosen part of"
    elif math.isinf(choices[0][0]):
        why += ": the quickest there is; what it reaches in so little time was not measured"
    else:
        reached = [f"{loss:.2f} with {_in_short(timed)}" for loss, timed in choices[1:2]]
        why += f": on tiny Shakespeare it came to {choices[0][0]:.2f}" + (f" ({', '.join(reached)})" if reached else "")
    memory = estimate_memory(best.model, training) / 1e6
    return (
        why,
        f"a step takes {1e3 * best.step_seconds:.3g} ms here; the text is read {epochs:.1f} times over: dropout "
        f"{best.model.dropout:g}; about {memory:,.0f} MB of memory",
    )


def dropout_for(epochs: float, parameters: int) -> float:
    """How much dropout suits a model of so many parameters that reads its text so many times over.

    Measured on a million characters and on a hundred thousand, with one block and with two: at 6 million parameter-epochs 0.1
    cost a tenth of a nat; at 14 million none let the loss rise again; at 27 million 0.1 was right and 0.2 cost 0.06 to 0.08;
    at 65 million 0.1 let it rise.
    """
    return 0.0 if epochs * parameters < 8e6 else 0.1 if epochs * parameters < 40e6 else 0.2


def _configs(candidate: Candidate, fixed: Mapping[str, Any], tokenizer: CharTokenizer) -> tuple[GPTConfig, TrainConfig]:
    settings = {"dropout": 0.0, "min_lr": 0.0, "patience": 0} | candidate.settings | dict(fixed)
    of_model = {f.name for f in dataclasses.fields(GPTConfig)}
    return (
        GPTConfig(vocab_size=tokenizer.vocab_size, **{k: v for k, v in settings.items() if k in of_model}),
        TrainConfig(**{k: v for k, v in settings.items() if k not in of_model}),
    )


def _could_do(candidate: Candidate, model: GPTConfig, training: TrainConfig, last: _Timed, seconds: float) -> bool:
    """Whether there is time for the first of the runs it was measured in, judged by one that was timed: a step takes as long
    as its parameters times its tokens."""

    def work(model: GPTConfig, training: TrainConfig) -> float:
        return model.num_parameters() * model.block_size * training.batch_size

    expected = last.step_seconds * work(model, training) / work(last.model, last.training)
    return candidate.reached[0][0] * expected < 1.5 * seconds


def _time(
    candidate: Candidate,
    model: GPTConfig,
    training: TrainConfig,
    ids: np.ndarray,
    tokenizer: CharTokenizer,
    backend: Backend,
    seconds: tuple[float, float],
) -> _Timed:
    """Time steps for `seconds[0]`, two at least after the first two, unless that takes longer than `seconds[1]`."""
    usual, longest = seconds
    endless = dataclasses.replace(training, steps=10**9, eval_interval=10**9)
    trainer = _trainer(model, endless, ids, tokenizer, backend)
    started = time.perf_counter()

    def enough() -> bool:
        taken = time.perf_counter() - started
        return taken > longest or (trainer.progress.step >= 4 and taken > usual)

    events = list(trainer.run(enough))
    if isinstance(events[-1], End) and events[-1].outcome is Outcome.DIVERGED:
        raise RequestError(f"it diverges at step {events[-1].step + 1}: lower the learning rate (--lr, now {training.lr:g})")
    times = [event.seconds for event in events if isinstance(event, Step)]
    return _Timed(candidate, model, training, statistics.median(times[2:] or times[-1:]))


def _evaluations(
    best: _Timed, ids: np.ndarray, tokenizer: CharTokenizer, backend: Backend, seconds: float, fixed_tokens: int | None
) -> tuple[float, int]:
    """(seconds of one evaluation, how many tokens it may look at; 0: all), from two short ones."""
    few, more = 2048, 16_384
    if best.step_seconds > FOR_TIMING * seconds:  # a guess has to do: forward is a third of a step
        return best.step_seconds, few if fixed_tokens is None else fixed_tokens
    taken = []
    for eval_tokens in (few, more):
        once = dataclasses.replace(best.training, steps=1, eval_interval=1, eval_tokens=eval_tokens, processes=False)
        events = list(_trainer(best.model, once, ids[-LONGEST_TIMED:], tokenizer, backend).run())
        taken += [event.seconds for event in events if isinstance(event, Evaluation)]
    if len(taken) < 2:
        raise RequestError(f"it diverges in one step: lower the learning rate (--lr, now {best.training.lr:g})")
    a_token = max(1e-9, (taken[1] - taken[0]) / (more - few))
    held_out = int(len(ids) * best.training.val_fraction)
    if fixed_tokens is None:
        affordable = int(FOR_EVALUATIONS * seconds / EVALUATIONS / a_token)
        eval_tokens = max(few, min(TrainConfig().eval_tokens, affordable))
    else:
        eval_tokens = fixed_tokens
    looked_at = held_out if eval_tokens == 0 else min(eval_tokens, held_out)
    return max(taken[0], taken[0] + a_token * (looked_at - few)), eval_tokens


def _trainer(model: GPTConfig, training: TrainConfig, ids: np.ndarray, tokenizer: CharTokenizer, backend: Backend) -> Trainer:
    dataset = Dataset(ids, model.block_size, training.batch_size, training.val_fraction, training.seed)
    return Trainer(GPT(model, seed=training.seed, backend=backend), tokenizer, dataset, training)


def _in_short(timed: _Timed) -> str:
    m, t = timed.model, timed.training
    return f"n_layer {m.n_layer}, n_embd {m.n_embd}, {t.batch_size} x {m.block_size} tokens, lr {t.lr:g}"
