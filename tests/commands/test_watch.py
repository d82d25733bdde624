"""`train --watch` and `--tensorboard`: the report of a run while it goes on, and what TensorBoard reads."""

import re
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
from support.browser import Watched, open_browser
from support.commands import QUICK, ROOT, npgpt_command

import npgpt
from npgpt.storage.run import read_log


def start(folder, *flags):
    command = [sys.executable, "-m", "npgpt", "train", "text.txt", *QUICK, *flags]
    return subprocess.Popen(command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, encoding="utf-8")


def address_of(process):
    for line in process.stderr:
        if found := re.search(r"watch it in a browser: (http://\S+)", line):
            return found[1]
    raise AssertionError("no address was printed")


def test_the_report_grows_with_the_run(workshop):
    """In a browser: samples and steps appear, the last report stays, and nothing goes wrong."""
    flags = ["--out", "live.npz", "--steps", "100000", "--eval-interval", "40", "--patience", "0", "--watch", "0"]
    with open_browser() as browser, start(workshop, *flags, "--log-interval", "5") as process:
        address = address_of(process)
        watched = Watched(browser)
        page = watched.open(address)
        page.locator("figure svg").first.wait_for(timeout=60_000)
        steps = page.locator(".facts dt", has_text="steps").locator("xpath=../dd")
        first = int(steps.text_content().split()[0].replace(",", ""))
        until = time.monotonic() + 60
        while int(steps.text_content().split()[0].replace(",", "")) <= first:
            assert time.monotonic() < until
            page.wait_for_timeout(100)
        assert page.locator("progress").get_attribute("max") == "100000"
        assert page.locator(".facts dt", has_text="time left").locator("xpath=../dd").text_content().endswith("min")
        assert page.locator("#sample-0").count() == 1
        process.terminate()
        process.stderr.read()
        assert process.wait(timeout=60) in (143, 1)
        page.wait_for_timeout(500)
        ended = int(steps.text_content().split()[0].replace(",", ""))
        assert page.locator(".facts dt", has_text="ended").locator("xpath=../dd").text_content() == "interrupted"
        assert ended == npgpt.load(workshop / "live.last.npz").step  # the browser has got the last report
        watched.close(address)


def test_the_run_does_not_wait_for_a_browser(workshop):
    result = npgpt_command("train", "text.txt", *QUICK, "--out", "alone.npz", "--watch", "0", cwd=workshop)
    assert result.returncode == 0, result.stderr
    plain = npgpt_command("train", "text.txt", *QUICK, "--out", "plain.npz", cwd=workshop)
    assert plain.returncode == 0
    one, other = (npgpt.load(workshop / f"{name}.npz").model.state_dict() for name in ("alone", "plain"))
    assert all(np.array_equal(one[name], other[name]) for name in one)  # watching changes no byte


def test_only_this_computer_and_its_own_pages_may_watch(workshop):
    with start(workshop, "--out", "safe.npz", "--steps", "100000", "--patience", "0", "--watch", "0") as process:
        address = address_of(process)
        try:
            for headers, status in (({"Host": "evil.example"}, 403), ({"Origin": "http://evil.example"}, 403), ({}, 200)):
                found, policy = status_of(address, headers)
                assert found == status
                assert status != 200 or "script-src 'sha256-" in policy
        finally:
            process.kill()


def status_of(address, headers):
    """(the status of the answer, its content-security policy)."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as response:
            return response.status, response.headers["Content-Security-Policy"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, None


def test_tensorboard(workshop):
    flags = ["--steps", "20", "--eval-interval", "5", "--log-interval", "2"]
    result = npgpt_command("train", "text.txt", *QUICK, *flags, "--out", "tb.npz", "--tensorboard", "logs/run", cwd=workshop)
    assert result.returncode == 0, result.stderr
    scalars, texts = read_tensorboard(workshop / "logs" / "run")
    log = read_log(workshop / "tb.jsonl")
    evaluations = {event["step"]: event for event in log if event["event"] == "evaluation"}
    steps = {event["step"]: event for event in log if event["event"] == "step"}
    assert sorted(scalars["val/loss"]) == sorted(evaluations) == [5, 10, 15, 20]
    assert sorted(scalars["train/loss"]) == list(range(1, 21))
    for step, event in evaluations.items():
        assert np.isclose(scalars["val/loss"][step], event["val_loss"], rtol=1e-6)
        assert np.isclose(scalars["val/bits_per_character"][step], event["bits_per_character"], rtol=1e-6)
    for step, event in steps.items():
        for name in ("loss", "grad_norm", "lr"):
            assert np.isclose(scalars[f"train/{name}"][step], event[name], rtol=1e-6)
    assert evaluations[20]["sample"].replace("\n", "\n    ") in texts["sample"][20]
    assert '"n_embd": 16' in texts["settings"][0]
    assert texts["end"][20].startswith("finished. ")


def read_tensorboard(folder):
    """(scalars by name and step, texts by name and step) in TensorBoard's files."""
    from tensorboardX.proto.event_pb2 import Event

    scalars, texts = {}, {}
    (path,) = folder.glob("events.out.tfevents.*")
    data = path.read_bytes()
    while data:  # a length in 8 bytes, its checksum in 4, the event, its checksum in 4
        length = int.from_bytes(data[:8], "little")
        event = Event()
        event.ParseFromString(data[12 : 12 + length])
        data = data[16 + length :]
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
            elif value.HasField("tensor"):
                texts.setdefault(value.tag.removesuffix("/text_summary"), {})[event.step] = value.tensor.string_val[0].decode()
    return scalars, texts
