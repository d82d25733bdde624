"""The page of the server in a real browser: type, stream, stop, sliders, samples, errors, the inside of a text."""

import time

import pytest
from support.browser import Watched, open_browser
from support.hostile import HOSTILE
from support.models import model_with_clear_logits
from support.serving import server

from npgpt import GPT, BPETokenizer, GenerateConfig, GPTConfig
from npgpt.generation.generate import generate_text


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def opened(browser):
    """A function that opens the page of a server."""
    watched = []

    def open_page(client, **view):
        found = Watched(browser, **view)
        watched.append((found, client.url))
        return found.open(client.url)

    yield open_page
    for found, url in watched:
        found.close(url)


def set_slider(page, name, value):
    page.locator(f"#{name}").fill(str(value))


def write(page, **settings):
    """Ask for texts, and wait for their end."""
    for name, value in settings.items():
        set_slider(page, name.replace("_", "-"), value)
    page.locator("#write").click()
    page.locator("#write:not([disabled])").wait_for()


@pytest.mark.parametrize("view", [{"width": 1280, "height": 900}, {"width": 390, "height": 844, "dark": True}])
def test_type_write_and_look_inside(opened, client, model, tokenizer, view):
    page = opened(client, **view)
    assert page.title() == "small"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.locator("#prompt").fill("abc")
    page.locator("#seed").fill("7")
    write(page, temperature=1, max_tokens=60, n=3)
    for k in range(3):
        settings = GenerateConfig(max_new_tokens=60, temperature=1.0, seed=7)
        text = "".join(generate_text(model, tokenizer, "abc", settings, sample=k))
        assert page.locator(f'[data-sample="{k}"]').text_content() == "abc" + text
    assert page.locator("#status").text_content().startswith("180 tokens, ")
    page.locator("#colour").check()
    spans = page.locator('[data-sample="0"] span[title]')
    assert spans.count() == 60
    assert spans.first.get_attribute("title").endswith(" bits")
    page.locator("#colour").uncheck()
    page.get_by_role("button", name="Look inside").nth(1).click()
    page.locator("#inside .lens").wait_for()
    assert page.locator("#inside h2").first.text_content() == "Inside: sample 2"
    assert page.locator("#inside .tokens span").count() == 8
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_sliders_and_fields_arrive(opened, client, model, tokenizer):
    page = opened(client)
    settings = GenerateConfig(max_new_tokens=40, temperature=0.5, top_k=3, top_p=0.9, seed=2)
    whole = "".join(generate_text(model, tokenizer, "a", settings))
    page.locator("#prompt").fill("a")
    page.locator("#seed").fill("2")
    page.locator("#stop").fill(whole[7:9])
    write(page, temperature=0.5, top_k=3, top_p=0.9, max_tokens=40)
    assert page.locator("#top-k-value").text_content() == "3"
    assert page.locator("#temperature-value").text_content() == "0.50"
    assert page.locator('[data-sample="0"]').text_content() == "a" + whole[: whole.index(whole[7:9])]


def test_text_streams_and_stops(opened, tokenizer, monkeypatch):
    model, decode, drawn = model_with_clear_logits(tokenizer, position="rotary"), GPT.decode, []

    def slowly(self, *arguments):
        time.sleep(0.01)
        drawn.append(1)
        return decode(self, *arguments)

    monkeypatch.setattr(GPT, "decode", slowly)
    with server(model, tokenizer) as client:
        page = opened(client)
        set_slider(page, "max-tokens", 2000)
        page.locator("#write").click()
        for length in (20, 40):  # it grows
            while len(page.locator('[data-sample="0"]').text_content()) < length:
                page.wait_for_timeout(20)
        assert page.locator("#write").is_disabled()
        page.locator("#stop-button").click()
        page.locator("#write:not([disabled])").wait_for()
        assert page.locator("#status").text_content().endswith(", stopped")
        assert page.locator("#error").text_content() == ""
        page.wait_for_timeout(100)
        n = len(drawn)
        page.wait_for_timeout(200)
        assert len(drawn) == n  # the server has stopped, too
        page.get_by_role("button", name="Look inside").click()
        page.locator("#inside .lens").wait_for()


def test_errors_are_shown(browser, client):
    """The browser itself reports each failed request in its console; nothing else may be there."""
    watched = Watched(browser)
    page = watched.open(client.url)
    page.locator("#prompt").fill("abz")
    write(page)
    assert "unknown character 'z'" in page.locator("#error").text_content()
    page.locator("#prompt").fill("ab")
    write(page, max_tokens=3)
    assert page.locator("#error").text_content() == ""
    assert len(watched.errors) == 1
    assert "400" in watched.errors.pop()
    watched.close(client.url)


def test_the_key_is_asked_for(browser, model, tokenizer):
    with server(model, tokenizer, api_key="secret") as client:
        watched = Watched(browser)
        page = watched.open(client.url)
        assert page.locator("#key-box").is_hidden()
        write(page, max_tokens=5)
        assert "This server needs a key" in page.locator("#error").text_content()
        page.locator("#key").fill("secret")
        write(page, max_tokens=5)
        assert len(page.locator('[data-sample="0"]').text_content()) == 5
        assert "401" in watched.errors.pop()
        watched.close(client.url)


def test_nothing_hostile_runs(opened):
    """Neither what a person types nor what a model writes: its tokens are pieces of scripts."""
    bpe = BPETokenizer.train([(HOSTILE[0] + HOSTILE[1]) * 30], 320)
    model = GPT(GPTConfig(bpe.vocab_size, block_size=64, n_layer=1, n_head=1, n_embd=8), seed=1)
    with server(model, bpe, name="<b>x</b>") as client:
        page = opened(client)
        assert page.title() == "<b>x</b>"
        for hostile in HOSTILE:
            if "\ud800" in hostile:
                continue  # a browser cannot send it
            page.locator("#prompt").fill(hostile)
            write(page, max_tokens=60, n=2)
            page.get_by_role("button", name="Look inside").first.click()
            page.locator("#inside .lens").wait_for()
            assert page.locator("img, iframe, object").count() == 0
            assert page.locator("script:not([type])").count() == 2
