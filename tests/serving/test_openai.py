"""The `openai` package as a client: the interface is one that existing programs can talk to, given its address alone."""

import pytest

from npgpt import GenerateConfig
from npgpt.generation.generate import generate_text

openai = pytest.importorskip("openai", reason="the package openai is not installed")


@pytest.fixture(scope="module")
def api(client):
    with openai.OpenAI(base_url=f"{client.url}v1", api_key="none", max_retries=0) as api:
        yield api


def generated(model, tokenizer, prompt, n, sample=0, stop=()):
    config = GenerateConfig(max_new_tokens=n, temperature=1.0, seed=6)
    return "".join(generate_text(model, tokenizer, prompt, config, stop, sample))


def test_plain(api, model, tokenizer):
    found = api.completions.create(model="small", prompt="ab", max_tokens=20, seed=6)
    assert found.choices[0].text == generated(model, tokenizer, "ab", 20)
    assert found.choices[0].finish_reason == "length"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (2, 20, 22)
    assert (found.object, found.model) == ("text_completion", "small")


def test_any_name_of_a_model_is_accepted(api):
    """A client may have a name built in. The answer says which model it was."""
    assert api.completions.create(model="gpt-3.5-turbo-instruct", prompt="ab").model == "small"
    assert [found.id for found in api.models.list()] == ["small"]
    assert api.models.retrieve("small").id == "small"


def test_streaming(api, model, tokenizer):
    stream = api.completions.create(
        model="small", prompt="ab", max_tokens=40, seed=6, stream=True, stream_options={"include_usage": True}
    )
    parts = list(stream)
    assert "".join(part.choices[0].text for part in parts if part.choices) == generated(model, tokenizer, "ab", 40)
    assert parts[-1].usage.completion_tokens == 40
    assert parts[-2].choices[0].finish_reason == "length"


def test_several_texts(api, model, tokenizer):
    found = api.completions.create(model="small", prompt=["ab", "cd"], max_tokens=10, n=3, seed=6)
    texts = [generated(model, tokenizer, prompt, 10, sample) for prompt in ("ab", "cd") for sample in range(3)]
    assert [choice.text for choice in found.choices] == texts


def test_stop_and_logprobs(api, model, tokenizer):
    whole = generated(model, tokenizer, "ab", 30)
    found = api.completions.create(model="small", prompt="ab", max_tokens=30, seed=6, stop=[whole[4:6]], logprobs=2).choices[0]
    assert found.text == whole[: whole.index(whole[4:6])]
    assert found.finish_reason == "stop"
    assert "".join(found.logprobs.tokens) == found.text
    assert len(found.logprobs.token_logprobs) == len(found.logprobs.top_logprobs) == len(found.text)
    assert all(len(top) == 2 for top in found.logprobs.top_logprobs)


def test_errors(api, client):
    with pytest.raises(openai.BadRequestError, match="unknown character 'z'") as raised:
        api.completions.create(model="small", prompt="z")
    assert (raised.value.param, raised.value.type, raised.value.status_code) == ("prompt", "invalid_request_error", 400)
    with pytest.raises(openai.NotFoundError) as missing:
        api.models.retrieve("other")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        api.chat.completions.create(model="small", messages=[{"role": "user", "content": "a"}])


def test_the_key(model, tokenizer):
    from support.serving import server

    with server(model, tokenizer, api_key="secret") as client:
        with (
            openai.OpenAI(base_url=f"{client.url}v1", api_key="wrong", max_retries=0) as api,
            pytest.raises(openai.AuthenticationError),
        ):
            api.models.list()
        with openai.OpenAI(base_url=f"{client.url}v1", api_key="secret") as api:
            assert api.completions.create(model="small", prompt="ab").choices[0].text


def test_a_full_queue_is_a_rate_limit(model, tokenizer, monkeypatch):
    from support.serving import server

    from npgpt.serving.batching import Batcher, QueueFullError

    def full(self, jobs):
        raise QueueFullError("64 texts are waiting already; try again later")

    monkeypatch.setattr(Batcher, "submit", full)
    with server(model, tokenizer) as client, openai.OpenAI(base_url=f"{client.url}v1", api_key="k", max_retries=0) as api:
        with pytest.raises(openai.RateLimitError, match="64 texts are waiting already"):
            api.completions.create(model="small", prompt="ab")
        with pytest.raises(openai.RateLimitError):
            list(api.completions.create(model="small", prompt="ab", stream=True))
