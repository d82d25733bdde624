"""How an answer goes to a client: in one piece, or as a stream of events; and what happens when the client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from npgpt.serving.completions import ApiError, Responses

Parts = AsyncIterator[list[dict[str, Any]]]  # again and again, the choices of OpenAI's interface that have grown
Result = TypeVar("Result")


def dumped(value: Any) -> bytes:
    """A value as JSON. Raises ValueError for a number that is not finite."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


async def whole_answer(parts: Parts, responses: Responses) -> dict[str, Any]:
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


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Awaitable[Result]) -> Result:
    """The result of `work`. If the client goes away before, cancels it and raises ClientDisconnect."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, client = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, client), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        client.cancel()
        await asyncio.gather(task, client, return_exceptions=True)


class EventStream(Response):
    """The answer as server-sent events. Each event holds the new part of one text, because many clients read only the first
    choice of an event."""

    def __init__(
        self,
        parts: Parts,
        responses: Responses,
        include_usage: bool,
        when_gone: Callable[[], None],
        at_end: Callable[[], None],
    ) -> None:
        """when_gone: is called if the client goes away. at_end: is called in any case."""
        super().__init__()
        self._parts, self._responses, self._include_usage = parts, responses, include_usage
        self._when_gone, self._at_end = when_gone, at_end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await unless_gone(receive, self._send(send))
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
                await events(*[dumped(self._responses.completion([choice], usage=False)) for choice in choices])
            if self._include_usage:
                await events(dumped(self._responses.completion([])))
            await events(b"[DONE]")
        except ApiError as error:  # the status has been sent already
            await events(error.body)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
