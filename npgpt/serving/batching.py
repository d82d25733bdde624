"""Draws the texts of many requests side by side, in threads of its own. Knows no HTTP and no asyncio.

A text joins between two tokens of the others and leaves when it ends. While all places are taken, texts wait in a queue with a
bound. What a text becomes does not depend on the others (generation/side_by_side.py).
"""

from __future__ import annotations

import dataclasses
import secrets
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from npgpt.config.settings import GenerateConfig
from npgpt.generation.side_by_side import SideBySide, Token
from npgpt.generation.stops import StopFinder
from npgpt.model.gpt import GPT
from npgpt.text.tokenizer import Tokenizer

SIDE_BY_SIDE = 32  # texts that a thread draws together by default


class QueueFullError(Exception):
    """Too many texts are waiting already."""


class ClosedError(Exception):
    """The batcher draws nothing any more. The message says why."""


@dataclass(frozen=True)
class Piece:
    """The new part of one text of a job. finish_reason: "stop" or "length" with the last piece, else None."""

    text_number: int
    text: str
    tokens: tuple[Token, ...]
    finish_reason: str | None = None

    def with_next(self, piece: Piece) -> Piece:
        """This piece and the next one of the same text, as one."""
        return Piece(self.text_number, self.text + piece.text, self.tokens + piece.tokens, piece.finish_reason)


@dataclass
class Job:
    """Some texts that continue one context. `pieces` grows until `is_done`; `error` says why it failed."""

    context: list[int]
    settings: GenerateConfig
    stop: Sequence[str] = ()
    n_texts: int = 1
    n_likeliest: int = 0
    pieces: deque[Piece] = field(default_factory=deque)
    error: Exception | None = None
    n_left: int = 0  # texts that have not ended
    is_cancelled: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def is_done(self) -> bool:
        return self.n_left == 0 or self.error is not None

    def text_has_ended(self) -> None:
        """Count one more ended text. Several threads may draw the texts of one job."""
        with self._lock:
            self.n_left -= 1


@dataclass
class _Place:
    """One text that is being drawn."""

    job: Job
    text_number: int
    finder: StopFinder
    n_tokens: int = 0
    n_characters: int = 0  # characters that begin in its tokens so far
    n_shown: int = 0  # characters shown so far
    held: deque[tuple[Token, int]] = field(default_factory=deque)  # tokens not shown yet, each with where it ends

    def add(self, token: Token, n_characters: int) -> None:
        """Add a token in which this many characters begin."""
        self.n_characters += n_characters
        self.held.append((token, self.n_characters))

    def show(self, text: str, is_all: bool) -> tuple[Token, ...]:
        """Count `text` as shown; returns the tokens that are shown with it. is_all: no token is held back any more."""
        self.n_shown += len(text)
        shown = []
        while self.held and (is_all or self.held[0][1] <= self.n_shown):
            shown.append(self.held.popleft()[0])
        return tuple(shown)


class Batcher:
    """Draws texts of one model. `notify` is called, in one of the batcher's threads, with the jobs that have news."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        notify: Callable[[list[Job]], None],
        window: str | None = None,
        threads: int = 1,
        side_by_side: int = SIDE_BY_SIDE,
        longest_queue: int = 64,
    ) -> None:
        """threads: how many draw. side_by_side: texts that each thread draws together. longest_queue: texts that may wait
        beyond these.

        Raises RequestError for a window that the model cannot have.
        """
        self._notify, self._longest_queue = notify, longest_queue
        self._drawers = [_Drawer(model, tokenizer, window, side_by_side) for _ in range(threads)]
        self._waiting: deque[tuple[Job, int]] = deque()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._changed = threading.Condition()
        self._is_calling = False
        self._closed: ClosedError | None = None
        self._threads = [
            threading.Thread(target=self._run, args=(drawer,), name="drawer", daemon=True) for drawer in self._drawers
        ]

    def start(self) -> None:
        """Begin to draw."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End all jobs with ClosedError. The threads end after the token that they are drawing."""
        self._close(ClosedError("the server is shutting down"))

    def close(self) -> None:
        """Stop, and wait for the threads to end."""
        self.stop()
        for thread in self._threads:
            thread.join()

    @property
    def is_open(self) -> bool:
        """Whether it takes jobs."""
        return self._closed is None

    @property
    def n_drawn(self) -> int:
        """The number of texts that are being drawn."""
        return sum(map(len, self._drawers))

    @property
    def n_waiting(self) -> int:
        """The number of texts that wait for a place."""
        return len(self._waiting)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put the texts of some jobs into the queue, all or none. Raises QueueFullError, or ClosedError."""
        with self._changed:
            if self._closed:
                raise self._closed
            free = sum(drawer.n_free for drawer in self._drawers)
            if len(self._waiting) + sum(job.n_texts for job in jobs) > self._longest_queue + free:
                raise QueueFullError(f"{len(self._waiting)} texts are waiting already; try again later")
            for job in jobs:
                if job.settings.seed is None:
                    job.settings = dataclasses.replace(job.settings, seed=secrets.randbits(64))
                job.n_left = job.n_texts
                self._waiting += [(job, number) for number in range(job.n_texts)]
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """End a job before its texts have ended. Its places are free before the next token."""
        with self._changed:
            job.is_cancelled = True
            self._waiting = deque(waiting for waiting in self._waiting if waiting[0] is not job)

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Call a function between two tokens, in a thread that draws. One function is called at a time, because it may need
        much memory.

        Raises QueueFullError, or ClosedError.
        """
        with self._changed:
            if self._closed:
                raise self._closed
            self._calls = deque(call for call in self._calls if not call[0].cancelled())
            if len(self._calls) >= self._longest_queue:
                raise QueueFullError("too many requests are waiting already; try again later")
            future: Future[Any] = Future()
            self._calls.append((future, function))
            self._changed.notify_all()
            return future

    # ---------------------------------------------------------------- the threads

    def _run(self, drawer: _Drawer) -> None:
        try:
            while self._next_step(drawer):
                pass
        finally:  # after any error, no request may wait for this thread
            self._close(ClosedError("a drawing thread failed; restart the server"))

    def _close(self, why: ClosedError) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = why
            self._changed.notify_all()
            jobs = [job for job, _ in self._waiting] + [job for drawer in self._drawers for job in drawer.jobs()]
            for future, _ in self._calls:
                if future.set_running_or_notify_cancel():
                    future.set_exception(why)
            self._waiting.clear()
            self._calls.clear()
        self._fail(jobs, why)

    def _next_step(self, drawer: _Drawer) -> bool:
        """Wait for something to do, and do it. Returns False when the batcher is closed."""
        with self._changed:
            while not (self._closed or self._waiting or len(drawer) or (self._calls and not self._is_calling)):
                self._changed.wait()
            if self._closed:
                return False
            drawer.remove_ended()
            while self._waiting and drawer.n_free and len(drawer) <= min(map(len, self._drawers)):
                drawer.admit(*self._next_waiting())
            call = None
            if self._calls and not self._is_calling:
                call, self._is_calling = self._calls.popleft(), True
        if call:
            self._answer(*call)
        if len(drawer):
            try:
                news = drawer.step()
            except (FloatingPointError, MemoryError) as error:
                failed = drawer.jobs()
                drawer.clear()
                self._fail(failed, error)
                return True
            if news:
                self._notify(news)
        return True

    def _next_waiting(self) -> tuple[Job, int]:
        """Take a text from the queue: the first one of the job that has the fewest texts being drawn."""
        drawn = Counter(id(job) for drawer in self._drawers for job in drawer.jobs())
        chosen = min(self._waiting, key=lambda waiting: drawn[id(waiting[0])])
        self._waiting.remove(chosen)
        return chosen

    def _answer(self, future: Future[Any], function: Callable[[], Any]) -> None:
        """Call a function for `call`."""
        try:
            if future.set_running_or_notify_cancel():
                future.set_result(function())
        except (ValueError, FloatingPointError, MemoryError) as error:  # the caller's request is at fault
            future.set_exception(error)
        except BaseException as error:  # the code is at fault, and the caller must not wait for ever
            future.set_exception(error)
            raise
        finally:
            with self._changed:
                self._is_calling = False
                self._changed.notify_all()

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        with self._changed:
            for job in jobs:
                job.error = error
            self._waiting = deque(waiting for waiting in self._waiting if waiting[0].error is None)
        if jobs:
            self._notify(jobs)


class _Drawer:
    """The texts that one thread draws side by side."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, window: str | None, side_by_side: int) -> None:
        self._tokenizer, self._side_by_side = tokenizer, side_by_side
        self._lengths = tokenizer.character_lengths
        self._texts = SideBySide(model, window, threads=1, vocab_size=tokenizer.vocab_size)
        self._places: dict[int, _Place] = {}
        self._keys = 0

    def __len__(self) -> int:
        return len(self._places)

    @property
    def n_free(self) -> int:
        """How many more texts it could draw."""
        return self._side_by_side - len(self._places)

    def jobs(self) -> list[Job]:
        """The jobs whose texts it draws; a job may occur more than once."""
        return [place.job for place in list(self._places.values())]

    def admit(self, job: Job, number: int) -> None:
        assert job.settings.seed is not None  # `submit` has drawn one
        self._keys += 1
        self._texts.add(self._keys, job.context, job.settings, job.settings.seed, number, job.n_likeliest)
        self._places[self._keys] = _Place(job, number, StopFinder(job.stop, self._tokenizer.stream()))

    def remove_ended(self) -> None:
        """Remove the texts of jobs that were cancelled or have failed."""
        for key in [key for key, place in self._places.items() if place.job.is_cancelled or place.job.error]:
            self._remove(key)

    def clear(self) -> None:
        for key in list(self._places):
            self._remove(key)

    def _remove(self, key: int) -> None:
        self._texts.remove(key)
        del self._places[key]

    def step(self) -> list[Job]:
        """Draw one token for each text; returns the jobs that have news. Raises FloatingPointError."""
        news: dict[int, Job] = {}
        for token in self._texts.step():
            place = self._places[token.sample]
            place.n_tokens += 1
            is_end = token.id == self._tokenizer.end_id
            text, is_stopped = place.finder.end() if is_end else place.finder.add(token.id)
            reason = "stop" if is_stopped else None
            if reason is None and place.n_tokens == place.job.settings.max_new_tokens:
                text, reason = text + place.finder.end()[0], "length"
            if not is_end:
                place.add(token, int(self._lengths[token.id]))
            if text or reason:
                shown = place.show(text, is_all=reason == "length")
                place.job.pieces.append(Piece(place.text_number, text, shown, reason))
                news[id(place.job)] = place.job
            if reason:
                self._remove(token.sample)
                place.job.text_has_ended()
        return list(news.values())
