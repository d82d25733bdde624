"""The batcher: texts are what they are alone, a bounded queue, cancellation, errors, the end."""

import threading
import time

import numpy as np
import pytest
from support.models import model_with_clear_logits

from npgpt import CharTokenizer, GenerateConfig
from npgpt.generation.generate import generate_text
from npgpt.model.gpt import GPT
from npgpt.serving.batching import Batcher, ClosedError, Job, QueueFullError


@pytest.fixture
def tokenizer():
    return CharTokenizer("\nabcdefgh")


@pytest.fixture
def model(tokenizer):
    return model_with_clear_logits(tokenizer, position="rotary")


@pytest.fixture
def slow(monkeypatch):
    """Each token takes 5 ms."""
    decode = GPT.decode

    def slowly(self, *arguments):
        time.sleep(0.005)
        return decode(self, *arguments)

    monkeypatch.setattr(GPT, "decode", slowly)


@pytest.fixture
def started(model, tokenizer):
    """A function that starts a batcher, which is closed at the end of the test."""
    batchers = []

    def start(**options):
        news = threading.Event()
        batcher = Batcher(model, tokenizer, lambda jobs: news.set(), **options)
        batcher.start()
        batchers.append(batcher)
        return batcher

    yield start
    for batcher in batchers:
        batcher.close()


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.002)


def texts_of(job):
    texts = dict.fromkeys(range(job.n_texts), "")
    for piece in job.pieces:
        texts[piece.text_number] += piece.text
    return [texts[number] for number in range(job.n_texts)]


def job_of(tokenizer, seed=0, n=1, tokens=20, prompt="ab", **options):
    settings = GenerateConfig(max_new_tokens=tokens, temperature=1.0, seed=seed)
    return Job(tokenizer.encode(prompt), settings, n_texts=n, **options)


@pytest.mark.parametrize("threads", [1, 3])
def test_each_text_is_what_it_is_alone(model, tokenizer, started, threads):
    """More texts than places, of different lengths and prompts; all join and leave between tokens."""
    batcher = started(threads=threads, side_by_side=3, longest_queue=1000)
    jobs = [job_of(tokenizer, k, 1 + k % 3, 5 + 7 * k % 40, "abcdefgh"[: 1 + k % 8]) for k in range(25)]
    for job in jobs:
        batcher.submit([job])
    wait_for(lambda: all(job.is_done for job in jobs))
    assert batcher.n_drawn == batcher.n_waiting == 0
    for k, job in enumerate(jobs):
        prompt = "abcdefgh"[: 1 + k % 8]
        alone = ["".join(generate_text(model, tokenizer, prompt, job.settings, sample=i)) for i in range(job.n_texts)]
        assert texts_of(job) == alone
        assert sum(len(piece.tokens) for piece in job.pieces) == job.n_texts * job.settings.max_new_tokens
        assert [piece.finish_reason for piece in job.pieces if piece.finish_reason] == ["length"] * job.n_texts


def test_stop_texts_end_a_text_and_hold_back_their_tokens(model, tokenizer, started):
    whole = "".join(generate_text(model, tokenizer, "ab", job_of(tokenizer).settings))
    stop = whole[6:9]
    job = job_of(tokenizer, stop=[stop])
    started().submit([job])
    wait_for(lambda: job.is_done)
    assert texts_of(job) == [whole[: whole.index(stop)]]
    assert job.pieces[-1].finish_reason == "stop"


def test_the_queue_has_a_bound(tokenizer, started, slow):
    batcher = started(side_by_side=2, longest_queue=3)
    running = [job_of(tokenizer, k, tokens=1000) for k in range(2)]
    batcher.submit(running)
    wait_for(lambda: batcher.n_drawn == 2)
    waiting = job_of(tokenizer, n=2)
    batcher.submit([waiting])
    with pytest.raises(QueueFullError, match="2 texts are waiting already"):
        batcher.submit([job_of(tokenizer, n=2)])
    with pytest.raises(QueueFullError):  # all or none
        batcher.submit([job_of(tokenizer), job_of(tokenizer)])
    assert batcher.n_waiting == 2
    batcher.submit([job_of(tokenizer)])
    assert batcher.n_waiting == 3


def test_a_cancelled_job_frees_its_place_within_a_token(tokenizer, started, slow):
    batcher = started(side_by_side=1)
    gone, waiting, behind = (job_of(tokenizer, k, tokens=n) for k, n in enumerate((2000, 2000, 3)))
    batcher.submit([gone])
    wait_for(lambda: len(gone.pieces) > 2)
    batcher.submit([waiting])
    batcher.submit([behind])
    batcher.cancel(waiting)
    assert batcher.n_waiting == 1
    n = len(gone.pieces)
    batcher.cancel(gone)
    wait_for(lambda: behind.is_done)
    assert len(gone.pieces) <= n + 2  # the token that was being drawn, and perhaps the one counted before
    assert not waiting.pieces


def test_a_function_is_called_between_two_tokens(tokenizer, started, slow):
    batcher = started()
    batcher.submit([job_of(tokenizer, tokens=1000)])
    names = batcher.call(lambda: threading.current_thread().name).result(timeout=10)
    assert names == "drawer"
    with pytest.raises(ValueError, match="wrong"):
        batcher.call(lambda: int("wrong")).result(timeout=10)
    assert batcher.is_open


def test_close_ends_all_jobs(tokenizer, started, slow):
    batcher = started(side_by_side=1)
    jobs = [job_of(tokenizer, k, tokens=1000) for k in range(3)]
    batcher.submit(jobs)
    wait_for(lambda: jobs[0].pieces)
    batcher.close()
    assert all(isinstance(job.error, ClosedError) and job.is_done for job in jobs)
    for call in (lambda: batcher.submit([job_of(tokenizer)]), lambda: batcher.call(int)):
        with pytest.raises(ClosedError, match="shutting down"):
            call()


def test_logits_that_are_not_finite_end_the_jobs_but_not_the_batcher(model, tokenizer, started, monkeypatch):
    batcher = started()
    decode = GPT.decode
    monkeypatch.setattr(GPT, "decode", lambda self, *arguments: decode(self, *arguments) * np.inf)
    job = job_of(tokenizer)
    with np.errstate(invalid="ignore"):
        batcher.submit([job])
        wait_for(lambda: job.is_done)
    assert isinstance(job.error, FloatingPointError)
    monkeypatch.setattr(GPT, "decode", decode)
    job = job_of(tokenizer)
    batcher.submit([job])
    wait_for(lambda: job.is_done)
    assert job.error is None
    assert batcher.n_drawn == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_after_an_unforeseen_error_nobody_waits(tokenizer, started, monkeypatch):
    batcher = started(threads=2)

    def broken(self, *arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(GPT, "decode", broken)
    jobs = [job_of(tokenizer, k) for k in range(3)]
    batcher.submit(jobs)
    wait_for(lambda: all(job.is_done for job in jobs))
    assert all(isinstance(job.error, ClosedError) and "restart the server" in str(job.error) for job in jobs)
    assert not batcher.is_open
