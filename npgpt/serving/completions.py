"""The objects of OpenAI's completions interface: requests, responses, errors. No HTTP and no model.

https://platform.openai.com/docs/api-reference/completions describes them. What is not supported is refused, never ignored.
Beside OpenAI's own settings there are `top_k`, `min_p` and `repetition_penalty`, under the names that other servers use, and
`unknown`: what to do with characters of the prompt that the model does not know ("error", "skip" or "replace").
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from npgpt.config.fields import RequestError
from npgpt.config.settings import GenerateConfig
from npgpt.generation.side_by_side import Token
from npgpt.text.tokenizer import Tokenizer, closest_known

MOST_PROMPTS = 64
LONGEST_PROMPT = 65_536  # tokens
MOST_PROMPT_TOKENS = 1 << 20  # of all texts of a request together
MOST_STOPS = 16
MOST_LOGPROBS = 20
LONGEST_STOP = 1000  # characters
SETTINGS = {"temperature": 1.0, "top_p": 1.0, "top_k": None, "min_p": None, "repetition_penalty": 1.0}
UNSUPPORTED = {  # values without effect are accepted
    "best_of": (None, 1),
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
}
KNOWN = {"model", "prompt", "max_tokens", "n", "stop", "seed", "stream", "stream_options", "logprobs", "echo", "user"}
KNOWN |= {"unknown"}  # beside OpenAI's own
STREAM_OPTIONS = {"include_usage", "include_obfuscation"}


class ApiError(Exception):
    """A request that is refused: the HTTP status, and what OpenAI's error objects say."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body = json.dumps({"error": error}).encode()
        self.headers = {"Content-Type": "application/json", "Content-Length": str(len(self.body))}
        if status == 429:
            self.headers["Retry-After"] = "1"
        if status in (408, 413):  # the rest of the request is not read
            self.headers["Connection"] = "close"


@dataclass
class CompletionRequest:
    """A request for texts. prompts: (text, ids) of each."""

    prompts: list[tuple[str, list[int]]]
    settings: GenerateConfig
    n: int = 1
    stop: list[str] = field(default_factory=list)
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    echo: bool = False


def parse_json(raw: bytes) -> dict[str, Any]:
    """The JSON object in a request body. Raises ApiError."""
    try:
        body = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):  # also a wrong encoding
        raise ApiError("the request body is not JSON") from None
    if not isinstance(body, dict):
        raise ApiError("the request body must be a JSON object")
    return body


@dataclass(frozen=True)
class Limits:
    """What one request may ask for: the largest max_tokens, and the largest number of texts (prompts times n)."""

    max_tokens: int
    n_texts: int


def parse_completion(body: dict[str, Any], tokenizer: Tokenizer, limits: Limits) -> CompletionRequest:
    """A request from its JSON object. Raises ApiError."""
    for name in body.keys() - KNOWN - SETTINGS.keys() - UNSUPPORTED.keys():
        raise ApiError(f"unknown argument {name[:60]!r}", name[:60])
    for name, accepted in UNSUPPORTED.items():
        value = body.get(name)
        if isinstance(value, bool) or (value not in accepted and not (name == "best_of" and value == body.get("n"))):
            raise ApiError(f"{name} is not supported by this server", name)
    n = _integer(body, "n", 1, 1, limits.n_texts)
    max_tokens = _integer(body, "max_tokens", 16, 0, limits.max_tokens)
    logprobs = _integer(body, "logprobs", None, 0, MOST_LOGPROBS)
    seed = _integer(body, "seed", None, -(2**63), 2**64 - 1)
    options = body.get("stream_options")
    if options is not None and not (isinstance(options, dict) and options.keys() <= STREAM_OPTIONS):
        raise ApiError(f"stream_options must be an object with {' or '.join(sorted(STREAM_OPTIONS))}", "stream_options")
    given: dict[str, Any] = {name: default if body.get(name) is None else body[name] for name, default in SETTINGS.items()}
    if given["top_p"] == 1 and not isinstance(given["top_p"], bool):
        given["top_p"] = None  # the same, but faster
    try:
        assert max_tokens is not None
        settings = GenerateConfig(max_new_tokens=max_tokens, seed=None if seed is None else seed % 2**64, **given)
    except RequestError as error:
        raise ApiError(str(error), str(error).split()[0]) from None
    unknown = body.get("unknown") or "error"
    if unknown not in ("error", "skip", "replace"):
        raise ApiError(f"unknown must be 'error', 'skip' or 'replace', got {_short(unknown)}", "unknown")
    prompts = _prompts(body.get("prompt"), tokenizer, unknown)
    assert n is not None
    if len(prompts) * n > limits.n_texts:
        raise ApiError(f"a request may ask for at most {limits.n_texts} texts, got {len(prompts)} prompts times n={n}", "n")
    if n * sum(len(ids) for _, ids in prompts) > MOST_PROMPT_TOKENS:
        raise ApiError(f"the prompts of all texts may have at most {MOST_PROMPT_TOKENS:,} tokens together", "prompt")
    return CompletionRequest(
        prompts,
        settings,
        n,
        _stops(body.get("stop")),
        _boolean(body, "stream"),
        _boolean(options or {}, "include_usage"),
        logprobs,
        _boolean(body, "echo"),
    )


def _integer(body: dict[str, Any], name: str, default: int | None, least: int, most: int) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ApiError(f"{name} must be a whole number from {least} to {most}, got {_short(value)}", name)
    return value


def _boolean(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(f"{name} must be true or false, got {_short(value)}", name)
    return bool(value)


def _stops(value: Any) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    valid = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not valid or not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops):
        raise ApiError(f"stop must be a text or up to {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters", "stop")
    return stops


def _prompts(value: Any, tokenizer: Tokenizer, unknown: str) -> list[tuple[str, list[int]]]:
    """(text, ids) of each prompt: a text, ids, or a list of either."""
    if value is None:
        value = ""
    prompts = [value] if isinstance(value, str) or (isinstance(value, list) and all(map(_is_id, value)) and value) else value
    if not isinstance(prompts, list) or not 0 < len(prompts) <= MOST_PROMPTS:
        raise ApiError(f"prompt must be a text, a list of token ids, or up to {MOST_PROMPTS} of them", "prompt")
    return [_prompt(prompt, tokenizer, unknown) for prompt in prompts]


def _prompt(value: Any, tokenizer: Tokenizer, unknown: str) -> tuple[str, list[int]]:
    is_ids = isinstance(value, list) and bool(value) and all(map(_is_id, value))
    if not isinstance(value, str) and not is_ids:
        raise ApiError("each prompt must be a text or a list of at least one token id", "prompt")
    try:
        if is_ids:
            text, ids = tokenizer.decode(value), value
        else:
            text = closest_known(tokenizer, value)
            text = text if unknown == "error" else tokenizer.without_unknown(text, replace=unknown == "replace")
            ids = tokenizer.encode(text) if text else list(tokenizer.start_ids)
    except RequestError as error:
        raise ApiError(str(error), "prompt") from None
    if len(ids) > LONGEST_PROMPT:
        raise ApiError(f"a prompt may have at most {LONGEST_PROMPT:,} tokens, got {len(ids):,}", "prompt")
    return text, ids


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _short(value: Any) -> str:
    """A wrong value for a message. An integer may have more digits than Python writes."""
    is_written = isinstance(value, (str, float, bool)) or (isinstance(value, int) and abs(value) < 2**64)
    return repr(value)[:60] if is_written else type(value).__name__


# ---------------------------------------------------------------- responses


class Responses:
    """Makes the objects that answer one request."""

    def __init__(self, model: str, request: CompletionRequest, tokenizer: Tokenizer) -> None:
        self._request, self._tokenizer, self._lengths = request, tokenizer, tokenizer.character_lengths
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._offsets: dict[int, int] = {}  # of each choice, the characters of its text so far
        self.n_completion_tokens = 0

    def completion(self, choices: list[dict[str, Any]], usage: bool = True) -> dict[str, Any]:
        """The whole answer, or one part of a stream."""
        return self._head | {"choices": choices} | ({"usage": self._usage()} if usage else {})

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(ids) for _, ids in self._request.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.n_completion_tokens,
            "total_tokens": prompt + self.n_completion_tokens,
        }

    def choice(
        self, index: int, text: str, tokens: Sequence[Token], finish_reason: str | None, prompt: PromptLogprobs | None = None
    ) -> dict[str, Any]:
        """The new part of one text. prompt: the log-probabilities of the echoed prompt in `text`."""
        logprobs = None
        if self._request.logprobs is not None:
            logprobs = self._logprobs(index, tokens, prompt)
        self.n_completion_tokens += len(tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, index: int, tokens: Sequence[Token], prompt: PromptLogprobs | None) -> dict[str, Any]:
        offset = self._offsets.get(index, 0)
        parts: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        known = prompt.rows if prompt else []
        for i, logprob, likeliest in [*known, *((token.id, token.logprob, token.likeliest) for token in tokens)]:
            parts["tokens"].append(self._token_text(i))
            parts["token_logprobs"].append(None if logprob is None else round(logprob, 6))
            top = {self._token_text(other): round(value, 6) for other, value in likeliest}
            parts["top_logprobs"].append(None if logprob is None else top)
            parts["text_offset"].append(offset)
            offset += int(self._lengths[i])
        self._offsets[index] = offset
        return parts

    def _token_text(self, i: int) -> str:
        """A token as text. A token that is not valid UTF-8 is written as bytes:\\xe4, as OpenAI does."""
        raw = self._tokenizer.token_bytes(i)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@dataclass(frozen=True)
class PromptLogprobs:
    """The tokens of an echoed prompt: (id, log-probability given the tokens before it, the likeliest ids at its place)."""

    rows: list[tuple[int, float | None, tuple[tuple[int, float], ...]]]
