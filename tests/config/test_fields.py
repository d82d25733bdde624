"""How a setting is declared and checked: types, ranges, choices, defaults, and `from_dict`."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest

from npgpt import RequestError
from npgpt.config.fields import Settings, fields_of, required, setting


@dataclass(frozen=True)
class Oven(Settings):
    """Settings of an oven."""

    shelves: int = required("number of shelves", at_least=1)
    heat: float = setting(180.0, "temperature", above=0, at_most=300)
    mode: str = setting("fan", "how it heats", choices=("fan", "grill"))
    light: bool = setting(True, "whether the light is on")
    minutes: int | None = setting(None, "time until it stops", at_least=1, below=1000)


def test_values_that_are_not_given_have_their_defaults():
    assert dataclasses.asdict(Oven(2)) == {"shelves": 2, "heat": 180.0, "mode": "fan", "light": True, "minutes": None}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shelves": 0}, "shelves must be a whole number at least 1, got 0"),
        ({"heat": 0}, "heat must be a number above 0 and at most 300, got 0.0"),
        ({"heat": 300.5}, "heat must be a number above 0 and at most 300, got 300.5"),
        ({"minutes": 1000}, "minutes must be a whole number at least 1 and below 1000, got 1000"),
        ({"mode": "steam"}, "mode must be 'fan' or 'grill', got 'steam'"),
        ({"shelves": 2.0}, "shelves must be a whole number at least 1, got 2.0"),
        ({"shelves": "2"}, "shelves must be a whole number at least 1, got '2'"),
        ({"shelves": None}, "shelves must be a whole number at least 1, got None"),
        ({"shelves": True}, "shelves must be a whole number at least 1, got True"),
        ({"heat": True}, "heat must be a number above 0 and at most 300, got True"),
        ({"light": 1}, "light must be True or False, got 1"),
        ({"heat": float("nan")}, "heat must be a number above 0 and at most 300, got nan"),
        ({"heat": float("inf")}, "heat must be a number above 0 and at most 300, got inf"),
        ({"heat": 10**400}, "heat must be a number above 0 and at most 300, got 1000"),
    ],
)
def test_a_wrong_value_is_refused(values, message):
    with pytest.raises(RequestError) as caught:
        Oven(**{"shelves": 1} | values)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 200


def test_values_at_the_ends_of_a_range():
    assert Oven(1, heat=300, minutes=999).minutes == 999
    assert Oven(1, heat=5e-324).heat > 0


def test_a_whole_number_for_a_float_becomes_a_float():
    assert type(Oven(1, heat=200).heat) is float


def test_numpy_numbers_become_python_numbers():
    oven = Oven(np.int64(3), heat=np.float32(100.0), light=True)
    assert (type(oven.shelves), type(oven.heat)) == (int, float)
    assert (oven.shelves, oven.heat) == (3, 100.0)
    with pytest.raises(RequestError, match="light must be True or False"):
        Oven(1, light=np.True_)


def test_from_dict_is_the_inverse_of_asdict():
    oven = Oven(4, heat=250, mode="grill", light=False, minutes=20)
    assert Oven.from_dict(dataclasses.asdict(oven)) == oven
    assert Oven.from_dict({"shelves": 4}) == Oven(4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shelves": 1, "colour": "red"}, "Oven has no setting 'colour'"),
        ({"shelves": 1, "b": 1, "a": 1}, "Oven has no setting 'a', 'b'"),
        ({"heat": 100}, "Oven needs shelves"),
        ({"shelves": 1, 5: 1}, "Oven has no setting 5"),
    ],
)
def test_from_dict_refuses_unknown_and_missing_names(values, message):
    with pytest.raises(RequestError) as caught:
        Oven.from_dict(values)
    assert str(caught.value) == message


def test_the_declarations_are_listed_in_their_order():
    declared = list(fields_of(Oven))
    assert [f.name for f in declared] == ["shelves", "heat", "mode", "light", "minutes"]
    assert [f.type for f in declared] == [int, float, str, bool, int]
    assert [f.optional for f in declared] == [False] * 4 + [True]
    assert declared[0].default is dataclasses.MISSING
    assert declared[1].limits == {"above": 0, "at_most": 300}
    assert declared[2].choices == ("fan", "grill")
    assert declared[3].help == "whether the light is on"
