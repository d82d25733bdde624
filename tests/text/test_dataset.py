"""The dataset: the split of a text, its batches, the windows of an evaluation."""

import numpy as np
import pytest

from npgpt import Dataset, RequestError
from npgpt.text import dataset as dataset_module
from npgpt.text.dataset import length_to_train_on, repeated_share, window_starts, windows_at


def test_split_is_ninety_ten_in_order():
    data = Dataset(np.arange(1005), block_size=8, batch_size=2)
    assert len(data.val) == 100
    np.testing.assert_array_equal(np.concatenate([data.train, data.val]), np.arange(1005))
    assert len(Dataset(np.arange(100), 8, 2, val_fraction=0).val) == 0
    assert data.ids.dtype == np.uint16


def test_a_text_that_was_split_before_it_was_encoded():
    data = Dataset(np.arange(1000), block_size=8, batch_size=2, n_train=777)
    assert (len(data.train), len(data.val), data.val_fraction) == (777, 223, 0.1)
    assert [length_to_train_on(n, 0.1) for n in (0, 9, 10, 1005)] == [0, 9, 9, 905]


def test_batches_are_shifted_windows_of_their_split():
    data = Dataset(np.arange(1000), block_size=8, batch_size=64)
    for name, low, high in (("train", 0, 900), ("val", 900, 1000)):
        x, y = data.get_batch(name)
        assert x.shape == y.shape == (64, 8)
        np.testing.assert_array_equal(y, x + 1)
        np.testing.assert_array_equal(np.diff(x), 1)
        assert x.min() >= low
        assert y.max() < high


def test_every_window_can_be_drawn_and_no_other():
    data = Dataset(np.arange(12), block_size=8, batch_size=500, val_fraction=0)
    x, _ = data.get_batch("train")
    assert set(x[:, 0]) == {0, 1, 2, 3}


def test_batch_k_is_a_function_of_seed_and_k():
    a, b = (Dataset(np.arange(500), 8, 4, seed=5) for _ in range(2))
    drawn = [a.get_batch("train")[0] for _ in range(4)]
    b.get_batch("val")
    for k in (3, 0, 2):
        np.testing.assert_array_equal(b.get_batch("train", k)[0], drawn[k])
    np.testing.assert_array_equal(b.get_batch("train")[0], drawn[0])
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(Dataset(np.arange(500), 8, 4, seed=6).get_batch("train")[0], drawn[0])


def test_windows_lie_side_by_side():
    for n in (1, 2, 8, 9, 10, 17, 50):
        starts = window_starts(n, block_size=8)
        x, y = windows_at(np.arange(n), starts, 8)
        np.testing.assert_array_equal(y, x + 1)
        np.testing.assert_array_equal(y.ravel(), np.arange(1, 8 * len(starts) + 1))
        assert n - 1 - y.size < 8  # fewer ids than a window are left over


def test_some_windows_are_spread_evenly():
    assert window_starts(1001, 10, max_tokens=40).tolist() == [0, 250, 500, 750]
    assert window_starts(1001, 10, max_tokens=3).tolist() == [0]
    np.testing.assert_array_equal(window_starts(1001, 10, max_tokens=5000), window_starts(1001, 10))


def test_bad_datasets():
    with pytest.raises(RequestError, match=r"too short.*8 tokens.*needs 9"):
        Dataset(np.arange(8), block_size=8, batch_size=1, val_fraction=0)
    with pytest.raises(RequestError, match="val part has 2"):
        Dataset(np.arange(20), block_size=8, batch_size=1).get_batch("val")
    with pytest.raises(RequestError, match="integers"):
        Dataset([0.5] * 20, 8, 1)
    with pytest.raises(RequestError, match="integers"):
        Dataset([-1] * 20, 8, 1)
    with pytest.raises(RequestError, match="val_fraction"):
        Dataset(np.arange(20), 8, 1, val_fraction=1.0)
    with pytest.raises(ValueError, match="split"):
        Dataset(np.arange(20), 8, 1).get_batch("test")


# ---------------------------------------------------------------- held-out text that is a copy


def test_repeated_held_out_text_is_found(text, tokenizer):
    ids = tokenizer.encode_array(text)
    for once, share in ((ids, 0.0), (np.tile(ids, 2), 1.0)):
        data = Dataset(once, 8, 2)
        assert repeated_share(data.train, data.val) == data.repeated_share == pytest.approx(share, abs=0.01)
    mixed = np.concatenate([ids[1000:6000], np.random.default_rng(0).integers(0, 60, 5000, dtype=ids.dtype)])
    assert repeated_share(ids, mixed) == pytest.approx(0.5, abs=0.02)
    assert Dataset(np.tile(ids, 3), 16, 4).repeated_share == 1.0


def test_short_texts_have_no_repeated_share():
    assert repeated_share(np.zeros(1000, np.uint8), np.zeros(63, np.uint8)) == 0.0
    assert repeated_share(np.zeros(63, np.uint8), np.zeros(1000, np.uint8)) == 0.0
    assert repeated_share(np.zeros(64, np.uint8), np.zeros(64, np.uint8)) == 1.0


def test_a_long_text_is_searched_in_parts(monkeypatch, text, tokenizer):
    ids = tokenizer.encode_array(text[:20_000])
    expected = repeated_share(ids, ids[3000:9000])
    monkeypatch.setattr(dataset_module, "HASHED_AT_ONCE", 100)
    assert repeated_share(ids, ids[3000:9000]) == expected == 1.0
