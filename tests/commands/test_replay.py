"""`npgpt replay` as a user runs it."""

from studies import reliability

from npgpt.cli import main


def test_replay_repeats_the_step(tmp_path, capsys):
    run = reliability.trainer(tmp_path / "model.npz")
    events = run.run()
    next(events)
    run.model.wte.weight.data[...] = float("inf")
    end = list(events)[-1]
    assert main(["replay", str(tmp_path / "model.crash.npz")]) == 0
    out, err = capsys.readouterr()
    assert out == f"step 2, loss nan: {end.reason}\n" == "step 2, loss nan: the weight wte.weight is not finite\n"
    assert err == ""
    assert main(["inspect", str(tmp_path / "model.crash.npz")]) == 0
    assert "crash       the weight wte.weight" in capsys.readouterr().out
    run = reliability.trainer(tmp_path / "other.npz", steps=2)
    list(run.run())
    assert main(["replay", str(tmp_path / "other.npz")]) == 2
    assert "is not a crash file" in capsys.readouterr().err
