"""The training loop: steps, evaluations, checkpoints, the end of a run.

`Trainer.run()` does the work and yields a record of each event (events.py). The commands show the records. There is no command
line here, and no global state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from npgpt.config.fields import RequestError
from npgpt.config.settings import GenerateConfig, TrainConfig
from npgpt.evaluation.loss import Loss, evaluate
from npgpt.generation.generate import generate_text
from npgpt.model.gpt import GPT
from npgpt.parallel.machine import describe_machine
from npgpt.parallel.processes import Processes, processes_pay_off
from npgpt.parallel.ranks import ONE_RANK, Ranks
from npgpt.parallel.shield import Shield
from npgpt.parallel.step import ALL_FINITE, ParallelStep
from npgpt.parallel.workers import Workers
from npgpt.storage.checkpoint import Checkpoint, save
from npgpt.storage.header import Progress
from npgpt.storage.run import RunFiles
from npgpt.text.dataset import Dataset
from npgpt.text.record import TextRecord
from npgpt.text.tokenizer import Tokenizer, text_size
from npgpt.training.advice import advice
from npgpt.training.checks import check_arguments, check_ranks
from npgpt.training.events import End, Evaluation, Events, Outcome, Step
from npgpt.training.muon import optimizer_for
from npgpt.training.optim import Update, learning_rate
from npgpt.training.resumption import Changes, changes_since

STEPS_BEFORE_PROCESSES = 10  # after these steps the time of a step is known
# On a GPU, losses are read in groups of up to 10 steps or about 0.25 s. The first steps, which compile kernels, are read
# one by one.
STEPS_IN_GROUP, SECONDS_IN_GROUP, FIRST_STEPS = 10, 0.25, 4


class Trainer:
    """One training run of a model on a dataset.

    `out` is the path of the checkpoint, which must end in .npz; the other files of the run are beside it (storage/run.py).
    With None nothing is written. `sources` and `val_sources` say where the text and a held-out text of its own came from, for
    the checkpoint. `pretrained` says that the model was trained before. It is then judged before the first step, and kept until
    a later one has a lower validation loss. Raises RequestError if the arguments contradict each other.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        dataset: Dataset,
        config: TrainConfig,
        out: str | Path | None = None,
        sources: str | Sequence[str] = (),
        val_sources: str | Sequence[str] = (),
        pretrained: bool = False,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        self.pretrained, self.ranks = pretrained, ranks
        self.model, self.tokenizer, self.dataset, self.config = model, tokenizer, dataset, config
        self.files = RunFiles(Path(out)) if out is not None and ranks.is_first else None
        check_arguments(model, dataset, config)
        self._text = TextRecord.of(dataset.ids, tokenizer, sources)
        self._val_text = TextRecord.of(dataset.val, tokenizer, val_sources) if dataset.has_own_val else None
        self._train_size = text_size(tokenizer, dataset.train)
        self.progress = Progress()
        self.changes = Changes()  # what a resumed run does differently from the run before
        self._started = time.perf_counter()
        self._resumed_at = 0  # the step
        self._step_seconds: list[float] = []  # of the first eleven steps of this run
        self._workers = Workers(config.threads if model.backend.is_cpu else 1)
        precision = "".join(f", {name}" for name in ("bf16", "tf32") if getattr(config, name))
        machine = describe_machine(model.backend.name + precision, self._workers.threads)
        self.machine = machine | {"ranks": str(ranks.size)}
        self._forward_backward = ParallelStep(model, self._workers, config.micro_batch, config.bf16, config.tf32, ranks)
        self.optimizer = optimizer_for(model, config)
        self._update = Update(self.optimizer, config.grad_clip or math.inf)

    # ---------------------------------------------------------------- resuming

    def resume(self, last: Checkpoint, elsewhere: bool = False) -> list[str]:
        """Continue where the checkpoint `last` stopped. It must have been loaded with its optimiser state.

        elsewhere: `last` is not the state of the run at `out`. The files there are then kept as those of an earlier run, and
        the search for the best loss begins again.

        Returns what differs about the machine: the number of threads, NumPy, the BLAS, the device. With such a difference,
        the same seed gives other bytes. `changes` then says what else differs; see resumption.py. Raises RequestError, naming
        the difference, if `last` has another text, vocabulary or shape.
        """
        changes = changes_since(last, self.model.config, self.config, self.tokenizer, self.dataset, self._val_text)
        assert last.optimizer_state is not None
        try:
            self.optimizer.load_state_dict(last.optimizer_state)
        except ValueError as error:
            raise RequestError(f"cannot resume: the checkpoint's training state is damaged ({error})") from None
        self.model.load_state_dict(last.model.state_dict())
        self.progress = dataclasses.replace(last.progress, history=list(last.progress.history))
        self.changes = changes
        if not changes.comparable:
            self.progress.judge_anew()
        self._resumed_at = self.progress.step
        if self.files:
            self.files.disown() if elsewhere else self.files.adopt(self.progress.step)
        before = last.machine or self.machine
        older = {"ranks": "1"} | ({"kernels": "NumPy"} if before["device"].startswith("cpu") else {})
        before = older | before  # older checkpoints do not say this
        return [
            f"{key} was {before.get(key)} and is now {value}" for key, value in self.machine.items() if before.get(key) != value
        ]

    # ---------------------------------------------------------------- the run

    def run(self, stop_requested: Callable[[], bool] = lambda: False) -> Events:
        """Train to the end. If an earlier iteration was left half-way, continue from there.

        `stop_requested()` is asked after every step, or on a GPU after every group of steps. If it returns True, the run
        saves its state and ends. Raises OSError if a file cannot be written.

        An iteration may end at any moment, also by KeyboardInterrupt. On a CPU, a step is then done and counted, or not done
        at all, and the next iteration continues as if nothing had happened. An interruption waits for the end of the step.
        """
        return Events(self._run(stop_requested))

    def _run(self, stop_requested: Callable[[], bool]) -> Generator[Step | Evaluation | End, None, None]:
        together = self.ranks.together
        with (
            contextlib.ExitStack() as lock,
            # A GPU library keeps settings for each thread, so there the work stays in this one.
            Shield(threaded=self.model.backend.is_cpu) as shield,
        ):
            together(lambda: lock.enter_context(self.files.locked()) if self.files else None)
            try:
                shield(lambda: together(self._open))
                self.progress = self.ranks.broadcast(self.progress)  # the first rank alone has looked at the files
                outcome = yield from self._steps_and_evaluations(stop_requested, shield)
                explain = functools.partial(self.ranks.on_first, self._explain_divergence)
                reason = shield(explain) if outcome is Outcome.DIVERGED else ""
            finally:
                try:
                    shield(self._close)
                except BaseException:  # interrupted before it began
                    shield(self._close)
                    raise
            yield self._end(outcome, reason)

    def _open(self) -> None:
        """Make the run's files this run's own, and start the workers."""
        self._started, self._step_seconds = time.perf_counter(), []
        own_text = None if self._val_text is None else self._val_text.sha256
        parts = {
            "text": self._text.sha256,
            "held-out text": own_text,
            "state": self.progress.step,
            "configuration": self.config,
            "processor or BLAS": [self.machine.get(key) for key in ("BLAS", "kernels", "NumPy")],  # weights would drift apart
        }
        check_ranks(self.ranks, parts, self.model)
        self._try_to_save()
        step = self.progress.step
        is_changed = bool(self.changes.settings) and step == self._resumed_at
        if self.files:
            if not self.files.claim():
                self.progress.forget_best()
            elif self.files.saved_step == step == self.progress.best_step:
                self._save(self.progress, is_best=True)  # the run may have been killed between the two files of a save
            if is_changed:
                self._save(self.progress)  # a resumed run that is killed then goes on with its new settings
            if self._is_continued:
                self.files.cut_log(step)
        event: dict[str, Any] = {"step": step, "config": dataclasses.asdict(self.config)}
        if is_changed:
            event["changes"] = {name: [str(before), str(now)] for name, (before, now) in self.changes.settings.items()}
        self._log("resume" if self._is_continued else "start", event)
        self._workers.__enter__()

    @property
    def _is_continued(self) -> bool:
        """Whether there is something before this call of `run`: steps, or the judgement of the model it started from."""
        return self.progress.step > 0 or self.progress.best_loss is not None

    def _close(self) -> None:
        """End the workers, if they were started."""
        self._forward_backward.close()
        self._workers.__exit__()

    def _end(self, outcome: Outcome, reason: str) -> End:
        judged = outcome in (Outcome.FINISHED, Outcome.EARLY_STOP)
        repeated_share = self.dataset.repeated_share if judged else 0.0
        line = advice(self.progress, self.config, self.model.config, outcome, repeated_share)
        end = End(self.progress.step, outcome, line, reason)
        self._log("end", {"step": end.step, "outcome": outcome.name.lower(), "advice": end.advice, "reason": reason})
        return end

    def _steps_and_evaluations(
        self, stop_requested: Callable[[], bool], shield: Shield
    ) -> Generator[Step | Evaluation, None, Outcome]:
        """Take steps and evaluate until the run ends; returns why it ended."""
        config = self.config
        while self.progress.step < config.steps or self._evaluation_due:
            if not self._evaluation_due:  # an evaluation is still due if an earlier iteration ended before it
                for step in shield(self._take_steps):
                    if len(self._step_seconds) <= STEPS_BEFORE_PROCESSES:
                        self._step_seconds.append(step.seconds)
                    if not (math.isfinite(step.loss) and math.isfinite(step.grad_norm)):
                        return Outcome.DIVERGED  # this step did not change the weights
                    if step.step % config.log_interval == 0:
                        self._log("step", dataclasses.asdict(step))
                    yield step
            stop = any(self.ranks.gather(stop_requested()))
            if self._evaluation_due:
                evaluation = shield(lambda: self.ranks.together(self._evaluate))
                if evaluation is None:
                    return Outcome.DIVERGED
                yield evaluation
                too_many = config.patience and self.progress.stale_evaluations >= config.patience
                if too_many and self.progress.step < config.steps:
                    return Outcome.EARLY_STOP
            elif stop:
                shield(lambda: self.ranks.together(lambda: self._save(self.progress)))
            if stop and self.progress.step < config.steps:
                return Outcome.INTERRUPTED
        return Outcome.FINISHED

    @property
    def _evaluation_due(self) -> bool:
        """Whether the state has yet to be evaluated. It follows from the progress, so it is right after an interruption too."""
        p, config = self.progress, self.config
        is_time = p.step % config.eval_interval == 0 or p.step == config.steps
        is_evaluated = bool(p.history) and p.history[-1][0] == p.step
        return self._start_is_unjudged or (is_time and not is_evaluated and p.step > self._resumed_at)

    @property
    def _start_is_unjudged(self) -> bool:
        """Whether a trained model that this run starts from has yet to be judged."""
        return self.pretrained and self.progress.step == 0 and self.progress.best_loss is None and len(self.dataset.val) > 1

    def _explain_divergence(self) -> str:
        """Find out why the loss or the gradient of the next step is not finite, and save a crash file for `replay`."""
        x, y = self.dataset.get_batch("train", self.progress.step)
        reason = self._forward_backward.diagnose(x, y, self.config.seed, self.progress.step)
        if reason == ALL_FINITE:  # then an evaluation has stopped the run, and there is no step to repeat
            return "the validation loss or the logits of a sample are not finite"
        if self.files:
            try:
                save(self.files.crash, dataclasses.replace(self.checkpoint(), crash=reason, batch=(x, y)))
            except OSError as error:  # the reason must still be reported
                return f"{reason} (and {self.files.crash} could not be written: {error.strerror})"
        return reason

    # ---------------------------------------------------------------- steps

    def _take_steps(self) -> list[Step]:
        """Take the next steps. The list ends with the first step whose loss or gradient is not finite; it changed nothing."""
        self._start_processes_if_worthwhile()
        n, started = self._group_size(), time.perf_counter()
        p, config = self.progress, self.config
        assert config.min_lr is not None  # TrainConfig fills it in
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
                self._update.step(loss, self._workers)
        finally:  # after an exception, the steps before it still count
            results = self._update.results()
            seconds = (time.perf_counter() - started) / n
            tokens = config.batch_size * self.model.config.block_size
            for (loss, grad_norm), lr in zip(results, rates, strict=False):
                if math.isfinite(loss) and math.isfinite(grad_norm):
                    p.step += 1
                    p.loss_sum += loss
                    p.loss_count += 1
                steps.append(Step(p.step, loss, grad_norm, lr, tokens, seconds))
        return steps

    def _group_size(self) -> int:
        """The number of steps to take before their losses are read."""
        if self.model.backend.is_cpu or len(self._step_seconds) < FIRST_STEPS:
            return 1
        p, config = self.progress, self.config
        to_evaluation = min(config.eval_interval - p.step % config.eval_interval, config.steps - p.step)
        in_time = int(SECONDS_IN_GROUP / max(self._step_seconds[-1], 1e-9))
        return self.ranks.broadcast(max(1, min(STEPS_IN_GROUP, to_evaluation, in_time)))

    def _start_processes_if_worthwhile(self) -> None:
        """Start worker processes: before the first step if the settings ask for them, or after ten steps if they pay off."""
        wanted = self.config.processes
        if wanted is None and len(self._step_seconds) == STEPS_BEFORE_PROCESSES:
            seconds_left = statistics.median(self._step_seconds) * (self.config.steps - self.progress.step)
            wanted = processes_pay_off(seconds_left)
        elif self._step_seconds:  # this was decided earlier
            return
        if wanted and self._workers.threads > 1:
            try:
                self._forward_backward.use_remote_workers(Processes)
            except OSError as error:
                warnings.warn(f"worker processes cannot start ({error}); going on with threads", RuntimeWarning, stacklevel=2)

    # ---------------------------------------------------------------- evaluations

    def _evaluate(self) -> Evaluation | None:
        """Compute the validation loss, generate a sample, save a checkpoint.

        Returns None, and saves nothing, if the weights, the loss or the logits of the sample are not finite. `progress`
        changes only after everything is saved, so an evaluation that fails or is interrupted can be repeated.
        """
        started = time.perf_counter()
        p = self.progress
        train_loss = p.loss_sum / max(1, p.loss_count)
        at_start = self._start_is_unjudged
        val_loss = val_stderr = None
        loss = Loss(train_loss, None, len(self.dataset.train), *self._train_size)
        if len(self.dataset.val) > 1:
            mapper = self.ranks.mapper(self._workers)
            loss = evaluate(self.model, self.dataset.val, mapper, self.config.eval_tokens or None, self.tokenizer)
            val_loss, val_stderr = loss.loss, loss.stderr
        sample = self.ranks.on_first(self._sample)
        if sample is None:
            return None
        if not (bool(self.model.backend.xp.isfinite(self.model.flat.data).all()) and math.isfinite(val_loss or 0.0)):
            return None
        after = p.with_start(loss.loss) if at_start else p.with_evaluation(train_loss, val_loss, val_stderr)
        is_best = after.best_step == p.step
        self._save(after, is_best)
        seconds, bits = time.perf_counter() - started, (loss.bits_per_character, loss.bits_per_byte)
        result = Evaluation(p.step, None if at_start else train_loss, val_loss, val_stderr, is_best, sample, seconds, *bits)
        self._log("evaluation", dataclasses.asdict(result))
        self.progress = after
        return result

    def _sample(self) -> str | None:
        """A short text from the model; None if its logits are not finite.

        It has a random stream of its own, so it changes nothing in the run.
        """
        settings = GenerateConfig(max_new_tokens=self.config.sample_tokens, seed=self.config.seed)
        try:
            return "".join(generate_text(self.model, self.tokenizer, "", settings, sample=self.progress.step))
        except FloatingPointError:
            return None

    # ---------------------------------------------------------------- files

    def checkpoint(self, progress: Progress | None = None) -> Checkpoint:
        """The state of the run, with this progress or its own. It holds the arrays themselves, which the next step changes."""
        return Checkpoint(
            self.model,
            self.tokenizer,
            train_config=self.config,
            progress=progress or self.progress,
            text=self._text,
            val_text=self._val_text,
            optimizer_state=self.optimizer.state_dict(copy=False),
            machine=self.machine,
        )

    def _try_to_save(self) -> None:
        """Save the state and remove it again, so that what would fail at the first evaluation fails before the first step.

        Raises OSError if the file cannot be written, and RequestError if the state cannot be saved.
        """
        if self.files:
            try:
                self.files.try_to_save(self.checkpoint())
            except ValueError as error:
                raise RequestError(f"this run could not be saved: {error}") from None

    def _save(self, progress: Progress, is_best: bool = False) -> None:
        """Write the state of the run, with this progress, and the checkpoint if it is the best so far."""
        if self.files:
            self.files.save(self.checkpoint(progress), is_best)

    def _log(self, event: str, values: dict[str, Any]) -> None:
        if self.files:
            elapsed = round(time.perf_counter() - self._started, 3)  # seconds since the start or the resumption
            self.files.append_to_log({"event": event} | values | {"elapsed": elapsed})
