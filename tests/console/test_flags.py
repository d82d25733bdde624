"""Command-line flags made from settings, and the settings that a command line gives."""

from dataclasses import dataclass

import pytest

from npgpt.config.fields import Settings, required, setting
from npgpt.console.flags import add_flags, settings_from
from npgpt.console.terminal import command_parser


@dataclass(frozen=True)
class Oven(Settings):
    """Settings of an oven."""

    shelves: int = required("number of shelves", at_least=1)
    heat: float = setting(180.0, "temperature", above=0, at_most=300)
    mode: str = setting("fan", "how it heats", choices=("fan", "grill"))
    door_light: bool = setting(True, "whether the light in the door is on")
    minutes: int | None = setting(None, "time until it stops", at_least=1)


def parser(**options):
    found = command_parser("bake", "Bake a cake.", ["bin/bake --heat 200"])
    add_flags(found, Oven, **options)
    return found


def given(*arguments, **options):
    return settings_from(parser(**options).parse_args(arguments), Oven)


def test_only_the_flags_that_are_given_have_a_value():
    assert given() == {}
    assert given("--heat", "200") == {"heat": 200.0}
    assert vars(parser().parse_args([])) == {}


def test_texts_become_values():
    found = given("--shelves", "3", "--heat", "2e2", "--mode", "grill", "--minutes", "5")
    assert found == {"shelves": 3, "heat": 200.0, "mode": "grill", "minutes": 5}
    assert [type(value) for value in found.values()] == [int, float, str, int]


def test_a_yes_or_no_setting_has_two_flags():
    assert given("--door-light") == {"door_light": True}
    assert given("--no-door-light") == {"door_light": False}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shelves", "0"], "shelves must be a whole number at least 1, got 0"),
        (["--shelves", "two"], "shelves must be a whole number at least 1, got 'two'"),
        (["--shelves", "1.5"], "shelves must be a whole number at least 1, got '1.5'"),
        (["--heat", "hot"], "heat must be a number above 0 and at most 300, got 'hot'"),
        (["--heat", "301"], "heat must be a number above 0 and at most 300, got 301.0"),
        (["--minutes", "0"], "minutes must be a whole number at least 1, got 0"),
        (["--mode", "steam"], "'fan'|fan"),
    ],
)
def test_a_wrong_value_is_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        given(*arguments)
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert err.count("\n") == 1
    assert err.startswith(f"npgpt bake: argument {arguments[0]}: ")
    assert any(word in err for word in words.split("|"))


def test_skipped_settings_have_no_flag(capsys):
    assert given("--heat", "200", skip=["shelves"]) == {"heat": 200.0}
    with pytest.raises(SystemExit):
        given("--shelves", "3", skip=["shelves"])
    assert "unknown argument --shelves" in capsys.readouterr().err


def test_the_help_shows_every_flag_and_its_default():
    shown = " ".join(parser(defaults={"heat": 220.0}).format_help().split())
    for words in [
        "Settings of an oven",
        "--shelves N number of shelves --heat X",  # no default: it is required
        "--heat X temperature (default: 220.0)",
        "{fan,grill} how it heats (default: fan)",
        "--door-light, --no-door-light",
        "--minutes N time until it stops",
    ]:
        assert words in shown
