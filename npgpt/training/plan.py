"""Choosing what to train in a given time.

Each candidate is a configuration with the losses that it reached on tiny Shakespeare. `plan` times some steps of each
candidate on this machine and this text. From that it computes how many steps fit into the time. It takes the candidate
with the lowest expected loss at that number. The models trained here are thrown away. No flags are parsed here.
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
from npgpt.parallel.processes import processes_pay_off
from npgpt.text.corpus import Corpus
from npgpt.training.events import End, Evaluation, Outcome, Step
from npgpt.training.memory import check_memory, estimate_memory
from npgpt.training.trainer import Trainer

EVALUATIONS = 8  # evaluations in a run; fewer if they would take more than EVALUATION_SHARE
EVALUATION_SHARE = 0.08  # the largest share of the time for evaluations
TIMING_SHARE = 0.02  # the largest share of the time for timing the chosen candidate
RESERVE = 0.02  # the share of the time for checkpoints and everything that is not timed here
MAX_TIMED_CHARACTERS = 1 << 22  # a longer text is cut for timing
CANDIDATE_SETTINGS = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "lr", "dropout", "position", "optimizer")


@dataclass(frozen=True)
class Candidate:
    """Settings, and the validation losses they reached on tiny Shakespeare, each in a run of its own."""

    settings: dict[str, Any]
    reached: tuple[tuple[int, float], ...]  # (steps, loss), in the order of the steps

    def expected_loss(self, steps: int) -> float | None:
        """The loss after a run of `steps` steps: interpolated in log(steps), constant beyond the last measurement.

        None if `steps` is below the first measurement.
        """
        if steps < self.reached[0][0]:
            return None
        measured, losses = zip(*self.reached, strict=True)
        return float(np.interp(np.log(steps), np.log(measured), losses))


LEARNS_FAST = {"position": "rotary", "optimizer": "muon"}
# About sixty configurations were trained for 20 seconds to 5 minutes on two cores, some for longer. These are the fastest
# learners (docs/performance.md). The last candidate is nanoGPT's configuration for a GPU, with its published loss.
CANDIDATES = (
    Candidate(
        {"n_layer": 1, "n_embd": 128, "block_size": 128, "batch_size": 8, "lr": 1.6e-2, **LEARNS_FAST},
        ((100, 2.30), (850, 1.723)),
    ),
    Candidate(
        {"n_layer": 2, "n_embd": 128, "block_size": 128, "batch_size": 8, "lr": 8e-3, **LEARNS_FAST},
        ((300, 1.969), (1500, 1.583), (3000, 1.525), (8000, 1.465)),
    ),
    Candidate(
        {"n_layer": 3, "n_head": 6, "n_embd": 192, "block_size": 256, "batch_size": 8, "lr": 8e-3, **LEARNS_FAST},
        ((1600, 1.466), (9500, 1.426)),
    ),
    Candidate({k: v for k, v in PRESETS["char"].items() if k in CANDIDATE_SETTINGS}, ((5000, 1.470),)),
)


@dataclass(frozen=True)
class Plan:
    """What to train, and the reasons in two lines."""

    model: GPTConfig
    training: TrainConfig
    reasons: tuple[str, str]


@dataclass(frozen=True)
class _Timed:
    """A candidate, its configurations for this text, and the measured time of a step."""

    candidate: Candidate
    model: GPTConfig
    training: TrainConfig
    step_seconds: float

    def steps_in(self, seconds: float) -> int:
        return int(seconds / self.step_seconds)

    def epochs(self, steps: int, n_ids: int) -> float:
        """How many times a run of `steps` steps reads the training part of a text of n_ids tokens."""
        tokens = steps * self.training.batch_size * self.model.block_size
        return tokens / (n_ids * (1 - self.training.val_fraction))

    def __str__(self) -> str:
        m, t = self.model, self.training
        return f"n_layer {m.n_layer}, n_embd {m.n_embd}, {t.batch_size} x {m.block_size} tokens, lr {t.lr:g}"


def plan(
    until: float,
    corpus: Corpus,
    backend: Backend,
    fixed: Mapping[str, Any],
    candidates: tuple[Candidate, ...] = CANDIDATES,
) -> Plan:
    """Choose the model, the batch, the learning rate and the number of steps for a run on `corpus` that ends at `until`.

    until: a time of `time.perf_counter`. fixed: settings that the user has chosen; they are kept.

    Raises RequestError if there is no time for a step, or if no candidate fits the text and the fixed settings.
    """
    seconds = until - time.perf_counter()
    if fixed.get("processes") is None:
        fixed = {
            **fixed,
            "processes": processes_pay_off(seconds),
        }  # the same rule as in the run, so that timing uses the same workers
    planner = _Planner(seconds, corpus, backend, fixed)
    choices = planner.time_candidates(candidates)
    best = planner.with_dropout(choices[0][1])
    usual = min(20.0, TIMING_SHARE * seconds)
    best = planner.time(best.candidate, best.model, best.training, (usual, TIMING_SHARE * seconds))
    best = planner.with_dropout(best)  # the number of steps is known better now
    evaluation_seconds, eval_tokens = planner.time_evaluations(best)
    steps, eval_interval = _steps_and_interval(
        best, until - time.perf_counter() - RESERVE * seconds, seconds, evaluation_seconds, fixed.get("eval_interval")
    )
    training = dataclasses.replace(
        best.training,
        processes=fixed["processes"],
        steps=steps,
        warmup_steps=fixed.get("warmup_steps", min(100, steps // 10)),
        eval_interval=eval_interval,
        eval_tokens=eval_tokens,
    )
    return Plan(best.model, training, _reasons(choices, best, training, fixed, best.epochs(steps, len(corpus.ids))))


# The dropout that reached the lowest validation loss, by parameters times epochs, in millions: two blocks of 128 on texts of a
# million and of a hundred thousand characters (docs/performance.md).
DROPOUTS = ((5.0, 0.0), (7.3, 0.1), (15.0, 0.15), (40.0, 0.2))


def dropout_for(epochs: float, parameters: int) -> float:
    """The dropout for a model with `parameters` parameters that reads its text `epochs` times: interpolated in DROPOUTS."""
    measured, dropouts = zip(*DROPOUTS, strict=True)
    return round(float(np.interp(np.log(max(1e-9, epochs * parameters / 1e6)), np.log(measured), dropouts)), 2)


class _Planner:
    """Measures how long a step of each candidate takes, for one text, one machine and `seconds` of training."""

    def __init__(self, seconds: float, corpus: Corpus, backend: Backend, fixed: Mapping[str, Any]) -> None:
        self._seconds, self._corpus, self._backend, self._fixed = seconds, corpus, backend, fixed

    def time_candidates(self, candidates: tuple[Candidate, ...]) -> list[tuple[float, _Timed]]:
        """(expected loss, timed candidate) for each candidate that fits, the best first.

        The expected loss is infinite if it was not measured for so few steps. Raises RequestError if no candidate fits.
        """
        choices: list[tuple[float, _Timed]] = []
        refused = RequestError(f"no step fits into {self._seconds:.2g} s; raise --minutes")
        for candidate in candidates:
            try:
                model, training = self._configs(candidate)
                if choices and not self._is_fast_enough(candidate, model, training, choices[-1][1]):
                    continue
                if self._backend.is_cpu:
                    check_memory(model, training)
                timed = self.time(candidate, model, training, (0.002 * self._seconds, 0.02 * self._seconds))
            except RequestError as error:  # the candidate does not fit the fixed settings or the text
                refused = error
                continue
            expected = candidate.expected_loss(timed.steps_in((1 - EVALUATION_SHARE) * self._seconds))
            if expected is not None or not choices:
                choices.append((math.inf if expected is None else expected, timed))
        if not choices:
            raise refused
        return sorted(choices, key=lambda choice: choice[0])

    def with_dropout(self, timed: _Timed) -> _Timed:
        """The candidate with a dropout for its number of epochs. A dropout from the user or the candidate is kept."""
        if "dropout" in self._fixed or "dropout" in timed.candidate.settings:
            return timed
        epochs = timed.epochs(timed.steps_in(self._seconds), len(self._corpus.ids))
        dropout = dropout_for(epochs, timed.model.num_parameters())
        return dataclasses.replace(timed, model=dataclasses.replace(timed.model, dropout=dropout))

    def time(self, candidate: Candidate, model: GPTConfig, training: TrainConfig, seconds: tuple[float, float]) -> _Timed:
        """Measure the time of a step. seconds: (usual, longest) time for the measurement.

        The first two steps do not count. Timing stops after the usual time and four steps, or after the longest time.
        """
        usual, longest = seconds
        endless = dataclasses.replace(training, steps=10**9, eval_interval=10**9)
        trainer = self._trainer(model, endless)
        started = time.perf_counter()

        def enough() -> bool:
            taken = time.perf_counter() - started
            return taken > longest or (trainer.progress.step >= 4 and taken > usual)

        events = list(trainer.run(enough))
        if isinstance(events[-1], End) and events[-1].outcome is Outcome.DIVERGED:
            raise RequestError(
                f"training diverges at step {events[-1].step + 1}: lower the learning rate (--lr, now {training.lr:g})"
            )
        times = [event.seconds for event in events if isinstance(event, Step)]
        return _Timed(candidate, model, training, statistics.median(times[2:] or times[-1:]))

    def time_evaluations(self, best: _Timed) -> tuple[float, int]:
        """(seconds of one evaluation, the number of tokens it may use; 0: all). Two short evaluations are timed."""
        few, more = 2048, 16_384
        fixed_tokens = self._fixed.get("eval_tokens")
        if best.step_seconds > TIMING_SHARE * self._seconds:  # no time for this; a step takes longer than an evaluation
            return best.step_seconds, few if fixed_tokens is None else fixed_tokens
        taken = []
        for eval_tokens in (few, more):
            once = dataclasses.replace(best.training, steps=1, eval_interval=1, eval_tokens=eval_tokens, processes=False)
            events = list(self._trainer(best.model, once).run())
            taken += [event.seconds for event in events if isinstance(event, Evaluation)]
        if len(taken) < 2:
            raise RequestError(f"training diverges in one step: lower the learning rate (--lr, now {best.training.lr:g})")
        token_seconds = max(1e-9, (taken[1] - taken[0]) / (more - few))
        held_out = self._corpus.number_held_out(best.training.val_fraction)
        if fixed_tokens is None:
            affordable = int(EVALUATION_SHARE * self._seconds / EVALUATIONS / token_seconds)
            eval_tokens = max(few, min(TrainConfig().eval_tokens, affordable))
        else:
            eval_tokens = fixed_tokens
        evaluated = held_out if eval_tokens == 0 else min(eval_tokens, held_out)
        return max(taken[0], taken[0] + token_seconds * (evaluated - few)), eval_tokens

    def _configs(self, candidate: Candidate) -> tuple[GPTConfig, TrainConfig]:
        settings = {"dropout": 0.0, "min_lr": 0.0, "patience": 0} | candidate.settings | dict(self._fixed)
        of_model = {f.name for f in dataclasses.fields(GPTConfig)}
        width, heads = (settings.get(name, getattr(GPTConfig(1), name)) for name in ("n_embd", "n_head"))
        if width // heads % 2 and "position" not in self._fixed:  # the user's width does not allow rotary positions
            settings["position"] = "learned"
        return (
            GPTConfig(vocab_size=self._corpus.tokenizer.vocab_size, **{k: v for k, v in settings.items() if k in of_model}),
            TrainConfig(**{k: v for k, v in settings.items() if k not in of_model}),
        )

    def _is_fast_enough(self, candidate: Candidate, model: GPTConfig, training: TrainConfig, last: _Timed) -> bool:
        """Whether the shortest measured run of this candidate fits into 1.5 times the time.

        The time of a step is estimated from the last timed candidate, in proportion to parameters times tokens.
        """

        def work(model: GPTConfig, training: TrainConfig) -> float:
            return model.num_parameters() * model.block_size * training.batch_size

        step_seconds = last.step_seconds * work(model, training) / work(last.model, last.training)
        return candidate.reached[0][0] * step_seconds < 1.5 * self._seconds

    def _trainer(self, model: GPTConfig, training: TrainConfig) -> Trainer:
        corpus = self._corpus.beginning(MAX_TIMED_CHARACTERS)
        gpt = GPT(model, seed=training.seed, backend=self._backend)
        return Trainer(gpt, corpus.tokenizer, corpus.dataset(model.block_size, training), training)


def _steps_and_interval(
    best: _Timed, seconds_left: float, seconds: float, evaluation_seconds: float, fixed_interval: int | None
) -> tuple[int, int]:
    """(steps, eval_interval) for the time that is left of `seconds`. Raises RequestError if there is no time for a step."""
    if fixed_interval is not None:
        steps, interval = int(seconds_left / (best.step_seconds + evaluation_seconds / fixed_interval)), fixed_interval
    else:
        evaluations = max(1, min(EVALUATIONS, int(EVALUATION_SHARE * seconds / evaluation_seconds)))
        steps = best.steps_in(seconds_left - evaluations * evaluation_seconds)
        interval = -(-steps // evaluations)
    if steps < 1:
        raise RequestError(f"a step takes {best.step_seconds:.2g} s, and no time for one is left after timing; raise --minutes")
    return steps, interval


def _reasons(
    choices: list[tuple[float, _Timed]], best: _Timed, training: TrainConfig, fixed: Mapping[str, Any], epochs: float
) -> tuple[str, str]:
    why = str(best)
    if fixed.keys() & set(CANDIDATE_SETTINGS):
        why += ": your settings; the others are from a measured candidate"
    elif math.isinf(choices[0][0]):
        why += ": the fastest candidate; its loss after so few steps was not measured"
    else:
        others = [f"{timed}: {loss:.2f}" for loss, timed in choices[1:2]]
        why += f": expected loss {choices[0][0]:.2f} on tiny Shakespeare" + (f" ({', '.join(others)})" if others else "")
        why += "; another text or tokenizer has another loss"
    megabytes = estimate_memory(best.model, training) / 1e6
    return (
        why,
        f"a step takes {1e3 * best.step_seconds:.3g} ms here; the run reads the text {epochs:.1f} times; dropout is "
        f"{best.model.dropout:g}; it needs about {megabytes:,.0f} MB of memory",
    )
