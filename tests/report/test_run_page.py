"""The report: what it says of a run, of several, of runs without a log, of a log that a stranger has written."""

import dataclasses
import json
import re

import numpy as np
import pytest
from support.hostile import HOSTILE

import npgpt
from npgpt.evaluation.likeness import copied_spans
from npgpt.report.copies import copies_of
from npgpt.report.curves import MOST_POINTS, figures
from npgpt.report.run_page import report_page
from npgpt.report.runs import Run, differing, short_names
from npgpt.storage.run import seconds_of


def page_of(*runs, time_left=None):
    return report_page(list(runs), [copies_of(run) for run in runs], time_left)


def with_text_file(run, tmp_path, monkeypatch, text):
    """The run, with a checkpoint that knows where its text is."""
    (tmp_path / "text.txt").write_text(text[:4000], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    checkpoint = run.checkpoint
    checkpoint.text = dataclasses.replace(checkpoint.text, sources=("text.txt",))
    return run


def test_what_the_report_says(run, tmp_path, monkeypatch, text):
    run = with_text_file(run, tmp_path, monkeypatch, text)
    page = page_of(run)
    assert page.startswith("<!doctype html>")
    best = run.evaluations.val_loss.min()
    for words in (
        f"{best:.4f}",
        f"{best / np.log(2):.4f}",
        f"{run.checkpoint.config.num_parameters():,}",
        "6 of 6",
        "text.txt, 4,000 characters",
        "NumPy",
        run.events[-1]["advice"].replace("'", "&#x27;"),
        "in the training text",
        "<dt>n_embd</dt><dd>16</dd>",
        "<dt>lr</dt><dd>0.001</dd>",
    ):
        assert words in page, words
    assert page.count("<figure") == 6
    assert len(page) < 2e6


def test_every_curve_has_its_text_alternative(run):
    drawn = figures([run])
    assert len(drawn) == 6
    for figure in drawn:
        assert 'role="img"' in figure
        assert re.search(r"<desc id=.*?>model.npz.*?lowest", figure)
        assert "#0000" not in figure  # every colour is a variable, so that it suits light and dark paper
        assert "<style" not in figure
    ids = re.findall(r'\bid="([^"]+)"', "".join(drawn))
    titles = [name for name in ids if name.endswith(("-title", "-words"))]
    assert len(titles) == len(set(titles)) == 12


def test_several_runs_and_what_differs(run, trained):
    other = Run("other.npz", npgpt.load(trained), run.events)
    other.checkpoint.train_config = dataclasses.replace(other.checkpoint.train_config, lr=0.5, seed=3)
    assert differing([run, other]) == ["lr", "seed"]
    page = page_of(run, other)
    assert "<h3>" in page
    assert re.search(r'<th scope="row">lr</th><td>0.001</td><td>0.5</td>', page)
    assert "var(--c1)" in page
    assert "All settings are the same" in page_of(run, Run("third.npz", npgpt.load(trained), run.events))


def test_a_run_without_a_log(run):
    bare = Run("bare.npz", run.checkpoint, [])
    assert np.array_equal(bare.evaluations.val_loss, run.evaluations.val_loss)
    page = page_of(bare)
    assert "There is no log beside bare.npz" in page
    assert page.count("<figure") == 2  # loss and bits per character; nothing is known of time, rate, norm and speed
    fresh = Run("new.npz", npgpt.Checkpoint(run.checkpoint.model, run.checkpoint.tokenizer), [])
    assert "There are no results yet" in page_of(fresh)


def test_a_resumed_run_counts_all_its_time(run):
    again = [{**event, "step": event["step"] + 6} for event in run.events]
    again[0] = {**again[0], "event": "resume"}
    seconds = seconds_of([*run.events, *again])
    assert seconds == sorted(seconds)
    assert seconds[-1] == pytest.approx(run.events[-1]["elapsed"] * 2)
    assert seconds_of([{"event": "step", "step": 1, "elapsed": "x"}, {"event": "step", "step": 2}]) == [0.0, 0.0]


def test_what_was_changed_when_a_run_was_resumed(run):
    changed = {"event": "resume", "step": 6, "changes": {"lr": ["0.001", "0.0005"], "damaged": 3}}
    page = page_of(Run("a.npz", run.checkpoint, [*run.events, changed, *run.events[1:]]))
    assert "From step 7 on: lr was 0.001 and became 0.0005." in page
    assert "--out a.npz --resume" in page or "--resume" not in page


def test_time_left(run):
    events = [
        {"event": "start", "step": 0, "elapsed": 1.0},
        {"event": "step", "step": 2, "loss": 3.0, "elapsed": 121.0},
    ]
    assert Run("a", run.checkpoint, events).time_left == "4.0 min"  # four more steps of a minute
    assert Run("a", run.checkpoint, events[:1]).time_left == "unknown"
    live = page_of(Run("a", run.checkpoint, events), time_left="4.0 min")
    assert "<dt>time left</dt><dd>4.0 min</dd>" in live
    assert '<progress value="2" max="6"' in live
    assert "connect-src &#x27;self&#x27;" in live


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_log_of_a_stranger(run, hostile):
    """Texts stay texts; what is not a number is not drawn."""
    events = [dict(event) for event in run.events]
    for event in events:
        if event["event"] == "evaluation":
            event |= {"sample": hostile, "val_stderr": hostile, "train_loss": [1]}
        if event["event"] == "step":
            event |= {
                "loss": hostile,
                "lr": float("nan"),
                "grad_norm": True,
                "tokens": 10**400,
                "seconds": 1e-320,
                "elapsed": 10**400,
            }
        if event["event"] == "end":
            event |= {"advice": hostile, "reason": hostile}
    events = [json.loads(json.dumps(event)) for event in events]
    page = report_page([Run(hostile[:300], run.checkpoint, events)], [hostile])
    page.encode("utf-8")
    scripts = re.findall(r"<script(.*?)>", page)
    assert scripts == [' type="application/json" id="samples"', ""]
    assert not re.search(r"<(img|svg onload)", page)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)
    assert page.count("<figure") == 3  # the losses over steps and over time, bits per character


def test_copied_spans():
    assert copied_spans("xxabcdexxfghxabc", "abcdefgh", 3) == [(2, 7), (9, 12), (13, 16)]
    assert copied_spans("ab", "abcdefgh", 3) == []
    assert copied_spans("", "abcdefgh", 3) == []
    assert copied_spans("abcdefghabcdefgh", "abcdefgh", 3) == [(0, 8), (8, 16)]


def test_copies_are_marked(run, tmp_path, monkeypatch, text):
    run = with_text_file(run, tmp_path, monkeypatch, text)
    copied = text[100:160]
    run.evaluations.samples[-1] = f"zzz{copied}zzz"
    page = page_of(run)
    marked = re.findall(r"<mark title=\"(\d+) characters\">", page)
    assert int(marked[0]) >= 60
    (tmp_path / "text.txt").unlink()
    assert "The likeness is unknown: the text it was trained on, text.txt, is not here" in page_of(run)


def test_a_long_run_has_small_curves(run):
    events = [{"event": "start", "step": 0}]
    events += [{"event": "step", "step": n, "loss": 3 + (n == 777), "lr": 1e-3, "grad_norm": 1.0} for n in range(1, 50_001)]
    (figure, *_) = figures([Run("long", run.checkpoint, events)])
    assert len(figure) < 100_000
    assert "lowest 3" in figure
    assert len(re.search(r'd="(M[^"]*L[^"]*L[^"]*L[^"]*L[^"]*)"', figure)[1].split("L")) <= MOST_POINTS


def test_names():
    from pathlib import Path

    assert short_names([Path("a/x.npz"), Path("b/y.npz")]) == ["x.npz", "y.npz"]
    assert short_names([Path("a/x.npz"), Path("b/x.npz")]) == [str(Path("a/x.npz")), str(Path("b/x.npz"))]
