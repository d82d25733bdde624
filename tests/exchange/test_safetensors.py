"""The safetensors format: what is written can be read, and damaged files are refused before memory is taken."""

import json
import random
import tracemalloc

import numpy as np
import pytest

from npgpt import RequestError
from npgpt.exchange.safetensors import SafetensorsFile, write_safetensors


def write(path, arrays, dtype=np.float32):
    with path.open("wb") as file:
        write_safetensors(file, {name: a.shape for name, a in arrays.items()}, np.dtype(dtype), arrays.__getitem__)


def write_raw(path, header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def entry(begin, end, shape=(), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_round_trip(tmp_path, rng, dtype):
    arrays = {"a": rng.standard_normal((3, 4)), "b.c": rng.standard_normal(5), "t": rng.standard_normal((4, 2)).T}
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    write(tmp_path / "m.safetensors", arrays, dtype)
    file = SafetensorsFile(tmp_path / "m.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.tensor(name), array)
        assert file.tensor(name).dtype == np.float32
    assert file.shapes == {name: array.shape for name, array in arrays.items()}
    file.close()


def test_every_floating_point_dtype(tmp_path):
    values = np.array([1.0, -2.5, 0.0, 65504.0])
    path = tmp_path / "m.safetensors"
    bfloat16 = (values.astype("<f4").view("<u4") >> 16).astype("<u2")  # 65504 becomes 65280
    for dtype, stored in {"F64": values, "F32": values.astype("<f4"), "F16": values.astype("<f2"), "BF16": bfloat16}.items():
        write_raw(path, {"a": entry(0, stored.nbytes, [4], dtype)}, stored.tobytes())
        file = SafetensorsFile(path)
        found = file.tensor("a")
        file.close()
        np.testing.assert_array_equal(found, [1.0, -2.5, 0.0, 65280.0 if dtype == "BF16" else 65504.0])


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"{{", b"", "its header is not JSON"),
        (b"[]", b"", "not a JSON object"),
        (b"\xff\xff", b"", "its header is not JSON"),
        (b"[" * 100_000, b"", "its header is not JSON"),
        (b'{"a": 1, "a": 2}', b"", "a name occurs twice"),
        ({"a": []}, b"", "has no dtype, shape and data_offsets"),
        ({"a": entry(0, 4, [1], "F33")}, bytes(4), "a dtype, shape or data_offsets that cannot be"),
        ({"a": entry(0, 4, [1], ["F32"])}, bytes(4), "a dtype, shape or data_offsets that cannot be"),
        ({"a": entry(0, 4, [-1])}, bytes(4), "a dtype, shape or data_offsets that cannot be"),
        ({"a": entry(0, 4, [True])}, bytes(4), "a dtype, shape or data_offsets that cannot be"),
        ({"a": entry(0, 4, [2])}, bytes(4), "does not fit its data_offsets"),
        ({"a": entry(4, 0, [1])}, bytes(4), "does not fit its data_offsets"),
        ({"a": entry(0, 2**47, [2**45])}, bytes(4), "its tensors have 140,737,488,355,328 bytes, the file has 4"),
        ({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, bytes(4), "begins at 0, expected 4"),  # they overlap
        ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12), "begins at 8, expected 4"),  # a hole
        ({"a": entry(0, 4, [1])}, bytes(8), "its tensors have 4 bytes, the file has 8"),
    ],
)
def test_damaged_files(tmp_path, header, data, words):
    write_raw(tmp_path / "m.safetensors", header, data)
    with pytest.raises(RequestError, match=f"m.safetensors is not a safetensors file, or is damaged: .*{words}"):
        SafetensorsFile(tmp_path / "m.safetensors")


def test_headers_of_a_wrong_length(tmp_path):
    path = tmp_path / "m.safetensors"
    for length in (0, 1, 3, 2**40, 2**64 - 1):
        write_raw(path, b"{}", b"", length)
        with pytest.raises(RequestError, match="its header would have"):
            SafetensorsFile(path)
    path.write_bytes(b"abc")
    with pytest.raises(RequestError, match="its header would have"):
        SafetensorsFile(path)
    with pytest.raises(RequestError, match="cannot read"):
        SafetensorsFile(tmp_path / "none.safetensors")


def test_tensors_that_cannot_be_used(tmp_path):
    path = tmp_path / "m.safetensors"
    write_raw(path, {"a": entry(0, 4, [1]), "b": entry(4, 8, [1], "I32")}, np.array([np.nan], "<f4").tobytes() + bytes(4))
    file = SafetensorsFile(path)
    with pytest.raises(RequestError, match="tensor a has a number that is not finite"):
        file.tensor("a")
    with pytest.raises(RequestError, match="tensor b is of dtype I32, expected one of F64, F32, F16, BF16"):
        file.tensor("b")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RequestError, match="has become shorter"):
        file.tensor("a")
    file.close()


def test_fuzzed_headers(tmp_path, rng):
    """A damaged header is refused, or reads tensors of the file. It never takes memory beyond the file."""
    path = tmp_path / "m.safetensors"
    write(path, {f"h.{i}.weight": rng.standard_normal((4, 3)).astype(np.float32) for i in range(4)})
    good = path.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    draw, outcomes = random.Random(0), {True: 0, False: 0}
    tracemalloc.start()
    for _ in range(2000):
        bad = bytearray(good)
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(end)
            action = draw.randrange(4)
            if action == 0:
                bad[at] = draw.randrange(256)
            elif action == 1:
                bad[at] = draw.choice(b'0123456789[]{}",:-eF')
            elif action == 2:
                del bad[at : at + draw.randrange(1, 9)]
            else:
                bad[at:at] = draw.choice([b"0", b"99999999", b"-", b'"a":', b"[", b"1e9", b"\\u0000"])
        path.write_bytes(bad)
        try:
            file = SafetensorsFile(path)
            try:
                for name in file.shapes:
                    file.tensor(name)
                outcomes[True] += 1
            finally:
                file.close()
        except RequestError:
            outcomes[False] += 1
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()
    assert outcomes[False] > 1000
    assert sum(outcomes.values()) == 2000
