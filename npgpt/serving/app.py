"""The application: a page, OpenAI's completions interface, the inside of the model, health, metrics.

Needs the extra [serve]. batching.py draws the texts, in other threads. Here is only what goes over HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from npgpt.config.fields import RequestError
from npgpt.engine.graph import no_grad
from npgpt.generation.decode import check_finite
from npgpt.generation.sampling import likeliest_ids, log_probabilities
from npgpt.model.gpt import GPT
from npgpt.parallel.machine import blas_threads
from npgpt.report.inside_page import inside_data
from npgpt.report.page import content_security_policy
from npgpt.report.play_page import SCRIPTS as PLAY_SCRIPTS
from npgpt.report.play_page import play_page
from npgpt.serving.batching import SIDE_BY_SIDE, Batcher, ClosedError, Job, Piece, QueueFullError
from npgpt.serving.completions import (
    ApiError,
    CompletionRequest,
    Limits,
    PromptLogprobs,
    Responses,
    parse_completion,
    parse_json,
)
from npgpt.serving.metrics import MEDIA_TYPE, Metrics
from npgpt.serving.protection import LOCAL_HOSTS, App, Protection
from npgpt.serving.streams import EventStream, Parts, dumped, unless_gone, whole_answer
from npgpt.text.tokenizer import Tokenizer, closest_known

BETWEEN_PARTS = 0.1  # seconds between two parts of a stream; the first part is sent at once
LONGEST_INSIDE = 100_000  # characters of a text whose inside is shown

Result = TypeVar("Result")


@dataclass(frozen=True)
class ServerSettings:
    """How a model is served. See `npgpt serve --help`."""

    name: str
    hosts: Sequence[str] = LOCAL_HOSTS
    api_key: str | None = None
    window: str | None = None
    threads: int = 1
    side_by_side: int = SIDE_BY_SIDE
    longest_queue: int = 64
    longest_completion: int = 4096


class Application:
    """Serves a model. `app` is the ASGI application."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, settings: ServerSettings) -> None:
        """Raises RequestError for a window that the model cannot have."""
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        limits = settings.threads, settings.side_by_side, settings.longest_queue
        self._batcher = Batcher(model, tokenizer, self._notify, settings.window, *limits)
        self._metrics = Metrics(lambda: self._batcher.n_drawn, lambda: self._batcher.n_waiting)
        self._news: dict[int, asyncio.Event] = {}  # by the id of a job: set when the job has news
        self._started = int(time.time())
        routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/metrics", self._metrics_text),
            Route("/inside", self._inside, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name}", self._one_model),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", _no_chat, methods=["POST"]),
        ]
        handlers: Any = {ApiError: _api_error, HTTPException: _http_error, ClientDisconnect: self._client_gone}
        handlers[Exception] = _internal_error
        starlette = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        self.app: App = Protection(starlette, settings.hosts, settings.api_key, self._count)

    def stop(self) -> None:
        """End all texts that are being drawn. Their clients receive the error that the server is shutting down."""
        self._batcher.stop()

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        self._batcher.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self._batcher.close)

    def _count(self, status: int) -> None:
        self._metrics.responses.labels(status=str(status)).inc()

    def _notify(self, jobs: list[Job]) -> None:
        """In the batcher's thread: wake up the requests of these jobs."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and nobody waits any more
            self._loop.call_soon_threadsafe(self._wake, jobs)

    def _wake(self, jobs: list[Job]) -> None:
        for job in jobs:
            if event := self._news.get(id(job)):
                event.set()

    async def _client_gone(self, _: Request, __: Exception) -> Response:
        self._metrics.cancelled.inc()
        return Response(status_code=499)  # nobody reads it; other servers log this number, too

    # ---------------------------------------------------------------- small answers

    async def _page(self, _: Request) -> Response:
        config, settings = self._model.config, self._settings
        size = f"{self._model.num_parameters():,} parameters, {config.n_layer} blocks"
        description = f"{size}, a context of {config.block_size} tokens"
        page = play_page(settings.name, description, settings.longest_completion, self._tokenizer.vocab_size)
        policy = content_security_policy(PLAY_SCRIPTS, connects=True)
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    async def _health(self, _: Request) -> Response:
        alive = self._batcher.is_open
        return _json({"status": "ok" if alive else "the server has stopped drawing texts"}, 200 if alive else 503)

    async def _metrics_text(self, _: Request) -> Response:
        return Response(self._metrics.text(), headers={"Content-Type": MEDIA_TYPE})

    async def _models(self, _: Request) -> Response:
        return _json({"object": "list", "data": [self._model_object()]})

    async def _one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self._settings.name:
            raise ApiError(f"this server has one model, {self._settings.name!r}", "model", 404, "model_not_found")
        return _json(self._model_object())

    def _model_object(self) -> dict[str, Any]:
        return {"id": self._settings.name, "object": "model", "created": self._started, "owned_by": "npgpt"}

    async def _inside(self, request: Request) -> Response:
        prompt = parse_json(await request.body()).get("prompt")
        if not isinstance(prompt, str) or len(prompt) > LONGEST_INSIDE:
            raise ApiError(f"prompt must be a text of at most {LONGEST_INSIDE:,} characters", "prompt")
        text = closest_known(self._tokenizer, prompt)
        work = self._call(lambda: inside_data(self._model, self._tokenizer, text))
        try:
            return _json(await unless_gone(request.receive, work))
        except RequestError as error:
            raise ApiError(str(error), "prompt") from None

    async def _call(self, function: Callable[[], Result]) -> Result:
        """Call a function that uses the model, between two tokens of the texts."""

        def limited() -> Result:
            with blas_threads(1):
                return function()

        try:
            return await asyncio.wrap_future(self._batcher.call(limited))
        except (QueueFullError, ClosedError, FloatingPointError, MemoryError) as error:
            raise _failed(error) from None

    # ---------------------------------------------------------------- completions

    async def _completions(self, request: Request) -> Response:
        started = time.perf_counter()
        raw = await request.body()
        # Encoding a long prompt takes a while, and other clients must not wait for it.
        asked = await asyncio.to_thread(self._parsed, raw)
        jobs = []
        if asked.settings.max_new_tokens:
            jobs = [Job(ids, asked.settings, asked.stop, asked.n, asked.logprobs or 0) for _, ids in asked.prompts]
        news = self._submit(jobs)
        self._metrics.prompt_tokens.inc(sum(len(ids) for _, ids in asked.prompts))
        responses = Responses(self._settings.name, asked, self._tokenizer)
        parts = self._parts(asked, jobs, news, responses, started)

        def end() -> None:
            self._end(jobs, responses)

        if asked.stream:
            return EventStream(parts, responses, asked.include_usage, self._metrics.cancelled.inc, end)
        try:
            return _json(await unless_gone(request.receive, whole_answer(parts, responses)))
        finally:
            end()

    def _parsed(self, raw: bytes) -> CompletionRequest:
        settings = self._settings
        limits = Limits(settings.longest_completion, max(1, settings.threads * settings.side_by_side // 2))
        asked = parse_completion(parse_json(raw), self._tokenizer, limits)
        most = self._model.config.block_size
        longest = max(len(ids) for _, ids in asked.prompts)
        if asked.echo and asked.logprobs is not None and longest > most:
            raise ApiError(f"with echo and logprobs, a prompt has at most {most} tokens, got {longest}", "prompt")
        return asked

    def _submit(self, jobs: list[Job]) -> asyncio.Event:
        """Submit the jobs of one request, all or none. Returns the event that tells of their news."""
        news = asyncio.Event()
        self._news |= {id(job): news for job in jobs}
        try:
            self._batcher.submit(jobs)
        except (QueueFullError, ClosedError) as error:
            self._forget(jobs)
            raise _failed(error) from None
        return news

    def _forget(self, jobs: list[Job]) -> None:
        for job in jobs:
            self._news.pop(id(job), None)

    def _end(self, jobs: list[Job], responses: Responses) -> None:
        """After the last part, or when the client has gone."""
        self._forget(jobs)
        for job in jobs:
            if not job.is_done:
                self._batcher.cancel(job)
        self._metrics.completion_tokens.inc(responses.n_completion_tokens)

    async def _parts(
        self, asked: CompletionRequest, jobs: list[Job], news: asyncio.Event, responses: Responses, started: float
    ) -> Parts:
        """Yield the new parts of the texts as lists of choices, until all texts have ended. Raises ApiError."""
        if asked.echo or not jobs:
            yield await self._first_choices(asked, responses)
        is_first = True
        while jobs:
            is_done = all(job.is_done for job in jobs)  # read before the pieces, so that no piece is missed
            grown: dict[int, Piece] = {}
            for i, job in enumerate(jobs):
                if job.error is not None:
                    raise _failed(job.error)
                while job.pieces:
                    piece = job.pieces.popleft()
                    index = i * asked.n + piece.text_number
                    grown[index] = grown[index].with_next(piece) if index in grown else piece
            if grown:
                if is_first:
                    self._metrics.first_token.observe(time.perf_counter() - started)
                    is_first = False
                yield [responses.choice(index, p.text, p.tokens, p.finish_reason) for index, p in grown.items()]
            if is_done:
                return
            if grown and asked.stream:
                await asyncio.sleep(BETWEEN_PARTS)
            await news.wait()
            news.clear()

    async def _first_choices(self, asked: CompletionRequest, responses: Responses) -> list[dict[str, Any]]:
        """The first choice of each text: the echoed prompt, or finish_reason "length" if max_tokens is 0."""
        reason = None if asked.settings.max_new_tokens else "length"
        choices = []
        for i, (text, ids) in enumerate(asked.prompts):
            known = None
            if asked.echo and asked.logprobs is not None:
                known = await self._call(functools.partial(self._prompt_logprobs, ids if text else [], asked.logprobs))
            shown = text if asked.echo else ""
            choices += [responses.choice(i * asked.n + k, shown, (), reason, known) for k in range(asked.n)]
        return choices

    @no_grad()
    def _prompt_logprobs(self, ids: list[int], n: int) -> PromptLogprobs:
        """ids: of a prompt; none for a prompt that is empty."""
        if not ids:
            return PromptLogprobs([])
        logits = self._model(np.array([ids]))[0].numpy()[0, :-1, : self._tokenizer.vocab_size].astype(np.float64)
        check_finite(logits)
        values = log_probabilities(logits, np.array(ids[1:], dtype=np.int64)).tolist() if len(ids) > 1 else []
        rows = [(i, value, likeliest_ids(row, n)) for i, value, row in zip(ids[1:], values, logits, strict=True)]
        return PromptLogprobs([(ids[0], None, ()), *rows])


def _failed(error: Exception) -> ApiError:
    """The error that a client receives."""
    if isinstance(error, QueueFullError):
        return ApiError(str(error), status=429, code="queue_full")
    return ApiError(str(error) or "out of memory", status=503 if isinstance(error, ClosedError) else 500)


def _json(value: Any, status: int = 200) -> Response:
    return Response(dumped(value), status, media_type="application/json")


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(error.body, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown path, or a method that the path does not allow."""
    assert isinstance(error, HTTPException)
    found = ApiError(f"{request.method} {request.url.path[:100]}: {error.detail}", status=error.status_code)
    return Response(found.body, found.status, found.headers | dict(error.headers or {}))


async def _no_chat(_: Request) -> Response:
    raise ApiError("this model continues texts and has no chat; use /v1/completions", status=404)


async def _internal_error(_: Request, __: Exception) -> Response:
    """An error in this program. Starlette raises it again, so its traceback is printed."""
    found = ApiError("internal error of the server; its log has the traceback", status=500)
    return Response(found.body, found.status, found.headers)
