"""The server's interface: completions as OpenAI's, streams, errors, models, metrics, clients that go away."""

import json
import math
import re
import socket
import time

import numpy as np
import pytest
from support.models import model_with_clear_logits
from support.serving import server

import npgpt
from npgpt import GPT, GenerateConfig, GPTConfig
from npgpt.generation.generate import generate_text


def generated(model, tokenizer, prompt, n, sample=0, stop=(), **settings):
    config = GenerateConfig(**({"max_new_tokens": n, "temperature": 1.0} | settings))
    return "".join(generate_text(model, tokenizer, prompt, config, stop, sample))


def test_a_text_is_what_generate_writes(client, model, tokenizer):
    for settings in ({}, {"temperature": 0.0}, {"top_p": 0.8, "top_k": 4}, {"min_p": 0.1, "repetition_penalty": 1.3}):
        status, body = client.post({"model": "small", "prompt": "ab", "max_tokens": 30, "seed": 5} | settings)
        assert status == 200
        (choice,) = body["choices"]
        assert choice == {
            "index": 0,
            "text": generated(model, tokenizer, "ab", 30, seed=5, **settings),
            "logprobs": None,
            "finish_reason": "length",
        }
        assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 30, "total_tokens": 32}
        assert (body["object"], body["model"]) == ("text_completion", "small")
        assert re.fullmatch("cmpl-[0-9a-f]{24}", body["id"])
        assert abs(body["created"] - time.time()) < 60


def test_defaults_are_those_of_the_interface(client):
    status, body = client.post({})
    assert status == 200
    assert body["usage"]["completion_tokens"] == 16
    assert client.post({"seed": None, "stop": None, "n": None, "logprobs": None, "suffix": None, "logit_bias": {}})[0] == 200
    assert client.post({"max_tokens": 0})[1]["choices"][0] == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "length",
    }
    texts = {client.post({"max_tokens": 30})[1]["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 3  # without a seed, each request has another text


def test_several_prompts_and_several_texts(client, model, tokenizer):
    prompts = ["ab", "cdefgh", ""]
    _, body = client.post({"prompt": prompts, "n": 3, "seed": 2, "max_tokens": 12})
    assert [choice["index"] for choice in body["choices"]] == list(range(9))
    for i, choice in enumerate(body["choices"]):
        assert choice["text"] == generated(model, tokenizer, prompts[i // 3], 12, sample=i % 3, seed=2)
    assert body["usage"] == {"prompt_tokens": 9, "completion_tokens": 108, "total_tokens": 117}
    _, of_ids = client.post(
        {"prompt": [tokenizer.encode("ab"), tokenizer.encode("cdefgh")], "n": 3, "seed": 2, "max_tokens": 12}
    )
    assert [choice["text"] for choice in of_ids["choices"]] == [choice["text"] for choice in body["choices"][:6]]
    _, one = client.post({"prompt": tokenizer.encode("ab"), "seed": 2, "max_tokens": 12})
    assert one["choices"][0]["text"] == body["choices"][0]["text"]


def test_stop(client, model, tokenizer):
    whole = generated(model, tokenizer, "ab", 40, seed=3)
    for stop in (whole[5:8], [whole[5:8], "zzz"]):
        _, body = client.post({"prompt": "ab", "seed": 3, "max_tokens": 40, "stop": stop, "logprobs": 0})
        (choice,) = body["choices"]
        assert choice["text"] == whole[: whole.index(whole[5:8])]
        assert choice["finish_reason"] == "stop"
        assert body["usage"]["completion_tokens"] <= 8


def test_logprobs_and_echo(client, model, tokenizer):
    _, body = client.post({"prompt": "abc", "seed": 3, "max_tokens": 5, "logprobs": 3, "echo": True})
    (choice,) = body["choices"]
    text, found = choice["text"], choice["logprobs"]
    assert text == "abc" + generated(model, tokenizer, "abc", 5, seed=3)
    assert "".join(found["tokens"]) == text
    assert found["text_offset"] == list(range(8))
    ids = tokenizer.encode(text)
    logits = model(np.array([ids]))[0].numpy()[0].astype(float)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    for at in range(1, 8):
        assert found["token_logprobs"][at] == pytest.approx(logprobs[at - 1, ids[at]], abs=1e-4)
        best = np.argsort(-logprobs[at - 1])[:3]
        assert set(found["top_logprobs"][at]) == {tokenizer.itos[i] for i in best.tolist()}
    # As evaluation programs ask for the likelihood of a text: nothing is drawn.
    _, scored = client.post({"prompt": "abc", "max_tokens": 0, "logprobs": 1, "echo": True})
    assert scored["choices"][0]["text"] == "abc"
    assert scored["choices"][0]["logprobs"]["token_logprobs"] == found["token_logprobs"][:3]
    assert scored["usage"]["completion_tokens"] == 0
    status, refused = client.post({"prompt": "abcdefgha", "max_tokens": 0, "logprobs": 1, "echo": True})
    assert (status, refused["error"]["message"]) == (400, "with echo and logprobs, a prompt has at most 8 tokens, got 9")


def test_streams(client, model, tokenizer):
    asked = {
        "prompt": ["ab", "cd"],
        "n": 2,
        "seed": 4,
        "max_tokens": 25,
        "logprobs": 1,
        "stream_options": {"include_usage": True},
    }
    events = client.events(asked)
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"] == {"prompt_tokens": 4, "completion_tokens": 100, "total_tokens": 104}
    texts, ends, tokens = dict.fromkeys(range(4), ""), {}, dict.fromkeys(range(4), "")
    for event in events[:-2]:
        assert event["id"] == events[0]["id"]
        assert "usage" not in event
        (choice,) = event["choices"]
        assert choice["index"] not in ends
        texts[choice["index"]] += choice["text"]
        tokens[choice["index"]] += "".join(choice["logprobs"]["tokens"])
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["finish_reason"]
    assert ends == dict.fromkeys(range(4), "length")
    assert texts == tokens
    for index, text in texts.items():
        assert text == generated(model, tokenizer, ["ab", "cd"][index // 2], 25, sample=index % 2, seed=4)
    assert client.events({"max_tokens": 3})[-2]["choices"][0]["finish_reason"] == "length"
    echoed = client.events({"prompt": "ab", "max_tokens": 1, "echo": True})
    assert echoed[0]["choices"][0]["text"] == "ab"


def test_tokens_that_are_no_whole_characters(bpe):
    """Text in a stream never has half a character; the tokens of log-probabilities are written as OpenAI's."""
    model = GPT(GPTConfig(bpe.vocab_size, block_size=16, n_layer=1, n_head=1, n_embd=8), seed=1)
    with server(model, bpe) as client:
        asked = {"prompt": "中国 😀", "max_tokens": 60, "seed": 1, "logprobs": 1, "temperature": 2.0}
        status, body = client.post(asked)
        assert status == 200
        text = generated(model, bpe, "中国 😀", 60, seed=1, temperature=2.0)
        assert body["choices"][0]["text"] == text
        tokens = body["choices"][0]["logprobs"]["tokens"]
        assert any(token.startswith("bytes:\\x") for token in tokens)
        streamed = "".join(event["choices"][0]["text"] for event in client.events(asked)[:-1])
        assert streamed == text
        assert client.post({"prompt": "a\ud800b"})[1]["error"]["param"] == "prompt"


def test_models_health_and_metrics(client):
    status, _, raw = client.send("GET", "/v1/models")
    (found,) = json.loads(raw)["data"]
    assert (status, found["id"], found["object"], found["owned_by"]) == (200, "small", "model", "npgpt")
    assert json.loads(client.send("GET", "/v1/models/small")[2]) == found
    status, _, raw = client.send("GET", "/v1/models/other")
    assert (status, json.loads(raw)["error"]["code"]) == (404, "model_not_found")
    assert client.send("GET", "/health")[0] == 200
    client.post({"max_tokens": 7})
    status, headers, raw = client.send("GET", "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    numbers = dict(line.rsplit(" ", 1) for line in raw.decode().splitlines() if not line.startswith("#"))
    assert float(numbers["npgpt_completion_tokens_total"]) >= 7
    assert float(numbers['npgpt_responses_total{status="200"}']) >= 3
    assert float(numbers["npgpt_texts_drawn"]) == 0


def test_the_inside_of_a_text(client, model, tokenizer):
    status, data = client.post({"prompt": "abcabc"}, "/inside")
    assert status == 200
    assert data["tokens"] == tokenizer.encode("abcabc")
    found = npgpt.inside(model, tokenizer.encode("abcabc"))
    p = np.exp(found.logits.astype(float))
    p /= p.sum(axis=1, keepdims=True)
    bits = [-math.log2(p[at, i]) for at, i in enumerate(tokenizer.encode("abcabc")[1:])]
    assert data["surprisal"][0] is None
    assert data["surprisal"][1:] == pytest.approx(bits, abs=2e-3)
    for body, param in (({"prompt": 3}, "prompt"), ({"prompt": "xyz"}, "prompt"), ({"prompt": "\ud800"}, "prompt")):
        status, error = client.post(body, "/inside")
        assert (status, error["error"]["param"]) == (400, param)


WRONG = [
    ({"prompt": "xyz"}, "prompt", "unknown character"),
    ({"prompt": 5}, "prompt", "prompt must be a text, a list of token ids, or up to 64"),
    ({"prompt": [[]]}, "prompt", "at least one token id"),
    ({"prompt": []}, "prompt", "prompt must be"),
    ({"prompt": [9]}, "prompt", "9"),
    ({"prompt": ["a", 1]}, "prompt", "each prompt"),
    ({"prompt": "a", "temperature": -1}, "temperature", "temperature must be a number at least 0, got -1"),
    ({"temperature": "hot"}, "temperature", "got 'hot'"),
    ({"top_p": 0}, "top_p", "top_p"),
    ({"top_p": 1.5}, "top_p", "top_p"),
    ({"top_k": 0}, "top_k", "top_k"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens must be a whole number from 0 to 4096, got -1"),
    ({"max_tokens": 5000}, "max_tokens", "got 5000"),
    ({"max_tokens": 1.5}, "max_tokens", "got 1.5"),
    ({"n": 0}, "n", "n must be"),
    ({"n": 10**30}, "n", "n must be"),
    ({"n": 9, "prompt": ["a", "b"]}, "n", "at most 16 texts, got 2 prompts times n=9"),
    ({"logprobs": 21}, "logprobs", "from 0 to 20"),
    ({"logprobs": True}, "logprobs", "got True"),
    ({"seed": 2**64}, "seed", "seed"),
    ({"stop": ""}, "stop", "stop must be"),
    ({"stop": ["a"] * 17}, "stop", "up to 16"),
    ({"stop": 3}, "stop", "stop must be"),
    ({"stream": "yes"}, "stream", "stream must be true or false, got 'yes'"),
    ({"stream_options": 1}, "stream_options", "object"),
    ({"stream_options": {"usage": True}}, "stream_options", "include_usage"),
    ({"best_of": True}, "best_of", "not supported"),
    ({"unknown": "guess"}, "unknown", "'skip'"),
    ({"echo": 1}, "echo", "echo"),
    ({"best_of": 3}, "best_of", "best_of is not supported"),
    ({"suffix": "x"}, "suffix", "suffix is not supported"),
    ({"presence_penalty": 1}, "presence_penalty", "not supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ({"temprature": 1}, "temprature", "unknown argument 'temprature'"),
]


@pytest.mark.parametrize(("body", "param", "words"), WRONG)
def test_wrong_requests(client, body, param, words):
    status, answer = client.post(body)
    error = answer["error"]
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert words in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"n":' + b"9" * 5000 + b"}", b'{"temperature": NaN}']
)
def test_bodies_that_are_no_requests(client, raw):
    status, _, answer = client.send("POST", "/v1/completions", raw)
    assert status == 400
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"


def test_other_paths_and_methods(client):
    for method, path, expected in [
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("POST", "/v1/chat/completions", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/style.css", 404),
        ("GET", "/v1/models/%00", 404),
    ]:
        status, headers, raw = client.send(method, path)
        assert status == expected
        assert json.loads(raw)["error"]["message"]
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_the_queue_is_bounded(model, tokenizer, monkeypatch):
    decode = GPT.decode

    def slowly(self, *arguments):
        time.sleep(0.01)
        return decode(self, *arguments)

    monkeypatch.setattr(GPT, "decode", slowly)
    with server(model, tokenizer, side_by_side=1, longest_queue=1) as client:
        held = [hold(client, {"max_tokens": 2000, "stream": True, "prompt": "a"}) for _ in range(2)]
        wait_until(lambda: metric(client, "npgpt_texts_waiting") == 1)
        status, headers, raw = client.send("POST", "/v1/completions", {"prompt": "a"})
        error = json.loads(raw)["error"]
        assert (status, error["type"], headers["Retry-After"]) == (429, "rate_limit_error", "1")
        for connection in held:
            connection.close()
        wait_until(lambda: metric(client, "npgpt_texts_drawn") == 0)
        assert client.post({"prompt": "a"})[0] == 200


def hold(client, body):
    """A connection that has sent a request and does not read the answer."""
    connection = socket.create_connection(("127.0.0.1", client.port))
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


def metric(client, name):
    lines = client.send("GET", "/metrics")[2].decode().splitlines()
    return float(next(line for line in lines if line.startswith(name + " ")).rsplit(" ", 1)[1])


def wait_until(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(model, tokenizer, stream, monkeypatch):
    decode, drawn = GPT.decode, []

    def slowly(self, ids, *arguments):
        time.sleep(0.01)
        drawn.append(len(ids))
        return decode(self, ids, *arguments)

    monkeypatch.setattr(GPT, "decode", slowly)
    with server(model, tokenizer) as client:
        connection = hold(client, {"max_tokens": 4000, "stream": stream})
        wait_until(lambda: len(drawn) > 5)
        connection.close()
        wait_until(lambda: metric(client, "npgpt_texts_drawn") == 0)
        n = len(drawn)
        time.sleep(0.1)
        assert len(drawn) == n < 1000
        assert metric(client, "npgpt_cancelled_total") == 1


def test_logits_that_are_not_finite_are_an_error_of_the_server(tokenizer, monkeypatch):
    model = model_with_clear_logits(tokenizer)
    monkeypatch.setattr(GPT, "decode", lambda self, ids, *_: np.full((len(ids), 9), np.nan, np.float32))
    with server(model, tokenizer) as client:
        status, body = client.post({"prompt": "ab"})
        assert (status, body["error"]["type"]) == (500, "server_error")
        assert "not finite" in body["error"]["message"]
        last = client.events({"prompt": "ab"})[-1]
        assert "not finite" in last["error"]["message"]
        assert client.send("GET", "/health")[0] == 200
