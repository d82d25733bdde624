"""The training loop: what happens in a step, at an evaluation, at the end.

A `Trainer` owns one run. Its `run()` does the work (steps, evaluations, checkpoints, log) and yields what
happened as plain records; showing them to people is the commands' business. The command line is not known
here, and no state is global.

Files of a run whose checkpoint is `model.npz`:

    model.npz        the weights with the lowest validation loss so far
    model.last.npz   the state at the last evaluation or interruption, from which a run is resumed
    model.jsonl      the log: one JSON object per line
    model.crash.npz  after a loss or gradient that was not finite: that step, to be repeated with `replay`

What the run before left under these names is kept as `model.previous.npz` and so on. While a run lasts,
`.model.npz.lock` keeps a second one from writing the same files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npgpt.config.fields import RequestError
from npgpt.config.settings import GenerateConfig, GPTConfig, TrainConfig
from npgpt.engine.backend import bfloat16
from npgpt.evaluation.loss import evaluate
from npgpt.generation.generate import generate_text
from npgpt.model.gpt import GPT
from npgpt.parallel.machine import machine
from npgpt.parallel.processes import Processes
from npgpt.parallel.step import ParallelStep
from npgpt.parallel.workers import Workers
from npgpt.storage import checkpoint
from npgpt.storage.checkpoint import Checkpoint
from npgpt.storage.files import copy_whole, lock, remove_leftovers, whole_file
from npgpt.text.characters import CharTokenizer
from npgpt.text.dataset import Dataset
from npgpt.training.optim import AdamW, Update, learning_rate

STEPS_BEFORE_PROCESSES = 10  # by then it is known how long a step takes
SECONDS_FOR_PROCESSES = 10.0  # to come, for starting them to pay
# On a GPU the losses of several steps are asked for at once: of at most so many steps, as take about so many seconds; the
# first steps of a run, in which kernels are compiled, one by one.
STEPS_IN_A_ROW, SECONDS_IN_A_ROW, FIRST_STEPS = 10, 0.25, 4
LONGEST_HISTORY = 10_000  # evaluations a checkpoint remembers; the log has all of them


@dataclass(frozen=True)
class Step:
    """One optimiser step. `step` counts from 1; `loss` is the batch's mean cross-entropy, dropout on."""

    step: int
    loss: float
    grad_norm: float  # before clipping
    lr: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """The state of the run at one step. `train_loss` is the mean over the steps since the last evaluation."""

    step: int
    train_loss: float
    val_loss: float | None  # over the held-out tokens, at most `eval_tokens` of them; None when none are held out
    val_stderr: float | None
    best: bool  # the lowest validation loss so far
    sample: str
    seconds: float


class Outcome(enum.Enum):
    """Why a run ended."""

    FINISHED = "finished"
    EARLY_STOP = "stopped early: no better validation loss for a while"
    INTERRUPTED = "interrupted"
    DIVERGED = "diverged: the loss or its gradient is no longer a finite number"


@dataclass(frozen=True)
class End:
    """The last record of a run."""

    step: int
    outcome: Outcome
    advice: str
    reason: str = ""  # of a run that diverged: what was not finite, and where it came from


@dataclass
class Progress:
    """Where a run stands: with the weights and the optimiser, all that resuming needs."""

    step: int = 0  # steps done
    best_step: int = 0
    best_loss: float | None = None
    stale_evaluations: int = 0  # since the best one
    loss_sum: float = 0.0  # of the steps since the last evaluation
    loss_count: int = 0
    # One row per evaluation: step, train_loss, val_loss, val_stderr.
    history: list[list[Any]] = field(default_factory=list)


class Trainer:
    """One training run of a model on a dataset, writing to `out` (a path ending in `.npz`; None writes nothing)."""

    def __init__(
        self,
        model: GPT,
        tokenizer: CharTokenizer,
        dataset: Dataset,
        config: TrainConfig,
        out: str | Path | None = None,
        source: str | None = None,
    ) -> None:
        """source: the name of the text, for the checkpoint."""
        self.model, self.tokenizer, self.dataset, self.config = model, tokenizer, dataset, config
        self.out, self.source = None if out is None else Path(out), source
        if self.out and self.out.suffix != ".npz":
            raise RequestError(f"out must end in .npz, got {self.out}")
        if config.device not in ("auto", model.backend.name):
            raise RequestError(f"the run is to be on {config.device!r}, and the model is on {model.backend.name!r}")
        self.fingerprint = dataset.fingerprint()
        for name in ("batch_size", "seed", "block_size"):
            expected = model.config.block_size if name == "block_size" else getattr(config, name)
            if getattr(dataset, name) != expected:
                raise RequestError(
                    f"the dataset's {name} is {getattr(dataset, name)}, the run's is {expected}; they must agree"
                )
        if int(dataset.ids.max(initial=0)) >= model.config.vocab_size:
            raise RequestError(
                f"the dataset's ids go up to {dataset.ids.max()}, the model knows 0..{model.config.vocab_size - 1}; "
                "encode the text with the model's own tokenizer"
            )
        self.progress = Progress()
        self._started = time.perf_counter()
        self._begun = False  # whether the files at `out` are of this run
        self._saved: int | None = None  # the step of the state there, when it is of this run
        self._evaluation_due = False
        device, self._on_cpu = model.backend.name, model.backend.name == "cpu"
        self._workers = Workers(config.threads if self._on_cpu else 1)
        for name, wanted in (("bf16", config.bf16), ("tf32", config.tf32)):
            if wanted and self._on_cpu:
                raise RequestError(
                    f"{name} is for a GPU, and this run is on the CPU: --no-{name}, or --device cuda to see what is missing"
                )
            device += f", {name}" if wanted else ""
        dtype = bfloat16() if config.bf16 else None
        self.machine = machine(device, self._workers.threads)
        self._forward_backward = ParallelStep(model, self._workers, config.micro_batch, dtype, config.tf32)
        self.optimizer = AdamW(model.parameters(), config.lr, (config.beta1, config.beta2), weight_decay=config.weight_decay)
        self._update = Update(self.optimizer, config.grad_clip or math.inf)

    def resume(self, last: Checkpoint, elsewhere: bool = False) -> list[str]:
        """Continue where `last` (loaded with its optimiser) stopped. Returns what is different about the machine, and
        makes the same seed give other bytes: the number of threads, NumPy, the BLAS, the device.

        elsewhere: `last` is not the state of the run at `out`; what that one left is kept as at a new start, and the
        best loss is looked for anew. Raises RequestError, naming the difference, when `last` comes from another text,
        vocabulary or configuration. What changes neither a step nor what is called best may differ, and so may the
        number of steps.
        """
        if last.optimizer_state is None or last.train_config is None:
            raise RequestError(
                "this checkpoint holds no training state to resume from: that is in a run's NAME.last.npz, and is read by "
                "load(path, with_optimizer=True)"
            )
        differing = _differences(last.config, self.model.config)
        of_the_run = ("steps", "eval_interval", "patience", "log_interval", "sample_tokens")
        of_the_machine = ("threads", "processes", "device", "tf32", "bf16")
        differing += _differences(last.train_config, self.config, ignore=of_the_run + of_the_machine)
        if last.tokenizer != self.tokenizer or last.fingerprint != self.fingerprint:
            where = f" ({last.source}, as it was then)" if last.source else ""
            differing.insert(0, f"the text is not the one it was trained on{where}")
        if differing:
            raise RequestError("cannot resume: " + "; ".join(differing) + ". Start a new run, or go back to what it was")
        if last.step >= self.config.steps:
            raise RequestError(f"nothing to do: the run is at step {last.step} already; ask for more than that with --steps")
        try:
            progress = Progress(**last.progress)
            self.optimizer.load_state_dict(last.optimizer_state)
        except (TypeError, ValueError) as error:
            raise RequestError(f"cannot resume: the checkpoint's training state is damaged ({error})") from None
        self.model.load_state_dict(last.model.state_dict())
        self.progress, self._evaluation_due = progress, False
        self._begun, self._saved = not elsewhere, None if elsewhere else progress.step
        before = last.machine or self.machine
        return [
            f"{key} was {before.get(key)} and is now {value}" for key, value in self.machine.items() if before.get(key) != value
        ]

    def run(self, stop_requested: Callable[[], bool] = lambda: False) -> Iterator[Step | Evaluation | End]:
        """Train to the end; called again, after somebody has left in between, go on. `stop_requested` is asked after every
        step (on a GPU, after those of a quarter of a second); when it says yes, the state is saved and the run ends. Raises
        OSError when a file cannot be written."""
        self._started = time.perf_counter()
        with lock(lock_path(self.out), str(self.out)) if self.out else contextlib.nullcontext():
            yield from self._run(stop_requested)

    def _run(self, stop_requested: Callable[[], bool]) -> Iterator[Step | Evaluation | End]:
        p, config = self.progress, self.config
        if self.out:
            for path in files_of(self.out):
                remove_leftovers(path)
            state = last_path(self.out)
            state_step = checkpoint.step_of(state) if self._begun and state.exists() else None
            if self._begun and state_step is not None and state_step != self._saved:
                raise RequestError(f"another run has gone on from {state} meanwhile; start again with --resume")
            if not self._begun or (state_step is None and self._saved is not None):
                for path in files_of(self.out):
                    if path.exists():
                        path.replace(path.with_name(path.name.replace(self.out.stem, f"{self.out.stem}.previous", 1)))
                p.best_loss, p.best_step, p.stale_evaluations = None, 0, 0
            elif self._saved is not None and not self.out.exists():
                # Somebody has taken it away: the next evaluation gives the best there is.
                p.best_loss, p.best_step, p.stale_evaluations = None, 0, 0
            elif self._saved == p.step == p.best_step:  # it may have been killed between the two files of a save
                self._save(best=True)
            self._begun = True
        self._log("start" if p.step == 0 else "resume", {"step": p.step, "config": dataclasses.asdict(config)})
        with self._workers, contextlib.closing(self._forward_backward):
            outcome = yield from self._steps(stop_requested)
            reason = self._crash() if outcome is Outcome.DIVERGED else ""
        end = End(p.step, outcome, advice(p, config, self.model.config, outcome), reason)
        self._log("end", {"step": end.step, "outcome": outcome.name.lower(), "advice": end.advice, "reason": reason})
        yield end

    def _crash(self) -> str:
        """Find out why the next step's loss or gradient is not finite, and write what is needed to repeat it."""
        x, y = self.dataset.get_batch("train", self.progress.step)
        reason = self._forward_backward.diagnose(x, y, self.config.seed, self.progress.step)
        if self.out:
            try:
                self._write(crash_path(self.out), crash=reason, batch=(x, y))
            except OSError as error:  # the reason must not be lost with it
                return f"{reason} (and {crash_path(self.out)} could not be written: {error.strerror})"
        return reason

    def _steps(self, stop_requested: Callable[[], bool]) -> Generator[Step | Evaluation, None, Outcome]:
        """Steps and evaluations until something ends them; returns what."""
        p, config = self.progress, self.config
        seconds: list[float] = []
        while p.step < config.steps or self._evaluation_due:
            if not self._evaluation_due:  # else somebody has left in between
                self._use_processes(seconds)
                for step in self._take(self._steps_in_a_row(seconds)):
                    if len(seconds) <= STEPS_BEFORE_PROCESSES:
                        seconds.append(step.seconds)
                    if not (math.isfinite(step.loss) and math.isfinite(step.grad_norm)):
                        return Outcome.DIVERGED  # the weights were left alone
                    if step.step % config.log_interval == 0:
                        self._log("step", dataclasses.asdict(step))
                    yield step
            stop = stop_requested()
            if self._evaluation_due:
                evaluation = self._evaluate()
                if evaluation is None:
                    return Outcome.DIVERGED
                self._evaluation_due = False
                yield evaluation
                if config.patience and p.stale_evaluations >= config.patience and p.step < config.steps:
                    return Outcome.EARLY_STOP
            elif stop:
                self._save()
            if stop and p.step < config.steps:
                return Outcome.INTERRUPTED
        return Outcome.FINISHED

    def _steps_in_a_row(self, seconds: list[float]) -> int:
        """How many steps to take before their losses are asked for; `seconds` are those of steps so far."""
        if self._on_cpu or len(seconds) < FIRST_STEPS:
            return 1
        p, config = self.progress, self.config
        to_evaluation = min(config.eval_interval - p.step % config.eval_interval, config.steps - p.step)
        return max(1, min(STEPS_IN_A_ROW, to_evaluation, int(SECONDS_IN_A_ROW / max(seconds[-1], 1e-9))))

    def _use_processes(self, seconds: list[float]) -> None:
        """Change to worker processes where that was asked for, or will pay; `seconds` are those of the steps so far."""
        asked = self.config.processes
        if asked is None and len(seconds) == STEPS_BEFORE_PROCESSES:
            to_come = statistics.median(seconds) * (self.config.steps - self.progress.step)
            asked = to_come > SECONDS_FOR_PROCESSES
        elif seconds:  # it was decided before
            return
        if asked and self._workers.threads > 1:
            try:
                self._forward_backward.use(Processes)
            except OSError as error:
                warnings.warn(f"no worker processes ({error}); going on with threads", RuntimeWarning, stacklevel=2)

    def _take(self, n: int) -> list[Step]:
        """The next n steps: batch, forward, backward, clip, update. They end with the first whose loss or gradient is not
        finite, which has updated nothing."""
        started = time.perf_counter()
        p, config = self.progress, self.config
        assert config.min_lr is not None  # filled in by TrainConfig
        rates: list[float] = []
        steps: list[Step] = []
        try:
            for number in range(p.step, p.step + n):
                x, y = self.dataset.get_batch("train", number, self.model.backend)
                loss = self._forward_backward(x, y, config.seed, number)
                self.optimizer.lr = learning_rate(
                    number,
                    steps=config.steps,
                    lr=config.lr,
                    min_lr=config.min_lr,
                    warmup_steps=config.warmup_steps,
                    schedule=config.schedule,
                )
                rates.append(self.optimizer.lr)
                self._update.step(loss, self._workers.over)
        finally:  # whatever happened, those that were taken count
            results = self._update.results()
            seconds = (time.perf_counter() - started) / n
            tokens = config.batch_size * self.model.config.block_size
            for (loss, grad_norm), lr in zip(results, rates, strict=False):
                if math.isfinite(loss) and math.isfinite(grad_norm):
                    p.step += 1
                    self._evaluation_due = p.step % config.eval_interval == 0 or p.step == config.steps
                    p.loss_sum += loss
                    p.loss_count += 1
                steps.append(Step(p.step, loss, grad_norm, lr, tokens, seconds))
        return steps

    def _evaluate(self) -> Evaluation | None:
        """Exact validation loss, a checkpoint, a sample; None, and nothing written, when the weights or the loss
        are no longer finite numbers."""
        started = time.perf_counter()
        p = self.progress
        train_loss = p.loss_sum / max(1, p.loss_count)
        p.loss_sum, p.loss_count = 0.0, 0
        held_out = None
        if len(self.dataset.val) > 1:
            held_out = evaluate(self.model, self.dataset.val, self._workers, self.config.eval_tokens or None)
        val_loss, val_stderr = (held_out.loss, held_out.stderr) if held_out else (None, None)
        try:
            sample = self._sample()
        except FloatingPointError:
            return None
        if not (bool(self.model.backend.xp.isfinite(self.model.flat.data).all()) and math.isfinite(val_loss or 0.0)):
            return None
        best = val_loss is None or p.best_loss is None or val_loss < p.best_loss
        if best:
            p.best_loss, p.best_step, p.stale_evaluations = val_loss, p.step, 0
        else:
            p.stale_evaluations += 1
        p.history.append([p.step, train_loss, val_loss, val_stderr])
        del p.history[:-LONGEST_HISTORY]
        self._save(best)
        result = Evaluation(p.step, train_loss, val_loss, val_stderr, best, sample, time.perf_counter() - started)
        self._log("evaluation", dataclasses.asdict(result))
        return result

    def _sample(self) -> str:
        """A short text from the model as it is. Drawn from a stream of its own, so looking changes nothing in the run."""
        settings = GenerateConfig(max_new_tokens=self.config.sample_tokens, seed=self.config.seed)
        return "".join(generate_text(self.model, self.tokenizer, "", settings, sample=self.progress.step))

    def _save(self, best: bool = False) -> None:
        """Write the resumable state and, when these are the best weights so far, the run's checkpoint."""
        if self.out:
            self._write(last_path(self.out))
            self._saved = self.progress.step
            # Interrupted before the first evaluation, a run still leaves a model.
            if best or not self.out.exists():
                copy_whole(last_path(self.out), self.out)

    def _write(self, path: Path, **more: Any) -> None:
        checkpoint.save(
            path,
            self.model,
            self.tokenizer,
            optimizer=self.optimizer,
            train_config=self.config,
            progress=dataclasses.asdict(self.progress),
            source=self.source,
            fingerprint=self.fingerprint,
            machine=self.machine,
            **more,
        )

    def _log(self, event: str, values: dict[str, Any]) -> None:
        if self.out:
            path = log_path(self.out)
            if event == "resume" and path.exists():
                _cut_log(path, self.progress.step)
            with path.open("w" if event == "start" else "a", encoding="utf-8", newline="\n") as log:
                elapsed = {"elapsed": round(time.perf_counter() - self._started, 3)}  # seconds since start or resume
                log.write(json.dumps({"event": event} | values | elapsed, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------- files of a run


def last_path(out: Path) -> Path:
    """Where the resumable state of a run is: model.npz -> model.last.npz."""
    return out.with_name(f"{out.stem}.last{out.suffix}")


def log_path(out: Path) -> Path:
    """Where the log of a run is: model.npz -> model.jsonl."""
    return out.with_suffix(".jsonl")


def crash_path(out: Path) -> Path:
    """Where a step that went wrong is: model.npz -> model.crash.npz."""
    return out.with_name(f"{out.stem}.crash{out.suffix}")


def lock_path(out: Path) -> Path:
    """model.npz -> .model.npz.lock."""
    return out.with_name(f".{out.name}.lock")


def files_of(out: Path) -> list[Path]:
    """All files of a run."""
    return [out, last_path(out), log_path(out), crash_path(out)]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The events of a run's log; none when there is no log. Lines that are not whole are left out."""
    events = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("event"), str) and isinstance(event.get("step"), int):
                events.append(event)
    return events


def _cut_log(path: Path, step: int) -> None:
    """Take from a log what came after `step`, which is about to be done again, and half a line of a killed process."""
    kept = [json.dumps(event, ensure_ascii=False) + "\n" for event in read_log(path) if event["step"] <= step]
    with whole_file(path, lambda _: None) as file:
        file.write("".join(kept).encode())


def _differences(before: Any, now: Any, ignore: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{f.name} was {getattr(before, f.name)} and is now {getattr(now, f.name)}"
        for f in dataclasses.fields(before)
        if f.name not in ignore and getattr(before, f.name) != getattr(now, f.name)
    ]


# ---------------------------------------------------------------- what a run showed


def advice(progress: Progress, config: TrainConfig, model: GPTConfig, outcome: Outcome) -> str:
    """One line: what the losses say, and the one thing to change next."""
    lower = f"lower the learning rate (--lr {min(config.lr / 3, 1e-3):.1g}, it was {config.lr:g})"
    if outcome is Outcome.DIVERGED:
        return f"Something grew beyond all numbers after step {progress.step}: start again, {lower} or warm up longer."
    rows = progress.history
    if outcome is Outcome.INTERRUPTED:
        return ""
    if len(rows) < 2:
        return "One evaluation is too little to judge by: train longer (--steps) or evaluate more often (--eval-interval)."
    first_train, last_train = rows[0][1], rows[-1][1]
    if last_train > math.log(model.vocab_size) + 0.1:
        return f"The training loss, {last_train:.2f}, is worse than guessing ({math.log(model.vocab_size):.2f}): {lower}."
    if last_train > first_train + 0.1:
        return f"The training loss rose from {first_train:.2f} to {last_train:.2f}: it diverged; {lower}."
    # Judge by the loss that matters: held-out where there is one.
    losses = [row[1] if row[2] is None else row[2] for row in rows]
    best, last, noise = min(losses), losses[-1], rows[-1][3] or 0.0
    if rows[-1][2] is not None and last > best + max(0.01 * best, 0.5 * noise):
        return (
            f"Over-fitting since step {progress.best_step}: the validation loss rose from {best:.2f} to {last:.2f} while the "
            f"training loss fell to {last_train:.2f}. More text helps most; else more dropout (--dropout "
            f"{min(0.5, model.dropout + 0.1):.1f}) or a smaller model."
        )
    middle = losses[(len(losses) - 1) // 2]
    which = "training" if rows[-1][2] is None else "validation"
    if last < middle - 0.02 * middle or (len(rows) < 4 and last == best):
        return f"The {which} loss was still falling at the end: train longer (--resume --steps {2 * config.steps})."
    return (
        f"The {which} loss has levelled off at {best:.2f}: more steps alone will help little; change one thing, such as a "
        f"larger model (--n-embd {2 * model.n_embd}) or a longer context (--block-size {2 * model.block_size})."
    )
