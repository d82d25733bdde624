"""What the server counts, for Prometheus. Needs the extra [serve]."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

MEDIA_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The counters of one server."""

    def __init__(self, n_drawn: Callable[[], int], n_waiting: Callable[[], int]) -> None:
        registry = self._registry = CollectorRegistry()
        self.responses = Counter("npgpt_responses", "HTTP responses by status", ["status"], registry=registry)
        self.prompt_tokens = Counter("npgpt_prompt_tokens", "tokens of prompts", registry=registry)
        self.completion_tokens = Counter("npgpt_completion_tokens", "tokens sent to clients", registry=registry)
        self.cancelled = Counter("npgpt_cancelled", "requests whose client went away", registry=registry)
        buckets = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
        self.first_token = Histogram("npgpt_first_token_seconds", "time to the first token", registry=registry, buckets=buckets)
        Gauge("npgpt_texts_drawn", "texts that are being drawn", registry=registry).set_function(n_drawn)
        Gauge("npgpt_texts_waiting", "texts that wait for a place", registry=registry).set_function(n_waiting)

    def text(self) -> bytes:
        """All counters in Prometheus's text format."""
        return generate_latest(self._registry)
