"""The application: a page, OpenAI's completions interface, the inside of the model, health, metrics.

Needs the extra [serve]. batching.py draws the texts in another thread; here is only what goes over HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
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
from npgpt.generation.sampling import likeliest_ids, log_probabilities
from npgpt.model.gpt import GPT
from npgpt.parallel.machine import blas_threads
from npgpt.report.inside_page import inside_data
from npgpt.report.play_page import play_page
from npgpt.serving.batching import Batcher, ClosedError, Job, Piece, QueueFullError
from npgpt.serving.completions import (
    ApiError,
    CompletionRequest,
    PromptLogprobs,
    Responses,
    parse_completion,
    parse_json,
)
from npgpt.serving.metrics import MEDIA_TYPE, Metrics
from npgpt.serving.protection import LOCAL_HOSTS, App, Protection
from npgpt.text.tokenizer import Tokenizer

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
    side_by_side: int = 32
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
        ]
        handlers: Any = {ApiError: _api_error, HTTPException: _http_error, ClientDisconnect: self._client_gone}
        handlers[Exception] = _unforeseen
        starlette = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        self.app: App = Protection(starlette, settings.hosts, settings.api_key, self._count)

    def stop(self) -> None:
        """End all texts that are being drawn. Their clients hear that the server is shutting down."""
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
        config = self._model.config
        what = f"{self._model.num_parameters():,} parameters, {config.n_layer} blocks, a context of {config.block_size} tokens"
        page, policy = play_page(self._settings.name, what, self._settings.longest_completion, self._tokenizer.vocab_size)
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    async def _health(self, _: Request) -> Response:
        alive = self._batcher.is_open
        return _json({"status": "ok" if alive else "no texts are drawn any more"}, 200 if alive else 503)

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
        try:
            return _json(await self._call(lambda: inside_data(self._model, self._tokenizer, prompt)))
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
        responses = Responses(self._settings.name, asked, self._tokenizer)
        first = await self._first_choices(asked, responses)
        jobs = []
        if asked.settings.max_new_tokens:
            jobs = [Job(ids, asked.settings, asked.stop, asked.n, asked.logprobs or 0) for _, ids in asked.prompts]
        news = self._submit(jobs)
        self._metrics.prompt_tokens.inc(sum(len(ids) for _, ids in asked.prompts))
        parts = self._parts(asked, jobs, news, responses, first, started)
        if asked.stream:
            return _Stream(parts, asked, responses, self._metrics.cancelled.inc, lambda: self._end(jobs, responses))
        try:
            return _json(await _unless_gone(request.receive, _whole(parts, responses)))
        finally:
            self._end(jobs, responses)

    def _parsed(self, raw: bytes) -> CompletionRequest:
        most = self._settings.threads * self._settings.side_by_side + self._settings.longest_queue
        return parse_completion(parse_json(raw), self._tokenizer, self._settings.longest_completion, most)

    async def _first_choices(self, asked: CompletionRequest, responses: Responses) -> list[dict[str, Any]]:
        """What each text begins with: its prompt, if it is to be echoed; its end, if nothing is to be drawn."""
        reason = None if asked.settings.max_new_tokens else "length"
        if not asked.echo and reason is None:
            return []
        choices = []
        for i, (text, ids) in enumerate(asked.prompts):
            known = None
            if asked.echo and asked.logprobs is not None:
                if len(ids) > self._model.config.block_size:
                    most = self._model.config.block_size
                    raise ApiError(f"with echo and logprobs, a prompt has at most {most} tokens, got {len(ids)}", "prompt")
                known = await self._call(lambda ids=ids: self._prompt_logprobs(ids, asked.logprobs or 0))  # type: ignore[misc]
            shown = text if asked.echo else ""
            choices += [responses.choice(i * asked.n + k, shown, (), reason, known) for k in range(asked.n)]
        return choices

    @no_grad()
    def _prompt_logprobs(self, ids: list[int], n: int) -> PromptLogprobs:
        logits = self._model(np.array([ids]))[0].numpy()[0, :-1, : self._tokenizer.vocab_size].astype(np.float64)
        values = log_probabilities(logits, np.array(ids[1:], dtype=np.int64)).tolist() if len(ids) > 1 else []
        rows = [(i, value, likeliest_ids(row, n)) for i, value, row in zip(ids[1:], values, logits, strict=True)]
        return PromptLogprobs([(ids[0], None, ()), *rows])

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
        self,
        asked: CompletionRequest,
        jobs: list[Job],
        news: asyncio.Event,
        responses: Responses,
        first: list[dict[str, Any]],
        started: float,
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """What the texts have grown by, again and again, as lists of choices, until all have ended. Raises ApiError."""
        if first:
            yield first
        is_first = True
        while jobs:
            is_done = all(job.is_done for job in jobs)  # asked before the pieces are taken, so that none is left
            grown: dict[int, Piece] = {}
            for i, job in enumerate(jobs):
                if job.error is not None:
                    raise _failed(job.error)
                while job.pieces:
                    piece = job.pieces.popleft()
                    index = i * asked.n + piece.text_number
                    grown[index] = grown[index].with_next(piece) if index in grown else piece
            choices = [responses.choice(index, p.text, p.tokens, p.finish_reason) for index, p in grown.items()]
            if choices:
                if is_first:
                    self._metrics.first_token.observe(time.perf_counter() - started)
                    is_first = False
                yield choices
            if is_done:
                return
            if choices:
                await asyncio.sleep(BETWEEN_PARTS)
            await news.wait()
            news.clear()


async def _whole(parts: AsyncIterator[list[dict[str, Any]]], responses: Responses) -> dict[str, Any]:
    """The answer in one piece: the parts of each text, joined."""
    texts: dict[int, dict[str, Any]] = {}
    async for choices in parts:
        for choice in choices:
            whole = texts.setdefault(choice["index"], choice)
            if whole is choice:
                continue
            whole["text"] += choice["text"]
            whole["finish_reason"] = choice["finish_reason"]
            for name, values in (choice["logprobs"] or {}).items():
                whole["logprobs"][name] += values
    return responses.completion([texts[index] for index in sorted(texts)])


async def _unless_gone(receive: Callable[[], Any], work: Any) -> Any:
    """The result of `work`. Raises ClientDisconnect, and cancels it, if the client goes away before."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Stream(Response):
    """The answer as server-sent events. Each holds what one text has grown by, because many clients read only one."""

    def __init__(
        self,
        parts: AsyncIterator[list[dict[str, Any]]],
        asked: CompletionRequest,
        responses: Responses,
        when_gone: Callable[[], None],
        at_end: Callable[[], None],
    ) -> None:
        """when_gone: is called if the client goes away. at_end: is called in any case."""
        super().__init__()
        self._parts, self._asked, self._responses = parts, asked, responses
        self._when_gone, self._at_end = when_gone, at_end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await _unless_gone(receive, self._send(send))
        except ClientDisconnect:
            self._when_gone()
        finally:
            self._at_end()

    async def _send(self, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def events(*data: bytes) -> None:
            body = b"".join(b"data: " + each + b"\n\n" for each in data)
            await send({"type": "http.response.body", "body": body, "more_body": True})

        try:
            async for choices in self._parts:
                await events(*[_dumped(self._responses.completion([choice], usage=False)) for choice in choices])
            if self._asked.include_usage:
                await events(_dumped(self._responses.completion([])))
            await events(b"[DONE]")
        except ApiError as error:  # the status has been sent already
            await events(error.body)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _failed(error: Exception) -> ApiError:
    """What a client is told if the server cannot do what it was asked."""
    if isinstance(error, QueueFullError):
        return ApiError(str(error), status=429, code="queue_full")
    return ApiError(str(error) or "out of memory", status=503 if isinstance(error, ClosedError) else 500)


def _dumped(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _json(value: Any, status: int = 200) -> Response:
    return Response(_dumped(value), status, media_type="application/json")


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(error.body, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """There is no such path, or it has other methods."""
    assert isinstance(error, HTTPException)
    found = ApiError(f"{request.method} {request.url.path[:100]}: {error.detail}", status=error.status_code)
    return Response(found.body, found.status, found.headers | dict(error.headers or {}))


async def _unforeseen(_: Request, __: Exception) -> Response:
    """An error in this program. Starlette raises it again, and so its traceback is printed."""
    found = ApiError("the server has made a mistake; its own messages say which", status=500)
    return Response(found.body, found.status, found.headers)
