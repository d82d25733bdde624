"""The pages in a real browser: no error, no request outside, what a person does works, nothing hostile runs."""

import functools
import json

import numpy as np
import pytest
from support.browser import Watched
from support.hostile import HOSTILE

import npgpt
from npgpt import GPT, BPETokenizer, CharTokenizer, GenerateConfig, GPTConfig
from npgpt.generation.sampling import _weights
from npgpt.report.copies import copies_of
from npgpt.report.inside_page import inside_page
from npgpt.report.run_page import report_page
from npgpt.report.runs import Run

VIEWS = [{"width": 1280, "height": 900}, {"width": 390, "height": 844, "dark": True}]


@pytest.fixture
def opened(browser, tmp_path):
    """A function that opens a page from a file. At the end, nothing may have gone wrong in any of them."""
    watched = []

    def open_page(html, **view):
        path = tmp_path / f"page{len(watched)}.html"
        path.write_bytes(html.encode())
        found = Watched(browser, **view)
        found.context.set_offline(True)
        watched.append(found)
        return found.open(path.as_uri())

    yield open_page
    for found in watched:
        found.close("file://")


def wide_as_the_window(page):
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("view", VIEWS)
def test_report(opened, run, view):
    page = opened(report_page([run, Run("other.npz", run.checkpoint, [])], [copies_of(run), "unknown"]), **view)
    assert page.title() == "model.npz, other.npz: report"
    assert page.locator("figure svg").count() == 6
    for svg in page.locator("figure svg").all():
        assert svg.bounding_box()["width"] > 200
    assert wide_as_the_window(page)
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert page.evaluate("getComputedStyle(document.querySelector('svg text')).fill") == ink  # on light and on dark paper
    slider, shown = page.locator("#sample-0"), page.locator("#sample-0-text")
    assert shown.text_content() == run.evaluations.samples[-1]
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert shown.text_content() == run.evaluations.samples[-2]
    assert "step 3" in page.locator('output[for="sample-0"]').text_content()


@pytest.mark.parametrize("view", VIEWS)
def test_inside(opened, clear_model, tokenizer, view):
    page = opened(inside_page("model.npz", clear_model, tokenizer, "HOB:\nThe bell"), **view)
    tokens = page.locator(".tokens span")
    assert tokens.count() == 13
    assert wide_as_the_window(page)
    assert page.locator(".heads button").count() == 4
    assert page.locator(".heads button[aria-pressed=true]").count() == 1
    page.locator('.heads button[aria-label="block 1, head 2"]').click()
    assert page.locator("h3", has_text="Block 1, head 2").count() == 1
    assert page.locator(".heads button[aria-pressed=true]").get_attribute("aria-label") == "block 1, head 2"
    assert page.locator(".lines line").count() > 13
    tokens.nth(4).click()
    assert page.locator(".tokens .chosen").text_content() == "⏎\n"
    heading = page.locator("h3").first.text_content()
    found = npgpt.inside(clear_model, tokenizer.encode("HOB:\nThe bell"))
    logprobs = found.logits - np.log(np.exp(found.logits).sum(axis=1, keepdims=True))
    assert heading == f"After “⏎” came “T”, {-logprobs[4, tokenizer.stoi['T']] / np.log(2):.2f} bits"
    assert page.locator(".bars code").count() == 10
    assert page.locator(".lens tr").count() == 4
    assert page.locator(".lens td.chosen").count() == 4
    box = page.locator("canvas.large").bounding_box()
    page.locator("canvas.large").hover(position={"x": box["width"] * 0.1, "y": box["height"] * 0.9})
    assert "attends with" in page.locator(".large + .note").text_content()
    before = page.locator(".bars span").first.text_content()
    page.locator("#inside-temperature").focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    assert page.locator('output[for="inside-temperature"]').text_content() == "0.50"
    assert page.locator(".bars span").first.text_content() != before


SETTINGS = [
    {},
    {"temperature": 0.4},
    {"temperature": 1.9},
    {"temperature": 0.0},
    {"top_k": 5},
    {"top_p": 0.6},
    {"top_k": 7, "top_p": 0.5, "temperature": 1.3},
    {"top_p": 0.97, "temperature": 0.7},
    {"top_p": 0.999, "temperature": 2.5},  # keeps ids that the page does not know one by one
    {"temperature": 0.05},
]


def test_the_page_draws_from_what_the_sampler_draws_from(opened, tokenizer):
    """Its probabilities are those of generation/sampling.py, also for a vocabulary of which it knows only a part."""
    characters = CharTokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 700))))
    for own, prompt in ((tokenizer, "HOB:"), (characters, "一丁丂")):
        model = GPT(GPTConfig(own.vocab_size, block_size=8, n_layer=1, n_head=1, n_embd=8), seed=1)
        model.parameters().data += np.random.default_rng(0).standard_normal(model.num_parameters(), dtype=np.float32)
        page = opened(inside_page("x", model, own, prompt))
        logits = npgpt.inside(model, own.encode(prompt)).logits.astype(float)
        for settings in SETTINGS:
            config = GenerateConfig(**({"temperature": 1.0} | settings))
            weights = _weights(logits, config, [()] * len(logits), None)[0]
            if config.temperature == 0:
                weights = weights == weights.max(axis=1, keepdims=True)
            p = weights / weights.sum(axis=1, keepdims=True)
            for position in range(len(logits)):
                shown = page.evaluate(
                    """([position, t, k, p]) => {
                        const data = JSON.parse(document.getElementById("inside-data").textContent);
                        data.ids = new Uint32Array(bytesOf(data.topIds).buffer);
                        data.logits = new Float32Array(bytesOf(data.topLogits).buffer);
                        return nextTokens(data, position, t, k, p, 10);
                    }""",
                    [position, config.temperature, config.top_k or 0, config.top_p or 1],
                )
                assert len(shown) == 10
                for each in shown:
                    assert each["kept"] == (p[position, each["id"]] > 0)
                    assert each["p"] == pytest.approx(p[position, each["id"]], rel=0.02, abs=1e-6)


def test_nothing_hostile_runs(opened, run):
    """Neither from a prompt, a token, a name, nor a log. A script that runs would open a dialog, which is an error."""
    bpe = BPETokenizer.train([HOSTILE[0] * 30], 300)  # tokens such as </script>
    model = GPT(GPTConfig(bpe.vocab_size, block_size=64, n_layer=1, n_head=1, n_embd=8), seed=1)
    for hostile in HOSTILE:
        if "\ud800" not in hostile:
            page = opened(inside_page(hostile[:100], model, bpe, hostile))
            assert page.locator(".tokens span").count() > 0
            assert page.locator("img, iframe, object").count() == 0
        events = [dict(event) for event in run.events]
        for event in events:
            event |= {key: hostile for key in ("sample", "advice", "reason") if key in event}
        page = opened(report_page([Run(hostile[:200], run.checkpoint, json.loads(json.dumps(events)))], [hostile]))
        assert page.locator("figure svg").count() == 6
        assert page.evaluate("document.querySelectorAll('script:not([type])').length") == 1
        page.locator("#sample-0").focus()
        page.keyboard.press("Home")
        if hostile.isprintable():
            assert page.locator("#sample-0-text").text_content() == hostile


def test_a_printed_report_is_black_on_white(opened, run):
    page = opened(report_page([run], ["unknown"]), dark=True)
    page.emulate_media(media="print")
    style = functools.partial(page.evaluate, "(name) => getComputedStyle(document.body)[name]")
    assert style("color") == "rgb(0, 0, 0)"
    assert style("backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("#sample-0").is_hidden()
