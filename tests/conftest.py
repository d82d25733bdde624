"""What the tests share: a small text, a small model, a trained checkpoint, kernels and devices."""

import os
from pathlib import Path

# Tests run in several processes at once. BLAS threads in each of them would compete for the cores. NumPy reads this
# variable when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest
from support import devices

import npgpt
from npgpt.engine.backend import DeviceError, _why_no_cuda, bfloat16, select

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    missing = _why_no_cuda() if marked else None
    for item in marked if missing else []:
        item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def text() -> str:
    return npgpt.read_text(ROOT / "data" / "tiny.txt")


@pytest.fixture(scope="session")
def tokenizer(text):
    return npgpt.CharTokenizer.build_vocab(text)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def small_config(tokenizer) -> npgpt.GPTConfig:
    return npgpt.GPTConfig(tokenizer.vocab_size, block_size=16, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture
def trained(tmp_path, text, tokenizer, small_config):
    """The path of a checkpoint after six steps. The other files of its run are beside it."""
    config = npgpt.TrainConfig(steps=6, batch_size=4, eval_interval=3, sample_tokens=10, warmup_steps=2, log_interval=2)
    ids = tokenizer.encode_array(text[:4000])
    dataset = npgpt.Dataset(ids, small_config.block_size, config.batch_size, seed=config.seed)
    model = npgpt.GPT(small_config, seed=config.seed)
    out = tmp_path / "model.npz"
    list(npgpt.Trainer(model, tokenizer, dataset, config, out).run())
    return out


@pytest.fixture(params=["float32", "float64"])
def dtype(request) -> np.dtype:
    return np.dtype(request.param)


@pytest.fixture
def cuda_kernels(monkeypatch):
    """The CUDA kernels on NumPy's arrays."""
    return devices.kernels_on_numpy(monkeypatch)


@pytest.fixture(params=[pytest.param("run on the CPU", marks=devices.on_cpu), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The backend "cuda": first a pretended one that computes on the CPU, then the real one."""
    devices.use_two_warps(monkeypatch)
    return select("cuda") if request.param == "cuda" else devices.pretended_device(monkeypatch)


@pytest.fixture
def bf16():
    """The dtype bfloat16. The test is skipped if ml_dtypes is missing or NumPy is too old."""
    try:
        return bfloat16()
    except DeviceError as error:
        pytest.skip(str(error))
