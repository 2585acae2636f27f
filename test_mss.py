"""Fast tests: no downloads, a GPU only if there is one. python -m pytest -q test_mss.py

In the order of the product: the paper, using a model, songs, files, training, separating,
evaluating, and what the project promises its readers. Real data and the published network's
fixture are used where the environment variable MSS_TEST_DATA names their folder. -k cuda selects
what needs a GPU; all else runs on the CPU, wherever it is.
"""
import os

# The environment decides nothing, neither here nor in the processes that are started: it names no
# songs, and no launcher's ranks; texts are as wide and as plain as anywhere. Before our modules
# are imported, which read some of it.
FOREIGN = ("MUSDB_PATH", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "PET_",
           "TORCH", "FORCE_COLOR", "PYTHON_COLORS", "PYTHONWARNINGS")
for name in [name for name in os.environ if name.startswith(FOREIGN)]:
    del os.environ[name]
os.environ.update(COLUMNS="80", NO_COLOR="1")

# One thread: the networks are tiny, and on a busy machine threads mostly wait for each other.
# Before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

# What makes cuBLAS give the same bits again and again; before it is first used.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

# Nothing is downloaded, nor is anything in the cache: the default weights are the bundled ones.
os.environ["https_proxy"] = "http://127.0.0.1:9"                      # where nobody listens
os.environ["no_proxy"] = "127.0.0.1"
os.environ["TORCH_HOME"] = "/nonexistent"

import base64
import contextlib
import csv
import dataclasses
import errno
import functools
import gzip
import hashlib
import html
import http.server
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import xml.etree.ElementTree
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn as nn
import torch.nn.functional as F

import baselines
import evaluate
import mss
import separate
import train

mss.keep_memory()
HERE = Path(mss.__file__).parent
RATE = 44100
TABLE_3 = (
    "UNetPhase", "UNet", "UNetDecouple", "UNetDecouple+", "ResUNet", "ResUNetDecouple",
    "ResUNetDecouple+")
RELATIVES = ("Wave-U-Net", "Wave-U-Net-12", "DPRNN", "PM-Unet", "PM-Unet-conv", "Open-Unmix")
SUBBANDS = ("ResUNetDecouple+-subband", "MobileNet-subband")
ON_BANDS = ("ResUNetDecouple+-bands", "UNet-TDF-bands")
ROWS = tuple(mss.MODELS)
PAIR = ("vocals", "accompaniment")
PATIENCE = 3600         # s until a subprocess counts as hanging, however slow the machine
needs_ffmpeg = pytest.mark.skipif(
    not shutil.which("ffmpeg"), reason="the program ffmpeg is not on PATH")

# ---- What the tests share -----------------------------------------------------------------------

def data(name):
    """A folder of real data, or skip."""
    root = os.environ.get("MSS_TEST_DATA")
    if not root or not Path(root, name).exists():
        pytest.skip(f"MSS_TEST_DATA holds no {name}")
    return Path(root, name)

def small(name="UNetDecouple+", **changes):
    """(config, model) of few features and bins: the same code in milliseconds."""
    torch.manual_seed(0)
    window = 512 if name.startswith("PM") or name in ON_BANDS else 256  # pooled by more
    sizes = {"window": window, "hop": 64, "width": 2, **changes}
    config = mss.Config(model=name, **sizes)
    return config, mss.MODELS[name](config)

def noise(*shape, seed=0, scale=0.1):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def batch_norms(model):
    """{path: module}"""
    kind = nn.modules.batchnorm._BatchNorm
    return {path: module for path, module in model.named_modules() if isinstance(module, kind)}

def equal(a, b):
    """Whether two dicts hold the same tensors."""
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)

def read_csv(path):
    return list(csv.DictReader(Path(path).read_text(encoding="utf-8").splitlines()))

def stems(folder, *names):
    names = names or ("vocals.wav", "accompaniment.wav")
    return [mss.read_audio(folder / name)[0] for name in names]

@pytest.fixture(scope="session", autouse=True)
def the_cpu_unless_told():
    """What names no device runs on the CPU, where there is a GPU, too."""
    picked = mss.pick_device
    mss.pick_device = lambda name: picked("cpu" if name == "auto" else name)
    yield
    mss.pick_device = picked

def present(device):
    """The name of a device, or skip."""
    if device != "cpu" and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU that it can use by CUDA")
    return device

@pytest.fixture(params=("cpu", "cuda"))
def device(request, monkeypatch):
    """The name of each device; what a test lets cuDNN do ends with the test."""
    cudnn = torch.backends.cudnn
    for name in ("benchmark", "allow_tf32", "deterministic"):
        monkeypatch.setattr(cudnn, name, getattr(cudnn, name))
    if present(request.param) != "cpu":
        monkeypatch.setattr(cudnn, "benchmark_limit", 1)              # tries of each: for speed
    return request.param

@pytest.fixture(scope="session")
def songs(tmp_path_factory):
    """The built-in data, small: 3 + 1 + 1 songs of 3 s."""
    root = tmp_path_factory.mktemp("data") / "songs"
    return train.synthetic_musdb(root, songs=(("train", 3), ("valid", 1), ("test", 1)), seconds=3)

@pytest.fixture
def checkpoint(tmp_path):
    config, model = small()
    path = tmp_path / "small.pt"
    mss.save_checkpoint(path, config, model, step=7)
    return path

def call(main, *argv):
    """Run a script's main as its command line would -> (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in train.SIGNALS}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as stop:
            mss.run(lambda: main([str(word) for word in argv]))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return stop.value.code, out.getvalue(), err.getvalue()

def fails(main, *argv, saying):
    """The call must exit with code 2 and one line on stderr that holds every word of `saying`."""
    code, out, err = call(main, *argv)
    lines = [line for line in err.splitlines() if not line.startswith("notice: ")]
    assert code == 2 and len(lines) == 1, (code, err)
    for word in saying:
        assert word in err

def start(*command, **options):
    """Start a script of ours as from a shell's prompt, whatever pytest was started by.

    In the background SIGINT is ignored, and under nohup SIGHUP; a child would inherit that.
    """
    if os.name != "posix":
        pytest.skip("signals as these are POSIX's")

    def listen():
        for number in train.SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen([sys.executable, *command], preexec_fn=listen, **options)

def torchrun(*command):
    """Run a script in two processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*run, *map(str, command)], capture_output=True, text=True,
                          timeout=PATIENCE, env={**os.environ, "OMP_NUM_THREADS": "1"})

def flags(songs, out, **changes):
    """A train.py command: 8 steps of a tiny network, validated, saved and logged often."""
    values = dict(
        musdb=songs, out=out, model="UNetDecouple+", width=2, steps=8, batch_size=2, segment=0.5,
        workers=0, validate_every=3, save_every=3, log_every=2, device="cpu")
    words = []
    for name, value in {**values, **changes}.items():
        if value is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    return words

@pytest.fixture(scope="session")
def trained(songs, tmp_path_factory):
    """OUT of a run of 8 steps."""
    out = tmp_path_factory.mktemp("runs") / "eight"
    code, stdout, _ = call(train.main, *flags(songs, out))
    assert code == 0
    assert "step 8/8" in stdout and "ms/step" in stdout and "data wait" in stdout
    return out

# ---- Spectrograms and rules ---------------------------------------------------------------------

def spectrogram(seed, *shape):
    return torch.complex(noise(*shape, seed=seed, scale=1), noise(*shape, seed=seed + 1, scale=1))

def test_stft_is_the_textbooks():
    x = noise(2, 44101, scale=1)
    padded = np.pad(x.numpy().astype("float64"), [(0, 0), (1024, 1024)], mode="reflect")
    starts = range(0, padded.shape[1] - 2047, 441)
    frames = np.stack([padded[:, t:t + 2048] for t in starts], axis=1)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(2048) / 2048)

    X = mss.stft(x).numpy()

    assert X.shape == (2, 101, 1025)
    np.testing.assert_allclose(X, np.fft.rfft(frames * hann), atol=2e-4)

def test_spectrograms_of_inference_can_be_followed_by_gradients():
    """Windows are made once for both."""
    mss.hann_window.cache_clear()
    with torch.inference_mode():
        mss.istft(mss.stft(noise(1, 5000)), 5000)
    x = noise(1, 5000).requires_grad_()

    mss.istft(mss.stft(x), 5000).square().sum().backward()

    assert torch.allclose(x.grad, 2 * x, rtol=0, atol=1e-5)

@pytest.mark.parametrize("length", [0, 1, 2, 3, 441, 1023, 1024, 1025, 1027, 44101])
def test_istft_inverts_stft(length):
    x = noise(1, 2, length)

    y = mss.istft(mss.stft(x), length)

    assert y.shape == x.shape
    assert torch.allclose(x, y, rtol=0, atol=1e-6)

@pytest.fixture
def given():
    """A spectrogram and heads, some bins of them silent and some without any direction.

    As tensors X, mask, q, p_r, p_i; as numpy's, in double precision, x and sigmoid.
    """
    X = spectrogram(0, 1, 1, 2, 30, 40)
    mask, q, p_r, p_i = (noise(*X.shape, seed=seed, scale=2) for seed in range(5, 9))
    X[..., :3] = 0
    p_r[..., 5] = 0
    p_i[..., 5] = 0

    x = X.numpy().astype("complex128")
    sigmoid = 1 / (1 + np.exp(-mask.numpy().astype("float64")))
    return types.SimpleNamespace(X=X, mask=mask, q=q, p_r=p_r, p_i=p_i, x=x, sigmoid=sigmoid)

def turned(x, p_r, p_i):
    """e^(j angle) of x, turned by the direction of p_r + j p_i; 0 where that has none."""
    p = p_r.numpy() + 1j * p_i.numpy()
    return np.exp(1j * (np.angle(x) + np.angle(p))) * (p != 0)

def test_magnitude_mask_against_angles(given):
    Y = mss.magnitude_mask(given.X, given.mask)

    expected = given.sigmoid * np.abs(given.x) * np.exp(1j * np.angle(given.x))
    np.testing.assert_allclose(Y.numpy(), expected, atol=2e-5)

def test_complex_mask_against_angles(given):
    Y = mss.complex_mask(given.X, given.p_r, given.p_i)

    length = np.hypot(given.p_r.numpy(), given.p_i.numpy())
    expected = np.tanh(length) * np.abs(given.x) * turned(given.x, given.p_r, given.p_i)
    np.testing.assert_allclose(Y.numpy(), expected, atol=2e-5)

def test_decouple_against_angles(given):
    Y = mss.decouple(given.X, given.mask, given.p_r, given.p_i)

    turn = turned(given.x, given.p_r.tanh(), given.p_i.tanh())
    expected = given.sigmoid * np.abs(given.x) * turn
    np.testing.assert_allclose(Y.numpy(), expected, atol=2e-5)

def test_decouple_plus_against_angles(given):
    Y = mss.decouple_plus(given.X, given.mask, given.q, given.p_r, given.p_i)

    # Where the mixture is silent it has no phase that q could be added to.
    magnitude = np.maximum(given.sigmoid * np.abs(given.x) + given.q.numpy(), 0) * (given.x != 0)
    turn = turned(given.x, given.p_r.tanh(), given.p_i.tanh())
    np.testing.assert_allclose(Y.numpy(), magnitude * turn, atol=2e-5)

@pytest.mark.parametrize("rule", [mss.magnitude_mask, mss.complex_mask, mss.decouple])
def test_no_other_rule_exceeds_the_mixture(rule):
    X = spectrogram(0, 1, 1, 2, 30, 40)
    heads = {name: noise(*X.shape, seed=5 + i, scale=30) for i, name in enumerate(mss.HEADS[rule])}

    Y = rule(X, **heads)

    assert (Y.abs() <= X.abs() * (1 + 1e-5)).all()

def test_decouple_plus_exceeds_the_mixture_and_so_can_be_ideal():
    X = spectrogram(0, 1, 1, 2, 30, 40)
    S = spectrogram(3, 1, 1, 2, 30, 40)
    mask = noise(*X.shape, seed=5)
    q = S.abs() - torch.sigmoid(mask) * X.abs()
    direction = 0.9 * (S / X) / (S / X).abs()

    Y = mss.decouple_plus(X, mask, q, direction.real.atanh(), direction.imag.atanh())

    assert (S.abs() > 2 * X.abs()).any()
    assert torch.allclose(Y, S, rtol=0, atol=1e-5)

# ---- The network --------------------------------------------------------------------------------

def without_memory(config):
    """The model in its full size, on the device that has no memory."""
    with torch.device("meta"):
        return mss.MODELS[config.model](config)

def size(model):
    return sum(parameter.numel() for parameter in model.parameters())

def test_the_first_rows_are_table_3s():
    assert tuple(mss.MODELS)[:7] == TABLE_3

def test_the_other_rows_are_the_relatives_and_have_recipes():
    assert tuple(mss.MODELS)[7:] == RELATIVES + SUBBANDS + ON_BANDS
    assert set(train.RECIPES) <= set(mss.MODELS)

@pytest.mark.parametrize("name, layers, maps", [
    ("UNetPhase", 33, 4),
    ("UNet", 33, 2),
    ("UNetDecouple", 33, 6),
    ("UNetDecouple+", 33, 8),
    ("ResUNet", 143, 2),
    ("ResUNetDecouple", 143, 6),
    ("ResUNetDecouple+", 143, 8),
])
def test_a_row_of_table_3_has_the_papers_layers(name, layers, maps):
    model = without_memory(mss.Config(model=name))

    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    modules = model.backbone.named_modules()
    convolutions = [path for path, module in modules if isinstance(module, kinds)]
    counted = [path for path in convolutions if "shortcut" not in path]

    assert len(counted) + 1 == layers                                 # the heads are the last one
    assert sum(head.out_channels for head in model.heads.values()) == maps

@pytest.mark.parametrize("name, parameters", [
    ("UNet", 18_127_812),
    ("UNetDecouple+", 18_128_010),
    ("ResUNet", 102_571_080),
    ("ResUNetDecouple", 102_571_212),
    ("ResUNetDecouple+", 102_571_278),
])
def test_a_row_of_table_3_is_as_large_as_published(name, parameters):
    assert size(without_memory(mss.Config(model=name))) == parameters

# Wave-U-Net-12 is the stereo M4; DPRNN has asteroid's body, on stereo spectrograms of 1025 bins.
@pytest.mark.parametrize("name, sources, parameters", [
    ("Wave-U-Net", "vocals,bass,drums,other", 21_599_811),
    ("Wave-U-Net-12", "vocals,accompaniment", 10_263_390),
    ("DPRNN", "vocals,accompaniment", 4_692_105),
    ("DPRNN", "vocals", 4_675_593),
    ("PM-Unet", "vocals,bass,drums,other", 53_674_992),
    ("PM-Unet-conv", "vocals,bass,drums,other", 41_605_872),
    ("Open-Unmix", "vocals", 8_893_348),
    ("Open-Unmix", "vocals,bass,drums,other", 4 * 8_893_348),
    ("ResUNetDecouple+-subband", "vocals", 102_572_466),
    ("MobileNet-subband", "vocals", 306_418),
])
def test_a_relative_is_as_large_as_published(name, sources, parameters):
    args = train.parse(["--musdb", "songs", "--model", name, "--source", sources])

    model = without_memory(train.config_of(args))

    assert size(model) == parameters

def test_the_larger_open_unmix_is_as_large_as_published():
    config = mss.Config("Open-Unmix", width=1024, window=4096, hop=1024)

    assert size(without_memory(config)) == 28_257_188

def script_of(path):
    """A Python file, imported."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A file with the published weights' keys and shapes, and made-up values."""
    module = script_of(data("published_resunet143") / "make_checkpoint.py")
    name = "resunet143_ismir2021_accompaniment_16.8dB_350k_steps.pth"
    path = tmp_path_factory.mktemp("published") / name
    torch.save(module.checkpoint(), path)
    yield path
    path.unlink()                                                     # 461 MB

def theirs_and_ours(model, device="cpu", bf16=False):
    """(what the published code gave, what the model gives)"""
    fixture = np.load(data("published_resunet143") / "fixture.npz")
    x = torch.from_numpy(fixture["x"]).to(device)
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bf16):
        y = model(x)[:, 0]
    return fixture["y"], y.cpu().numpy()

def test_the_published_networks_output_comes_back(device, published, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    config, model, state = mss.load_checkpoint(published, device)

    theirs, ours = theirs_and_ours(model, device)

    assert config.targets == ("accompaniment",)
    assert state["step"] == 350_000
    assert np.abs(theirs).max() > 0.1
    assert np.abs(theirs - ours).max() < {"cpu": 2e-6, "cuda": 1e-5}[device]

def test_the_published_networks_output_comes_back_when_folded(published):
    _, model, _ = mss.load_checkpoint(published)

    theirs, ours = theirs_and_ours(mss.fold_batch_norms(model))

    assert np.abs(theirs - ours).max() < 2e-6

@pytest.mark.parametrize("name", TABLE_3)
def test_batch_norms_are_the_published_codes(name):
    norms = batch_norms(without_memory(mss.Config(model=name)))

    assert {(norm.momentum, norm.eps) for norm in norms.values()} == {(0.01, 1e-5)}

@pytest.mark.parametrize("name", ["UNet", "ResUNetDecouple+"])
def test_the_first_weights_are_xaviers_and_the_first_biases_zero(name):
    _, model = small(name, width=8)

    for path, parameter in model.named_parameters():
        if path.endswith("bias"):
            assert not parameter.any(), path
        elif parameter.dim() == 4:
            fans = sum(parameter.shape[:2]) * parameter[0, 0].numel()
            bound = (6 / fans) ** 0.5                                 # of a uniform distribution
            assert 0.7 * bound < parameter.abs().max() <= bound, path
        else:
            assert (parameter == 1).all(), path

def test_a_unets_block_is_two_convolutions_each_with_norm_and_leaky_relu():
    block = mss.ConvBlock(2, 3).eval()
    first, norm, _, second, another_norm, _ = block
    x = noise(1, 2, 5, 5, scale=1)
    norm.running_mean.fill_(0.3)
    another_norm.running_mean.fill_(-0.2)

    expected = norm(F.conv2d(x, first.weight, padding=1))
    expected = torch.where(expected > 0, expected, 0.01 * expected)
    expected = another_norm(F.conv2d(expected, second.weight, padding=1))
    expected = torch.where(expected > 0, expected, 0.01 * expected)

    with torch.no_grad():
        assert torch.allclose(block(x), expected, rtol=0, atol=1e-5)

@pytest.fixture(scope="session")
def relatives(tmp_path_factory):
    """A function: a network, targets -> files in its published layout, with made-up values."""
    module = script_of(data("published_relatives") / "make_checkpoints.py")
    folder = tmp_path_factory.mktemp("relatives")

    def write(network, *targets):
        paths = [folder / f"{network}-{target}.pth" for target in targets]
        for path, target in zip(paths, targets):
            if network == "umxhq":
                content = module.state(network, f"{target}/")
            else:
                content = {"step": 500_000, "model": module.state(network)}
            torch.save(content, path)
        return paths

    yield write
    shutil.rmtree(folder)                                             # 550 MB

@pytest.mark.parametrize("network, row, parameters", [
    ("mobilenet", "MobileNet-subband", 306_418),
    ("resunet143_subband", "ResUNetDecouple+-subband", 102_572_466),
])
def test_a_published_subband_networks_output_comes_back(relatives, network, row, parameters):
    fixture = np.load(data("published_relatives") / "fixture.npz")
    (path,) = relatives(network, "accompaniment")

    config, model, state = mss.load_checkpoint(path)

    assert (config.model, config.targets) == (row, ("accompaniment",))
    assert size(model) == parameters
    assert state["step"] == 500_000
    expected = fixture[f"{network}_y"]
    with torch.inference_mode():
        y = model(torch.from_numpy(fixture[f"{network}_x"]))[:, 0].numpy()
        folded = mss.fold_batch_norms(model)
        y_folded = folded(torch.from_numpy(fixture[f"{network}_x"]))[:, 0].numpy()
    assert np.abs(expected).max() > 0.1
    assert np.abs(y - expected).max() < 2e-6
    assert np.abs(y_folded - expected).max() < 2e-6

def test_open_unmixs_output_comes_back(relatives):
    """In float64: float32's rounding is a millionth, here and in the published code's output."""
    fixture = np.load(data("published_relatives") / "fixture.npz")
    names = ("vocals", "drums", "bass", "other")
    alone = [mss.load_checkpoint(path)[1] for path in relatives("umxhq", *names)]
    together = mss.join_open_unmix(alone)
    mixture = torch.from_numpy(fixture["umxhq_x"]).double()

    with torch.inference_mode():
        plain = torch.cat([model.double()(mixture) for model in alone], dim=1)[..., ::16]
        filtered = together.double()(mixture)[..., ::16]

    assert together.config.targets == names
    assert np.abs(plain.numpy() - fixture["umxhq_y0_every_16th"]).max() < 1e-6
    assert np.abs(filtered.numpy() - fixture["umxhq_y1_every_16th"]).max() < 1e-6

@pytest.mark.parametrize("length", (0, 1, 3, 4, 64, 4001, 4002, 4003))
def test_a_waveform_comes_back_from_its_bands(length):
    x = noise(1, 2, length, scale=1)
    bank = mss.FilterBank()

    bands = bank.split(x)
    y = bank.join(bands[:, None], length)[:, 0]

    assert bands.shape == (1, 8, math.ceil(length / 4) + 16)
    assert y.shape == x.shape
    assert torch.allclose(x, y, rtol=0, atol=1e-3)
    if length > 4000:
        assert mss.sdr(x, y) > 80

@pytest.mark.parametrize("band", range(4))
def test_a_sine_is_in_its_band(band):
    frequency = (band + 0.5) * RATE / 8
    sine = torch.sin(2 * math.pi * frequency / RATE * torch.arange(RATE / 4))

    bands = mss.FilterBank().split(sine[None, None])[0]

    power = bands[:, 100:-100].square().mean(dim=1)
    assert power[band] == pytest.approx(0.5, rel=0.01)
    assert power.sum() - power[band] < 1e-4

def test_bands_of_a_spectrogram_become_channels_and_are_put_back():
    config = mss.Config("UNet-TDF-bands", width=8, window=512, hop=128)
    head = mss.BandsHead(8, 2, 1)
    with torch.no_grad():
        head.weight.copy_(torch.eye(8)[..., None, None])
        head.bias.zero_()
    bands = mss.Bands(config, mss.unet)
    bands.backbone = nn.Identity()
    x = noise(1, 2, 3, 256)                                           # (B, C, T, F - 1)

    y = bands(x)

    assert y.shape == (1, 8, 3, 64)
    assert torch.equal(y[:, 2:4], x[..., 64:128])                     # the second band's channels
    assert torch.equal(head(y), x)

def test_of_stereo_the_middle_and_the_side_are_seen_too():
    left, right = spectrogram(0, 5, 3), spectrogram(1, 5, 3)

    inputs = mss.with_middle_and_sides(torch.stack([left, right])[None])[0]

    expected = torch.stack([left, right, (left + right) / 2, (left - right) / 2])
    torch.testing.assert_close(inputs, expected.abs().clamp(min=1e-5))

def test_what_sees_the_middle_takes_mono_and_odd_widths():
    _, model = small("UNet-TDF-bands", targets=PAIR, channels=1, width=3)

    estimates = model(noise(2, 1, 3000))

    assert estimates.shape == (2, 2, 1, 3000)
    assert torch.isfinite(estimates).all()

def test_mono_is_its_own_middle():
    X = spectrogram(0, 1, 1, 5, 3)

    inputs = mss.with_middle_and_sides(X)

    torch.testing.assert_close(inputs, mss.magnitude_of(X).repeat(1, 2, 1, 1))

def test_the_wiener_filter_is_the_textbooks():
    X = spectrogram(0, 1, 2, 5, 3) * 40                               # loud: scaled, too
    Y = spectrogram(2, 1, 3, 2, 5, 3) * 10

    filtered = baselines.wiener(X, Y).numpy()

    x, y = X[0].numpy().astype("complex128"), Y[0].numpy().astype("complex128")
    scale = abs(x).max() / 10
    assert scale > 1
    for f in range(3):
        v = (abs(y[..., f] / scale) ** 2).mean(axis=1)                # (S, T)
        R = np.einsum("sct,sdt->scd", y[..., f], y[..., f].conj()) / scale ** 2
        R /= (1e-10 + v.sum(axis=1))[:, None, None]
        for t in range(5):
            both = v[:, t, None, None] * R
            inverse = np.linalg.inv(1e-5 * np.eye(2) + both.sum(axis=0))
            expected = both @ inverse @ x[:, t, f]                    # (S, C)
            np.testing.assert_allclose(filtered[0, :, :, t, f], expected, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("targets", [mss.SOURCES, PAIR], ids=["four stems", "two stems"])
def test_open_unmix_filters_what_makes_up_the_mixture(targets):
    _, model = small("Open-Unmix", targets=targets)
    mixture = noise(1, 2, 8000)

    with torch.inference_mode():
        y = model.eval()(mixture)

    assert mss.sdr(mixture, y.sum(1)) > 40

def test_open_unmix_filters_no_single_stem():
    _, model = small("Open-Unmix")
    model.eval()
    X = spectrogram(0, 1, 2, 20, 129)

    with torch.inference_mode():
        Y = model.backbone(X)[:, 0]
        mask = model.backbone.networks[0](X.abs())

    assert torch.equal(Y, mask * X)

@pytest.mark.parametrize("name", ROWS)
def test_a_row_takes_any_length(name):
    _, model = small(name, targets=PAIR)
    model.eval()

    for length in (0, 1, 2, 127, 128, 129, 4000, 4097):
        with torch.inference_mode():
            assert model(noise(1, 2, length)).shape == (1, 2, 2, length)

def gradients_of_a_row(name, mixture, bf16=False):
    """{parameter: gradient} of an L1 loss against constants, so that silence has one, too."""
    _, model = small(name, targets=PAIR)
    model.to(mixture.device, memory_format=torch.channels_last).train()
    targets = torch.tensor([0.3, -0.3]).view(2, 1, 1).to(mixture.device)
    with torch.autocast(mixture.device.type, torch.bfloat16, enabled=bf16):
        estimates = model(mixture)
    loss = (estimates - targets).abs().mean()
    loss.backward()
    return {path: parameter.grad for path, parameter in model.named_parameters()}

@pytest.mark.parametrize("bf16", (False, True), ids=("float32", "bf16"))
@pytest.mark.parametrize("name", ROWS)
def test_every_parameter_of_a_row_learns(name, bf16, device):
    gradients = gradients_of_a_row(name, noise(2, 2, 3000).to(device), bf16)

    for path, gradient in gradients.items():
        assert gradient is not None, path
        assert torch.isfinite(gradient).all(), path
        assert gradient.any(), path

@pytest.mark.parametrize("name", ROWS)
def test_silence_gives_a_row_finite_gradients(name):
    gradients = gradients_of_a_row(name, torch.zeros(2, 2, 3000))

    for path, gradient in gradients.items():
        assert gradient is not None, path
        assert torch.isfinite(gradient).all(), path

def as_if_trained(name, targets=PAIR):
    """(config, model) whose batch norms differ from identities."""
    config, model = small(name, targets=targets)
    for norm in batch_norms(model).values():
        for values in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            values.uniform_(0.5, 1.5)
    return config, model.eval()

@pytest.mark.parametrize("name", ROWS)
def test_a_row_comes_back_from_its_checkpoint(name, tmp_path):
    config, model = as_if_trained(name)
    mss.save_checkpoint(tmp_path / "model.pt", config, model.train(), step=3)

    config_read, model_read, state = mss.load_checkpoint(tmp_path / "model.pt")

    assert config_read == config
    assert state == {"step": 3}
    assert not model_read.training
    assert equal(model.state_dict(), model_read.state_dict())

def test_weights_of_half_precision_are_read_as_float32(tmp_path):
    config, model = small()
    mss.save_checkpoint(tmp_path / "half.pt", config, model.half())

    _, read, _ = mss.load_checkpoint(tmp_path / "half.pt")

    assert {parameter.dtype for parameter in read.parameters()} == {torch.float32}

@pytest.mark.parametrize("name", ["UNet-TDF-bands", "DPRNN", "MobileNet-subband"])
def test_weights_in_8_bits_come_back_but_for_rounding(name, tmp_path):
    config, model = as_if_trained(name)
    parameters = dict(model.named_parameters())
    mss.save_checkpoint(tmp_path / "small.pt", config, model, small=True, step=3)

    config_read, read, state = mss.load_checkpoint(tmp_path / "small.pt")

    assert (config_read, state) == (config, {"step": 3})
    assert list(read.state_dict()) == list(model.state_dict())
    for key, expected in model.state_dict().items():
        value = read.state_dict()[key]
        assert value.dtype == expected.dtype
        if key not in parameters or expected.dim() < 2:               # a bank's filters, too
            assert torch.equal(value, expected)
        else:
            largest = expected.abs().flatten(1).amax(dim=1)
            error = (value - expected).abs().flatten(1).amax(dim=1)
            assert (error <= largest / 253).all()                     # half of a 127th

def test_filters_of_zeros_and_of_next_to_nothing_are_stored_in_8_bits(tmp_path):
    config, model = small("UNet", targets=("vocals",))
    model.heads["mask"].weight.data[0] = 0
    model.heads["mask"].weight.data[1] = torch.tensor([1e-6, -1e-7])[:, None, None]
    mss.save_checkpoint(tmp_path / "small.pt", config, model.half(), small=True)

    _, read, _ = mss.load_checkpoint(tmp_path / "small.pt")

    expected = model.heads["mask"].weight.float()
    torch.testing.assert_close(read.heads["mask"].weight, expected, rtol=0, atol=1e-8)

def test_small_weights_fill_a_third_of_the_file_at_most(tmp_path):
    config, model = small("UNet-TDF-bands", width=16)
    mss.save_checkpoint(tmp_path / "model.pt", config, model)
    mss.save_checkpoint(tmp_path / "small.pt", config, model, small=True)

    sizes = [(tmp_path / name).stat().st_size for name in ("model.pt", "small.pt")]

    assert sizes[1] < sizes[0] / 3

UNIT = "heads.mask.weight.unit"

@pytest.mark.parametrize("change, expected", [
    (lambda weights: weights.pop(UNIT), "a unit for each first index"),
    (lambda weights: weights.update({UNIT: weights[UNIT][:1]}), "a unit for each first index"),
    (lambda weights: weights.update({UNIT: weights[UNIT].expand(-1, 2, 1, 1)}),
     "a unit for each first index"),
    (lambda weights: weights.update({UNIT: weights[UNIT].double()}), "a unit for each first index"),
    (lambda weights: weights.update({UNIT: weights[UNIT].to(torch.int8)}),
     "a unit for each first index"),
    (lambda weights: weights.update({UNIT: weights[UNIT].expand(-1, 2, 10 ** 4, 10 ** 4)}),
     "larger than the file"),
    (lambda weights: weights.update({"norm.weight.unit": weights[UNIT]}), "unexpected: norm"),
    (lambda weights: weights.update({"heads.mask.weight": weights["heads.mask.weight"].byte()}),
     "torch.uint8"),
    (lambda weights: weights.update({"heads.mask.weight": weights["heads.mask.weight"].float()}),
     "unexpected: heads.mask.weight.unit"),
], ids=["none", "one", "two", "double", "whole", "huge", "stray", "bytes", "of floats"])
def test_weights_in_8_bits_with_strange_units_are_refused(change, expected, tmp_path):
    path = tmp_path / "small.pt"
    mss.save_checkpoint(path, *small(), small=True)
    change_checkpoint(path, lambda content: change(content["model"]))

    with pytest.raises(mss.UserError, match=expected):
        mss.load_checkpoint(path)

# The norm of the bins stays; in ResUNets also those before the first convolution of each RCB, of
# which 17 blocks have four, and before the six transposed convolutions.
RESUNETS_NORMS = 1 + 17 * 4 + 6

@pytest.mark.parametrize("name, norms", [
    ("UNetPhase", 1),
    ("UNet", 1),
    ("UNetDecouple", 1),
    ("UNetDecouple+", 1),
    ("ResUNet", RESUNETS_NORMS),
    ("ResUNetDecouple", RESUNETS_NORMS),
    ("ResUNetDecouple+", RESUNETS_NORMS),
    ("Wave-U-Net", 0),
    ("Wave-U-Net-12", 0),
    ("DPRNN", 0),
    ("PM-Unet", 0),
    ("PM-Unet-conv", 0),
    ("Open-Unmix", 6),                          # they follow no convolutions
    ("ResUNetDecouple+-subband", RESUNETS_NORMS),
    ("MobileNet-subband", 1 + 14 * 2 + 6),      # 14 blocks of two parts
])
def test_folding_merges_all_batch_norms_that_it_can(name, norms):
    _, model = as_if_trained(name)

    left = batch_norms(mss.fold_batch_norms(model))

    assert len(left) == norms
    if "ResUNet" in name:
        assert not any(path.endswith("bn2") for path in left)

@pytest.mark.parametrize("name", ROWS)
def test_folding_changes_nothing_but_rounding(name):
    _, model = as_if_trained(name)
    mixture = noise(2, 2, 3000, scale=1)                              # complex masks are small here

    with torch.inference_mode():
        plain = model(mixture)
        folded = mss.fold_batch_norms(model)(mixture)

    assert plain.abs().max() > 0.005
    assert mss.sdr(plain, folded) > 80

def test_heads_are_of_one_target_after_the_other():
    _, model = small("UNet", targets=PAIR)
    nn.init.zeros_(model.heads["mask"].weight)
    model.heads["mask"].bias.data = torch.tensor([50.0, 50.0, -50.0, -50.0])
    x = noise(1, 2, 640)

    with torch.inference_mode():
        vocals, accompaniment = model.eval()(x)[0]

    # But for the highest bin, which is left out.
    assert mss.sdr(x[0], vocals) > 10
    assert not accompaniment.abs().max() > 1e-6

def in_bf16(model, mixture):
    with torch.autocast(mixture.device.type, torch.bfloat16), torch.inference_mode():
        return model.eval()(mixture)

def test_only_the_backbone_runs_in_bf16():
    _, model = small("ResUNetDecouple+")
    modules = {"backbone": model.backbone.encoders[0][0].conv1, **model.heads}
    seen = {}
    for name, module in modules.items():
        def note(module, inputs, output, name=name):
            seen[name] = output.dtype
        module.register_forward_hook(note)

    in_bf16(model, noise(1, 2, 3000))

    heads = dict.fromkeys(("mask", "q", "p_r", "p_i"), torch.float32)
    assert seen == {"backbone": torch.bfloat16, **heads}

@pytest.mark.parametrize("name", ROWS)
def test_a_row_in_bf16_answers_in_float32(name, device):
    _, model = small(name, targets=mss.SOURCES)

    y = in_bf16(model.to(device), noise(1, 2, 3000).to(device))

    assert y.dtype == torch.float32
    assert torch.isfinite(y).all()

@pytest.mark.parametrize("name", ("DPRNN", "PM-Unet", "Open-Unmix"))
def test_lstms_stay_in_float32(name, device):
    _, model = small(name)
    seen = set()
    for module in model.modules():
        if isinstance(module, nn.LSTM):
            module.register_forward_hook(lambda *call: seen.add(call[2][0].dtype))

    in_bf16(model.to(device), noise(1, 2, 3000).to(device))

    assert seen == {torch.float32}

def test_bf16_changes_little():
    _, model = small("ResUNetDecouple+")
    mixture = noise(1, 2, 3000)

    y = in_bf16(model, mixture)

    with torch.inference_mode():
        assert mss.sdr(model(mixture), y) > 20

def test_rounding_errors_stay_small_in_pm_unet():
    """A frame in the middle of a reflection is real but for rounding errors: phases of 0 or pi."""
    _, model = small("PM-Unet", window=4096, hop=1024)
    x = noise(1, 2, 20 * 1024)
    almost_x = x * (1 + 1e-7 * noise(*x.shape, seed=1, scale=1.0))

    with torch.inference_mode():
        y = model.eval()(x)
        almost_y = model(almost_x)

    assert mss.sdr(y, almost_y) > 70

@pytest.mark.parametrize("name", ("UNetDecouple+", "ResUNetDecouple+-subband", "PM-Unet-conv"))
def test_convolutions_get_channels_last(name):
    """And so copy nothing. Not the first ones, whose input is narrow; frames are padded."""
    _, model = small(name, width=4)
    model = model.to(memory_format=torch.channels_last)
    others = []

    def look(module, inputs, output):
        x, = inputs
        if x.shape[1] > 2 and not x.is_contiguous(memory_format=torch.channels_last):
            others.append(module)

    first = [module for module in model.modules() if isinstance(module, mss.ResBlock)][:1]
    first = [module for block in first for module in block.modules()]
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module not in first:
            module.register_forward_hook(look)
    model(noise(2, 2, 9000))

    assert not others

@pytest.mark.parametrize("name", ("ResUNetDecouple+", "PM-Unet", "MobileNet-subband"))
def test_the_layout_changes_no_gradient(name):
    """Of a batch of one, too."""
    _, model = small(name)
    model.double()
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout).zero_grad()
        model(noise(1, 2, 9000).double()).square().mean().backward()
        gradients.append(torch.cat([value.grad.flatten() for value in model.parameters()]))

    one, other = gradients
    assert (one - other).norm() < 1e-9 * one.norm()

# ---- Whole tracks -------------------------------------------------------------------------------

class Identity(mss.Model):
    """Its estimate is the mixture."""

    def __init__(self):
        super().__init__(mss.Config())

    def forward(self, x):
        return x[:, None]

class Alternating(Identity):
    """Its estimates are 1, 0, 1, 0, ...: shows where blocks are joined, with which weights."""
    calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.full_like(x[:, None], self.calls % 2)

def test_lookahead_gives_the_next_samples_across_blocks():
    ahead = mss.Lookahead(torch.arange(20).view(2, 10).split(3, dim=-1))

    first = ahead.peek(5)
    ahead.drop(4)
    second = ahead.peek(3)

    assert first.tolist() == [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]]
    assert second.tolist() == [[4, 5, 6], [14, 15, 16]]

def test_lookahead_gives_less_only_at_the_end():
    ahead = mss.Lookahead([torch.arange(3), torch.arange(3, 5)])

    assert ahead.peek(9).tolist() == [0, 1, 2, 3, 4]
    ahead.drop(4)
    assert ahead.peek(9).tolist() == [4]
    ahead.drop(4)
    assert ahead.peek(9).tolist() == []

def test_lookahead_reads_no_further_than_it_must():
    read = []
    def blocks():
        for i in range(3):
            read.append(i)
            yield torch.zeros(4)
    ahead = mss.Lookahead(blocks())

    ahead.peek(4)
    assert read == [0]
    ahead.peek(5)
    assert read == [0, 1]

SIZES = [(4000, 800), (4001, 801), (400, 1), (400, 0), (400, 266)]

def lengths_around(segment, overlap):
    """Lengths of songs of no, one, two and more blocks, and where one more begins."""
    two = 2 * segment - overlap
    return [0, 1, segment - 1, segment, segment + 1, two, two + 1, int(3.7 * segment)]

@pytest.mark.parametrize("segment, overlap", SIZES)
def test_a_track_comes_back_from_a_model_that_changes_nothing(segment, overlap):
    for length in lengths_around(segment, overlap):
        x = noise(2, length)

        y = mss.separate_track(Identity(), x, segment, overlap)

        assert y.shape == (1, 2, length)
        assert torch.allclose(y[0], x, rtol=0, atol=1e-6)

@pytest.mark.parametrize("segment, overlap", SIZES)
def test_a_stream_is_separated_as_the_track(segment, overlap):
    for length in lengths_around(segment, overlap):
        x = noise(2, length)
        stream = iter(x.split(333, dim=-1))

        blocks = list(mss.separate_blocks(Identity(), stream, segment, overlap))

        whole = mss.separate_track(Identity(), x, segment, overlap)
        assert torch.equal(torch.cat(blocks, dim=-1), whole)

@pytest.mark.parametrize("stride, expected", [(1, 900), (256, 768), (900, 900), (4096, 900)])
def test_segments_begin_a_stride_apart_if_one_fits(stride, expected):
    assert mss.grid_hop(1000, 100, stride, 50) == expected

def test_a_track_is_separated_in_bf16():
    class Witness(Identity):
        def forward(self, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(x).bfloat16()

    seen = []
    y = mss.separate_track(Witness(), noise(2, 1000), bf16=True)

    assert seen == [True]
    assert y.dtype == torch.float32

def test_a_cross_fade_has_real_context_on_both_sides():
    y = mss.separate_track(Alternating(), torch.zeros(2, 1800), segment=1000, overlap=200)[0, 0]

    # Of 800..1000, which two windows share, the outer 50s are context.
    assert (y[:850] == 1).all()
    assert torch.allclose(y[850:950], 1 - (torch.arange(100) + 0.5) / 100)
    assert (y[950:] == 0).all()

def test_windows_at_once_change_nothing():
    _, model = small("ResUNetDecouple+")
    x = noise(2, 8000)

    alone = mss.separate_track(model.eval(), x, 1500, 200, batch_size=1)
    together = mss.separate_track(model, x, 1500, 200, batch_size=3)

    assert mss.sdr(alone, together) > 90                              # rounding: 110 and more

@pytest.mark.parametrize("device, gigabytes, count", [
    ("cpu", 99, 1), ("cuda", 1, 1), ("cuda", 2, 1), ("cuda", 3, 2), ("cuda", 79, 4)])
def test_as_many_windows_at_once_as_fit(device, gigabytes, count, monkeypatch):
    """What torch keeps is free as well."""
    kept = {"memory_reserved": 2, "memory_allocated": 1}
    for name, value in kept.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value << 30)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (gigabytes - 1 << 30, 80 << 30))

    assert mss.windows_at_once(torch.device(device)) == count

def test_by_default_a_device_is_filled(monkeypatch):
    monkeypatch.setattr(mss, "windows_at_once", lambda device: 3)
    sizes = []

    class Counting(Identity):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    mss.separate_track(Counting(), noise(2, 12_000), 2000, 200)

    assert sizes[0] == 3

def test_short_windows_change_little():
    """The network's field of view exceeds what two of them share."""
    _, model = small()
    x = noise(2, 6000)

    whole = mss.separate_track(model.eval(), x, 10_000, 0)
    blocks = mss.separate_track(model, x, 3000, 2000)

    assert mss.sdr(whole, blocks) > 15

def test_too_short_a_segment_is_refused():
    with pytest.raises(mss.UserError, match="1.5 times --overlap"):
        mss.separate_track(Identity(), noise(2, 6000), segment=400, overlap=268)

@pytest.mark.parametrize("segment, overlap", [
    (None, 306_176),                            # 62.7 s: Open-Unmix's own
    (3_000_000, 306_176),                       # a longer segment doesn't need more
    (2699 * 512, 153_088),                      # a ninth of the segment, as of its own
    (1, 0),
])
def test_a_segment_alone_gets_an_overlap_that_fits(segment, overlap):
    _, model = small("Open-Unmix", window=4096, hop=1024)

    assert mss.block_lengths(model, segment) == (segment or 2699 * 1024, overlap)

def test_the_overlap_that_a_segment_gets_does_not_jump():
    _, model = small()

    overlaps = [mss.block_lengths(model, segment)[1] for segment in range(1, 300_000, 100)]

    assert min(np.diff(overlaps)) >= 0 and max(np.diff(overlaps)) < 100

def alive(model, x):
    """The model in eval mode, its batch norms' statistics those of x, so that all of it matters."""
    for norm in batch_norms(model).values():
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x[None])
    return model.eval()

def blocks_against_the_whole(name, on_grid):
    """SDR of three seconds in blocks, in dB; on the grid these begin at multiples of a stride."""
    recipe = {**train.PAPER, **train.RECIPES.get(name, {})}
    width = 1 if name.startswith("PM") else 2
    _, model = small(name, width=width, window=recipe["window"], hop=recipe["hop"])
    x = noise(2, 3 * RATE)
    alive(model, x)
    if not on_grid:
        model.stride = 1

    # Without a stride two blocks begin 128 frames and 64 samples apart: off every grid.
    segment = mss.SEGMENT - 448 * 441
    blocks = mss.separate_track(model, x, segment, mss.OVERLAP - 64)
    with torch.inference_mode():
        whole = model(x[None])[0]

    constant = whole.mean()
    assert whole.std() > 1e-3 * constant.abs()
    return mss.sdr(whole - constant, blocks - constant)

# The Wave-U-Nets' are equal but for rounding; UNet sees further than two blocks overlap, and the
# others' norms see all.
@pytest.mark.parametrize("name, decibels", [
    ("Wave-U-Net", 100),
    ("Wave-U-Net-12", 100),
    ("UNet", 25),
    ("DPRNN", 11),
    ("PM-Unet", 21),
    ("PM-Unet-conv", 21),
])
def test_blocks_equal_the_whole(name, decibels):
    assert blocks_against_the_whole(name, on_grid=True) > decibels

@pytest.mark.parametrize("name", ["Wave-U-Net", "PM-Unet-conv"])
def test_blocks_off_the_grid_are_worse(name):
    on_grid = blocks_against_the_whole(name, on_grid=True)
    off_grid = blocks_against_the_whole(name, on_grid=False)

    assert off_grid < on_grid - 20

def begun_later(model, x, shift):
    """SDR of estimates of an input that begins later against those of the whole, amid it, in dB."""
    with torch.inference_mode():
        whole = model(x[None])[0, 0, :, shift:]
        later = model(x[None, :, shift:])[0, 0]

    far = slice(75_000, 80_000)
    constant = whole[:, far].mean(-1, keepdim=True)
    return mss.sdr(whole[:, far] - constant, later[:, far] - constant)

@pytest.mark.parametrize("name", ["Wave-U-Net", "Wave-U-Net-12"])
def test_inputs_a_stride_apart_are_sampled_alike(name):
    _, model = small(name, width=2)
    for parameter in model.parameters():
        if parameter.dim() > 1:                                       # or nothing deep would matter
            nn.init.kaiming_normal_(parameter, a=0.2)
    x = noise(2, 160_000)
    alive(model, x)

    # Rounding alone: 110 dB and more. Off the grid: below 10 dB.
    assert begun_later(model, x, model.stride) > 80
    assert begun_later(model, x, 2000) < 40

class Large(Identity):
    """Raises the error for inputs of more than `limit` samples."""

    def __init__(self, limit, error):
        super().__init__()
        self.limit = limit
        self.error = error

    def forward(self, x):
        if x.shape[0] * x.shape[-1] > self.limit:
            raise self.error
        return super().forward(x)

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")

@pytest.mark.parametrize("error", [
    OUT_OF_MEMORY,
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                 "9 bytes."),
], ids=["a GPU's", "a CPU's"])
@pytest.mark.parametrize("length", [20_000, 3000])                    # samples: one window, or more
def test_out_of_memory_is_survived(error, length):
    x = noise(2, length)

    y = mss.separate_track(Large(1100, error), x, segment=4000, overlap=400, batch_size=4)

    assert torch.allclose(y[0], x, rtol=0, atol=1e-6)

def test_out_of_memory_fewer_windows_are_tried_then_shorter_ones(capsys):
    model = Large(1100, OUT_OF_MEMORY)

    mss.separate_track(model, noise(2, 20_000), segment=4000, overlap=400, batch_size=4)

    notices = capsys.readouterr().err
    tried = re.findall(r"going on with (\d+ x \d+) samples at once\n", notices)
    assert tried == ["2 x 4000", "1 x 4000", "1 x 2200", "1 x 1300", "1 x 850"]
    assert notices.count("\n") == len(tried)

def test_too_little_memory_for_any_window_is_the_users_error():
    with pytest.raises(mss.UserError, match="--overlap"):
        mss.separate_track(Large(300, OUT_OF_MEMORY), noise(2, 20_000), segment=4000, overlap=400)

def test_other_errors_are_not_taken_for_too_little_memory():
    with pytest.raises(RuntimeError, match="another"):
        mss.separate_track(Large(300, RuntimeError("another")), noise(2, 20_000))

def test_a_models_nan_is_the_models_fault():
    class Diverged(Identity):
        def forward(self, x):
            return x[:, None] * math.nan

    with pytest.raises(mss.UserError, match="the model gives NaN.*The mixture is finite, its peak"):
        mss.separate_track(Diverged(), noise(2, 1000))

def test_a_mixtures_nan_is_the_mixtures_fault():
    x = noise(2, 1000)
    x[0, 500] = math.nan

    with pytest.raises(mss.UserError, match="finite samples expected in the mixture"):
        mss.separate_track(Identity(), x)

@pytest.mark.parametrize("numbers", [
    dict(batch_size=0), dict(overlap=-10), dict(segment=1000.5), dict(segment="1000")])
def test_numbers_of_windows_that_make_no_sense_are_refused(numbers):
    with pytest.raises(mss.UserError, match="a whole number from . on expected, found"):
        mss.separate_track(Identity(), noise(2, 100), **numbers)

# ---- What people have ---------------------------------------------------------------------------

@pytest.mark.parametrize("convert", [
    lambda x: x.numpy(), lambda x: x.double(), lambda x: x.double().numpy(),
    lambda x: x.numpy().astype(">f4"), lambda x: x.flip(1).numpy()[:, ::-1],
    lambda x: x.clone().requires_grad_(), lambda x: x.T.contiguous().T,
    lambda x: (x * 2 ** 15).short().numpy(), lambda x: (x * 2.0 ** 31).int(),
], ids=["numpy", "double", "numpy's double", "big-endian", "reversed", "with a gradient",
        "transposed", "16 bits", "32 bits"])
def test_samples_of_any_kind_are_taken(convert):
    x = torch.arange(-500, 500).view(2, 500) / 512                    # exact in all of them

    y = mss.separate_track(Identity(), convert(x))

    assert y.dtype == torch.float32
    assert torch.equal(y[0], x)

def test_mono_is_doubled_for_a_stereo_model():
    x = noise(1, 500)

    y = mss.separate_track(Identity(), x)

    assert torch.equal(y[0], torch.cat([x, x]))

@pytest.mark.parametrize("samples", [
    noise(500), noise(500, 2), noise(1, 2, 500), noise(0, 500), torch.zeros(2, 500).long(), None,
    "song.wav", np.array(["a"])],
    ids=["(L,)", "(L, C)", "(1, C, L)", "no channel", "int64", "None", "a path", "words"])
@pytest.mark.parametrize("function", [
    lambda samples: mss.separate_track(Identity(), samples),
    lambda samples: mss.write_audio("never.wav", samples, RATE)],
    ids=["separate_track", "write_audio"])
def test_what_is_no_audio_is_refused_with_what_was_found(
        function, samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(mss.UserError, match="expected, found"):
        function(samples)

def test_sdr_of_other_shapes_is_refused():
    """numpy would repeat the shorter one."""
    with pytest.raises(mss.UserError, match=r"one shape expected, found \(2, 50\) and \(50,\)"):
        mss.sdr(noise(2, 50), noise(50))

def test_sdr_scales_integers_as_samples():
    x = torch.tensor([[1000, -2000, 3000]])

    assert mss.sdr(x / 2 ** 15, (x.short() * 2).numpy()) == 0.0

@pytest.mark.parametrize("rates", [(0, 48000), (44100, -1), (44100, 48000.5), ("44100", 48000)])
def test_rates_that_make_no_sense_are_refused(rates):
    with pytest.raises(mss.UserError, match="rate_.*: a whole number from 1 on expected"):
        mss.resample(noise(2, 100), *rates)

def test_arrays_and_whole_floats_of_rates_are_resampled():
    x = noise(2, 100)

    y = mss.resample(x.double().numpy(), 44100.0, np.int64(48000))

    assert torch.equal(y, mss.resample(x, 44100, 48000))

@pytest.fixture(params=["a default dtype", "a default device"])
def torchs_defaults(request):
    """A function that sets one as notebooks do, "meta" standing in for a GPU; undone in the end."""
    if request.param == "a default dtype":
        yield lambda: torch.set_default_dtype(torch.float64)
    else:
        yield lambda: torch.set_default_device("meta")
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)

def everything(checkpoint, songs):
    """What comes from public functions, each with numbers of its own."""
    track, = mss.musdb_tracks(songs, "valid")
    x = track.load("accompaniment", 0, 9000)
    model = mss.load_models(checkpoint)
    y = mss.separate_track(model, x, segment=4000, overlap=900)
    bss = evaluate.bss_eval(x.T[None].numpy(), y.transpose(1, 2).numpy(), 1000)
    return [x, y, mss.resample(x, 44100, 48000), mss.stretch(x, 110),
            mss.mask(x, np.random.default_rng(0)), *examples(songs, seed=1)[0],
            *map(torch.from_numpy, bss.values())]

def test_torchs_defaults_change_nothing(torchs_defaults, checkpoint, songs):
    expected = everything(checkpoint, songs)

    torchs_defaults()
    found = everything(checkpoint, songs)

    for one, other in zip(found, expected):
        assert one.dtype == other.dtype and one.device == other.device
        assert torch.equal(one, other)

@pytest.mark.parametrize("name, value", [
    ("targets", "vocals"), ("targets", ("../../escaped",)), ("targets", ("/escaped",)),
    ("targets", ("<script>",)), ("targets", (None,)), ("targets", ("",)), ("targets", ("a\0b",)),
    ("targets", ()), ("targets", ("vocals", "vocals")), ("targets", [["vocals"]]),
    ("sample_rate", 0), ("sample_rate", -44100), ("sample_rate", 44100.0), ("sample_rate", "44100"),
    ("sample_rate", 10 ** 9), ("channels", 0), ("channels", True), ("width", 0), ("width", 10 ** 9),
    ("window", 2000), ("window", 10 ** 9), ("hop", -5), ("hop", 2048), ("hop", 10 ** 9), ("hop", 1),
    ("model", "Demucs"), ("model", ["UNet"])])
def test_a_config_of_which_no_model_can_be_made_is_refused(name, value):
    with pytest.raises(mss.UserError, match=f"^Config: {name}: .* expected, found "):
        mss.Config(**{name: value})

def test_a_list_of_targets_will_do():
    assert mss.Config(targets=["vocals", "bass"]).targets == ("vocals", "bass")

def test_what_a_config_holds_is_told_in_few_words():
    nested = ()
    for _ in range(60):
        nested = (nested, nested)                                     # 2^60 in all

    with pytest.raises(mss.UserError) as caught:
        mss.Config(targets=nested)

    assert len(str(caught.value)) < 300

# ---- What is left over --------------------------------------------------------------------------

@pytest.mark.parametrize("target, name", [
    ("vocals", "accompaniment"), ("accompaniment", "vocals"), ("drums", "no_drums")])
def test_the_rest_of_a_mixture_has_a_name(target, name):
    assert mss.complement(target) == name

@pytest.mark.parametrize("targets, two_stems, expected", [
    (("vocals",), None, {"accompaniment": 0}),
    (("bass",), None, {"no_bass": 0}),
    (("vocals", "drums"), None, {}),
    (("vocals",), False, {}),
    (("vocals", "drums"), True, {"accompaniment": 0, "no_drums": 1}),
    (("accompaniment", "vocals"), True, {}),
    (("vocals", "accompaniment", "bass"), True, {"no_bass": 2}),
])
def test_leftovers_are_what_no_target_is(targets, two_stems, expected):
    """By default (None) only those of a single target."""
    assert mss.leftovers(targets, two_stems) == expected

@pytest.mark.parametrize("targets, number", [
    (("vocals", "bass", "drums", "other"), 3),
    (("other", "vocals", "bass", "drums"), 0),
    (("vocals", "accompaniment"), 1),
    (("accompaniment", "vocals"), 0),
    (("vocals",), None),
    (("vocals", "bass", "drums"), None),
    (("vocals", "bass", "drums", "other", "accompaniment"), None),
])
def test_one_target_is_residual_where_all_make_up_the_mixture(targets, number):
    assert mss.residual_target(targets) == number

def test_the_residual_is_filled_so_that_all_sum_to_the_mixture():
    estimates = noise(3, 2, 100)
    mixture = noise(2, 100, seed=1)

    filled = mss.fill_residual(estimates, mixture, 1)

    assert torch.allclose(filled.sum(0), mixture, rtol=0, atol=1e-6)
    assert torch.equal(filled[0], estimates[0])
    assert torch.equal(filled[2], estimates[2])

def test_estimates_without_a_residual_stay():
    estimates = noise(3, 2, 100)

    assert torch.equal(mss.fill_residual(estimates, noise(2, 100), None), estimates)

@pytest.mark.parametrize("target, other", [PAIR, PAIR[::-1]])
def test_one_of_vocals_and_accompaniment_gives_the_other(target, other):
    mixture = noise(2, 100)
    estimate = noise(2, 100, seed=1)

    estimates = mss.with_complements(mixture, {target: estimate})

    assert list(estimates) == [target, other]
    assert torch.equal(estimates[target], estimate)
    assert torch.equal(estimates[other], mixture - estimate)

def test_four_sources_give_the_accompaniment():
    four = {source: noise(2, 100, seed=i) for i, source in enumerate(mss.SOURCES)}

    estimates = mss.with_complements(noise(2, 100), four)

    assert list(estimates) == [*mss.SOURCES, "accompaniment"]
    accompaniment = four["bass"] + four["drums"] + four["other"]
    assert torch.allclose(estimates["accompaniment"], accompaniment, rtol=0, atol=1e-6)

def test_what_has_no_complement_stays():
    drums = {"drums": noise(2, 100)}

    assert mss.with_complements(noise(2, 100), drums) == drums

# ---- Checkpoints --------------------------------------------------------------------------------

def assert_refused_as_checkpoint(bad):
    """separate.py must name the file, and write nothing."""
    song = bad.with_name("song.wav")
    out = bad.with_name("out")
    mss.write_audio(song, noise(2, 1000), RATE)

    fails(separate.main, song, "-m", bad, "-o", out, saying=(bad.name, "checkpoint"))

    assert not out.exists()

def test_a_truncated_checkpoint_is_named(checkpoint):
    os.truncate(checkpoint, checkpoint.stat().st_size // 2)

    assert_refused_as_checkpoint(checkpoint)

def test_an_empty_checkpoint_is_named(checkpoint):
    os.truncate(checkpoint, 0)

    assert_refused_as_checkpoint(checkpoint)

@pytest.mark.parametrize("content", [
    {"config": Path("x"), "model": print},
    torch.zeros(3),
    {"config": {"model": "Demucs"}, "model": {}},
    {"model": {"conv.weight": torch.zeros(1)}, "step": 1},
], ids=["objects", "a tensor", "another model", "other weights"])
def test_a_foreign_checkpoint_is_named(content, tmp_path):
    torch.save(content, tmp_path / "bad.pt")

    assert_refused_as_checkpoint(tmp_path / "bad.pt")

class Harmful:
    """What makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)

def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"config": Harmful(tmp_path / "made"), "model": {}}, tmp_path / "bad.pt")

    assert_refused_as_checkpoint(tmp_path / "bad.pt")

    assert not (tmp_path / "made").exists()

def change_checkpoint(path, change):
    """Apply a function to what a checkpoint holds."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)

def test_a_checkpoints_targets_stay_in_the_folder_of_stems(checkpoint):
    change_checkpoint(checkpoint, lambda content: content["config"].update(
        targets=("../../escaped",)))

    assert_refused_as_checkpoint(checkpoint)

    assert list(checkpoint.parent.parent.rglob("escaped*")) == []

def test_a_flipped_bit_in_a_checkpoint_is_noticed(checkpoint):
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1                                   # in the weights
    checkpoint.write_bytes(content)

    assert_refused_as_checkpoint(checkpoint)

def claim_to_be_wide(content):
    """The weights of a network of 60 features, 260 MB, all of which are one number."""
    with torch.device("meta"):
        _, wide = small(width=60)
    content["config"]["width"] = 60
    content["model"] = {name: torch.zeros((), dtype=value.dtype).expand(value.shape)
                        for name, value in wide.state_dict().items()}

def claim_to_be_published(content):
    content.clear()
    content["model"] = {"encoder_block1.conv_block1.abn2.weight": torch.zeros(1).expand(10 ** 7)}

@pytest.mark.parametrize("claim", [claim_to_be_wide, claim_to_be_published])
def test_a_checkpoint_cannot_claim_more_memory_than_it_fills(claim, checkpoint):
    change_checkpoint(checkpoint, claim)

    with pytest.raises(mss.UserError, match="its tensors are larger than the file"):
        mss.load_checkpoint(checkpoint)

def test_a_checkpoint_cannot_be_larger_than_its_file(checkpoint, tmp_path):
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(checkpoint) as file, \
            zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in file.infolist():
            packed.writestr(part.filename, file.read(part))
        packed.writestr("small/data/999", bytes(10_000_000))

    with pytest.raises(mss.UserError, match="its parts are larger than the file"):
        mss.load_checkpoint(bomb)

@pytest.mark.parametrize("convert", [
    lambda value: value.long(), lambda value: value.to_sparse(), lambda value: value.to("meta"),
    lambda value: value[:1]], ids=["integers", "sparse", "nothing", "another shape"])
def test_weights_that_are_not_the_models_are_refused(convert, checkpoint):
    def change(content):
        content["model"]["norm.running_mean"] = convert(content["model"]["norm.running_mean"])

    change_checkpoint(checkpoint, change)

    assert_refused_as_checkpoint(checkpoint)

def test_a_file_of_torch_before_zips_is_read(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content, checkpoint, _use_new_zipfile_serialization=False)

    config, model, _ = mss.load_checkpoint(checkpoint)

    assert config == mss.Config(**content["config"])
    assert equal(model.state_dict(), content["model"])

def test_a_checkpoint_for_an_absent_device_is_the_users_error(checkpoint):
    with pytest.raises(mss.UserError, match="cuda:99: no such device"):
        mss.load_checkpoint(checkpoint, "cuda:99")

def zipped(name, content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(name, content)
    return file.getvalue()

def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()

@pytest.mark.parametrize("content, words", [
    (b"", "an empty file"),
    (b"\n<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a Git LFS pointer"),
    (b"<!-- moved --><html></html>", "an HTML page"),
    (b'{"status": 404, "message": "gone"}', "a text"),
    ("nicht verfügbar".encode(), "no PyTorch file"),
    (b"RIFF\x24\0\0\0WAVEfmt " + bytes(30), "no PyTorch file"),
    (pickle.dumps({"norm.weight": 1.0}), "no PyTorch file"),
    (gzip.compress(bytes(1000)), "a compressed file"),
    (struct.pack("<Q", 90) + b'{"norm.weight": {"dtype": "F32"}}' + bytes(99), "safetensors"),
    (zipped("vocals.pth", bytes(1000)), "a zip archive of ['vocals.pth']: unpack it"),
    (saved({"norm.weight": torch.zeros(3)})[:-20], "cut or damaged"),
    (saved({"model": Path("x")}), "objects such as 'pathlib."),
    (saved(torch.zeros(3)), "no weights but one Tensor"),
    (saved({}), "found nothing"),
    (saved({"epoch": 3, "model": {"a": torch.zeros(3)}, "config": {}}), "0 of 887 weights"),
    (saved({"epoch": 3, "weights": {"a": torch.zeros(3)}}), "found ['epoch', 'weights']"),
    (saved({"model": {"a": torch.zeros(3)}, "config": {"lr": 0.1}}), "config: {'lr': 0.1}"),
    (saved({"model": {"a": torch.zeros(3)}, "config": None}), "another program's config: None"),
    (saved({"fc3.weight": torch.zeros(3)}), "1 of 46 weights of Open-Unmix"),
    (saved({"after_conv2.weight": torch.zeros(())}), "after_conv2.weight, ..."),
    (saved({"after_conv2.weight": torch.zeros(8)}), "heads.mask.weight"),
    (saved({"conv_block7z.conv_block1.conv1.weight": torch.zeros(3)}), "conv_block7z"),
], ids=lambda value: value.split(",")[0] if isinstance(value, str) else "")
def test_what_a_foreign_file_is_is_told(content, words, tmp_path):
    (tmp_path / "vocals.pth").write_bytes(content)

    with pytest.raises(mss.UserError, match=re.escape(words)):
        mss.load_checkpoint(tmp_path / "vocals.pth")

@pytest.mark.parametrize("word", ["papr", "Paper-Smal", "UMXHQ"])
def test_a_mistyped_name_points_to_the_names(word, song):
    nearest = {"papr": "paper", "Paper-Smal": "paper-small", "UMXHQ": "umxhq"}[word]

    fails(separate.main, "-m", word, song, saying=("--list-models", f"; {nearest} is a name"))

def test_a_second_name_that_is_mistyped_is_no_song(checkpoint, song):
    fails(separate.main, "-m", checkpoint, "umxq", song, saying=("umxhq is a name",))

def test_a_mistyped_song_after_the_model_is_no_model(checkpoint, song):
    code, _, err = call(separate.main, "-o", song.parent, "-m", checkpoint, "albm", song)

    assert code == 1 and "1 of 2 songs failed: albm" in err
    check_stems(song.parent / "song", song)

def test_a_mistyped_song_alone_is_named(checkpoint):
    fails(separate.main, "-m", checkpoint, "nosong", saying=("nosong: ", "found no file"))

def test_an_absent_checkpoint_is_named(tmp_path):
    absent = tmp_path / "absent.pt"

    fails(separate.main, "song.wav", "-m", absent, saying=("absent.pt", "found no file"))

@contextlib.contextmanager
def no_file_above(size):
    """As on a disk with so many bytes left, writing more to a file fails."""
    resource = pytest.importorskip("resource", reason="Windows has no limits of files' sizes")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)

def test_a_full_disk_keeps_the_old_checkpoint(checkpoint):
    before = checkpoint.read_bytes()
    config, model = small(width=4)

    with no_file_above(100_000), pytest.raises(mss.UserError, match="small.pt: not saved"):
        mss.save_checkpoint(checkpoint, config, model)

    assert checkpoint.read_bytes() == before
    assert list(checkpoint.parent.iterdir()) == [checkpoint]

def test_a_checkpoint_lies_on_the_disk_before_it_has_its_name(checkpoint, monkeypatch):
    """Or else a power cut could leave an empty file in the old one's place."""
    done = []
    monkeypatch.setattr(os, "fsync", lambda number: done.append(os.fstat(number).st_size))
    replace = os.replace

    def replaced(*paths):
        done.append("named")
        replace(*paths)

    monkeypatch.setattr(os, "replace", replaced)

    mss.save_checkpoint(checkpoint, *small())

    assert done == [checkpoint.stat().st_size, "named"]

@pytest.mark.parametrize("published_name, ours", [
    ("bn0.running_mean", "norm.running_mean"),
    ("encoder_block1.conv_block1.bn1.weight", "backbone.encoders.0.0.bn1.weight"),
    ("encoder_block6.conv_block4.conv2.weight", "backbone.encoders.5.3.conv2.weight"),
    ("encoder_block2.conv_block1.shortcut.bias", "backbone.encoders.1.0.shortcut.bias"),
    ("conv_block7a.conv_block1.abn2.bias", "backbone.bottleneck.0.0.bn2.bias"),
    ("conv_block7d.conv_block3.conv1.weight", "backbone.bottleneck.3.2.conv1.weight"),
    ("decoder_block1.bn1.running_var", "backbone.decoders.0.up.0.running_var"),
    ("decoder_block6.conv1.weight", "backbone.decoders.5.up.2.weight"),
    ("decoder_block3.conv_block2.abn2.bias", "backbone.decoders.2.block.0.bn2.bias"),
    ("decoder_block3.conv_block5.conv1.weight", "backbone.decoders.2.block.3.conv1.weight"),
    ("after_conv_block1.conv_block4.bn1.bias", "backbone.after.3.bn1.bias"),
])
def test_a_published_parameter_has_a_name_here(published_name, ours):
    assert mss.our_name(published_name, mss.RESUNET_NAMES) == ours

@pytest.mark.parametrize("published_name, ours", [
    ("encoder_block2.conv_block.conv1a.weight", "backbone.encoders.1.parts.0.2.weight"),
    ("encoder_block2.conv_block.bn2c.running_var", "backbone.encoders.1.parts.1.6.running_var"),
    ("encoder_block2.conv_block.shortcut.bias", "backbone.encoders.1.shortcut.bias"),
    ("conv_block7.conv2b.weight", "backbone.bottleneck.parts.1.5.weight"),
    ("decoder_block6.conv1.weight", "backbone.up.5.2.weight"),
    ("decoder_block6.conv_block2.bn1a.bias", "backbone.decoders.5.parts.0.0.bias"),
    ("after_conv_block1.conv2c.weight", "backbone.after.parts.1.8.weight"),
])
def test_a_published_mobilenets_parameter_has_a_name_here(published_name, ours):
    assert mss.our_name(published_name, mss.MOBILENET_NAMES) == ours

def test_published_heads_are_interleaved():
    weights = {"after_conv2.weight": torch.arange(8), "after_conv2.bias": torch.arange(8) + 10}

    converted = mss.convert_separator(weights, mss.RESUNET_NAMES)

    assert {name: value.tolist() for name, value in converted.items()} == {
        "heads.mask.weight": [0, 4], "heads.mask.bias": [10, 14],
        "heads.p_r.weight": [1, 5], "heads.p_r.bias": [11, 15],
        "heads.p_i.weight": [2, 6], "heads.p_i.bias": [12, 16],
        "heads.q.weight": [3, 7], "heads.q.bias": [13, 17]}

def test_published_heads_of_bands_are_interleaved_twice():
    weights = {"after_conv2.bias": torch.arange(32)}                  # channel, head, band

    converted = mss.convert_separator(weights, mss.RESUNET_NAMES, bands=4)

    assert converted["heads.mask.bias"].tolist() == [0, 1, 2, 3, 16, 17, 18, 19]
    assert converted["heads.q.bias"].tolist() == [12, 13, 14, 15, 28, 29, 30, 31]

def test_published_in_place_norms_scale_by_absolute_weights():
    block = "encoder_block1.conv_block1"
    values = torch.tensor([-2.0, 0.0, 3.0])
    weights = {f"{block}.abn2.weight": values, f"{block}.abn2.bias": values,
               f"{block}.bn1.weight": values}

    converted = mss.convert_separator(weights, mss.RESUNET_NAMES)

    expected = torch.tensor([2.0 + 1e-5, 1e-5, 3.0 + 1e-5])
    assert torch.allclose(converted["backbone.encoders.0.0.bn2.weight"], expected, atol=1e-7)
    assert torch.equal(converted["backbone.encoders.0.0.bn2.bias"], values)
    assert torch.equal(converted["backbone.encoders.0.0.bn1.weight"], values)

def test_published_fourier_matrices_are_left_out():
    names = ("stft.conv_real.weight", "istft.ola_window", "bn0.weight")
    weights = dict.fromkeys(names, torch.zeros(3))

    converted = mss.convert_separator(weights, mss.RESUNET_NAMES)

    assert list(converted) == ["norm.weight"]

RESUNET_BLOCKS = (
    *(f"encoder_block{i}.conv_block{j}" for i in range(1, 7) for j in range(1, 5)),
    *(f"conv_block7{i}.conv_block{j}" for i in "abcd" for j in range(1, 5)),
    *(f"decoder_block{i}.conv_block{j}" for i in range(1, 7) for j in range(2, 6)),
    *(f"after_conv_block1.conv_block{j}" for j in range(1, 5)))
MOBILENET_BLOCKS = (
    *(f"encoder_block{i}.conv_block" for i in range(1, 7)), "conv_block7",
    *(f"decoder_block{i}.conv_block2" for i in range(1, 7)), "after_conv_block1")
UP = tuple(f"decoder_block{i}" for i in range(1, 7))
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

def published_names(blocks, norms, convolutions):
    """What a file of ByteSep's has, and some shortcuts more."""
    names = [f"bn0.{kind}" for kind in NORM]
    names += [f"{up}.bn1.{kind}" for up in UP for kind in NORM]
    names += [f"{up}.conv1.weight" for up in UP]
    for block in blocks:
        names += [f"{block}.{norm}.{kind}" for norm in norms for kind in NORM]
        names += [f"{block}.{name}.weight" for name in convolutions]
        names += [f"{block}.shortcut.{kind}" for kind in ("weight", "bias")]
    return names

def bytesep_file(separator, names, table, bands):
    """{published name: value} of a Separator's network, by way of the file's layout."""
    state = separator.state_dict()
    weights = {name: state[mss.our_name(name, table)] for name in names
               if mss.our_name(name, table) in state}
    for kind in ("weight", "bias"):
        heads = [state[f"heads.{head}.{kind}"] for head in ("mask", "p_r", "p_i", "q")]
        rows = [head[i:i + bands] for i in range(0, len(heads[0]), bands) for head in heads]
        weights[f"after_conv2.{kind}"] = torch.cat(rows)
    return weights

def tiny_file(row, path):
    """(a small model of a row, as if trained; its weights in the published layout, in a file)."""
    words = ["--musdb", "-", "--model", row, "--width", "2", "--source", "vocals"]
    config = train.config_of(train.parse(words))
    torch.manual_seed(0)
    model = mss.MODELS[row](config).eval()
    for norm in batch_norms(model).values():
        norm.weight.data.uniform_(0.5, 1.5)
        norm.running_mean.uniform_(-0.1, 0.1)

    if row == "Open-Unmix":
        weights = {"sample_rate": torch.tensor(44100.0), **model.backbone.networks[0].state_dict()}
        torch.save(weights, path)
        return model

    if row == "MobileNet-subband":
        parts = [f"{i}{letter}" for i in "12" for letter in "abc"]
        names = published_names(MOBILENET_BLOCKS, [f"bn{part}" for part in parts],
                                [f"conv{part}" for part in parts])
        weights = bytesep_file(model.separator, names, mss.MOBILENET_NAMES, 4)
    elif row == "ResUNetDecouple+-subband":
        names = published_names(RESUNET_BLOCKS, ("bn1", "bn2"), ("conv1", "conv2"))
        weights = bytesep_file(model.separator, names, mss.RESUNET_NAMES, 4)
    else:
        names = published_names(RESUNET_BLOCKS, ("bn1", "abn2"), ("conv1", "conv2"))
        weights = bytesep_file(model, names, mss.RESUNET_NAMES, 1)
        for name in weights:
            if name.endswith("abn2.weight"):
                weights[name] = 1e-5 - weights[name]                  # of either sign

    if row.endswith("subband"):
        weights["pqmf.ana_conv_filter.weight"] = model.bank.analysis
        weights["pqmf.syn_conv_filter.weight"] = model.bank.synthesis
    weights["stft.conv_real.weight"] = torch.zeros(3)
    torch.save({"step": 500_000, "model": weights}, path)
    return model

PUBLISHED_ROWS = ("ResUNetDecouple+", "Open-Unmix", *SUBBANDS)

@pytest.mark.parametrize("row", PUBLISHED_ROWS)
def test_keys_say_which_network_a_published_file_is_of(row, tmp_path):
    path = tmp_path / "some_vocals_weights.pth"
    expected = tiny_file(row, path)

    config, model, _ = mss.load_checkpoint(path)

    assert config == expected.config
    mixture = noise(1, 2, 4001)
    with torch.inference_mode():
        y, y_expected = model(mixture), expected(mixture)
    assert y_expected.abs().max() > 0.001
    assert torch.allclose(y, y_expected, rtol=0, atol=1e-6)

@pytest.mark.parametrize("file_name, target", [
    ("resunet143_ismir2021_vocals_8.9dB_350k_steps.pth", "vocals"),
    ("resunet143_ismir2021_accompaniment_16.8dB_350k_steps.pth", "accompaniment"),
    ("drums-9619578f.pth", "drums"),
])
def test_a_published_files_name_says_its_target(file_name, target, tmp_path):
    tiny_file("Open-Unmix", tmp_path / file_name)

    config, _, _ = mss.load_checkpoint(tmp_path / file_name)

    assert config.targets == (target,)

@pytest.mark.parametrize("file_name", ["weights.pth", "vocals_or_drums.pth"])
def test_a_published_file_whose_name_says_no_target_is_refused(file_name, tmp_path):
    tiny_file("Open-Unmix", tmp_path / file_name)

    with pytest.raises(mss.UserError, match="vocals.pth, found (none|vocals and drums) in it"):
        mss.load_checkpoint(tmp_path / file_name)

@pytest.mark.parametrize("row", [*PUBLISHED_ROWS, "UNet"])
def test_our_weights_without_their_config_are_refused(row, tmp_path):
    path = tmp_path / "vocals.pth"
    sizes = mss.LAYOUTS[row].sizes if row in mss.LAYOUTS else {"hop": 600}
    model = mss.MODELS[row](mss.Config(row, width=2, **sizes))
    torch.save(model.state_dict(), path)

    with pytest.raises(mss.UserError, match="this program's names, but without a config: "):
        mss.load_checkpoint(path)

def test_weights_of_an_unknown_layout_are_refused_with_what_they_are(tmp_path):
    path = tmp_path / "vocals.pth"
    torch.save({"encoder.0.conv.weight": torch.zeros(3), "decoder.bias": torch.zeros(3)}, path)

    with pytest.raises(mss.UserError, match="encoder.0.conv.weight, decoder.bias, "):
        mss.load_checkpoint(path)

def test_weights_of_a_known_layout_with_a_strange_key_are_refused(tmp_path):
    path = tmp_path / "vocals.pth"
    tiny_file("Open-Unmix", path)
    weights = torch.load(path)
    del weights["fc2.weight"]
    torch.save({**weights, "attention.weight": torch.zeros(3)}, path)

    with pytest.raises(mss.UserError, match="damaged or foreign.*45 of 46 weights of Open-Unmix "
                       "found; missing: .*fc2.weight.*; unexpected: .*attention.weight"):
        mss.load_checkpoint(path)

@pytest.mark.parametrize("row", PUBLISHED_ROWS)
def test_half_of_a_published_file_is_told_from_the_nearest_layout(row, tmp_path):
    path = tmp_path / "vocals.pth"
    tiny_file(row, path)
    content = torch.load(path)
    weights = content.get("model", content)
    torch.save(dict(list(weights.items())[len(weights) // 2:]), path)

    with pytest.raises(mss.UserError, match=rf"weights of {re.escape(row)} found; missing: "):
        mss.load_checkpoint(path)

@pytest.mark.parametrize("wrap", [
    lambda weights: {"state_dict": weights, "epoch": 7},
    lambda weights: {f"module.{name}": value for name, value in weights.items()},
], ids=["within state_dict", "DataParallel"])
def test_published_weights_that_others_have_saved_again_are_read(wrap, tmp_path):
    path = tmp_path / "vocals.pth"
    expected = tiny_file("Open-Unmix", path)
    torch.save(wrap(torch.load(path)), path)

    _, model, _ = mss.load_checkpoint(path)

    assert equal(model.state_dict(), expected.state_dict())

@dataclasses.dataclass
class TinyConfig(mss.Config):
    """As if the published network were as small."""
    width: int = 2
    window: int = 256
    hop: int = 64

def published_modules():
    """{path in the published network: path in ours}"""
    paths = {"bn0": "norm"}
    for i in range(6):
        for j in range(4):
            paths[f"encoder_block{i + 1}.conv_block{j + 1}"] = f"backbone.encoders.{i}.{j}"
            paths[f"decoder_block{i + 1}.conv_block{j + 2}"] = f"backbone.decoders.{i}.block.{j}"
        paths[f"decoder_block{i + 1}.bn1"] = f"backbone.decoders.{i}.up.0"
        paths[f"decoder_block{i + 1}.conv1"] = f"backbone.decoders.{i}.up.2"
    for j in range(4):
        for i, letter in enumerate("abcd"):
            paths[f"conv_block7{letter}.conv_block{j + 1}"] = f"backbone.bottleneck.{i}.{j}"
        paths[f"after_conv_block1.conv_block{j + 1}"] = f"backbone.after.{j}"
    return paths

def as_published(model):
    """A ResUNetDecouple+'s weights in the layout of the published files."""
    layout = {"stft.conv_real.weight": torch.zeros(3)}
    for theirs, ours in published_modules().items():
        for name, value in model.get_submodule(ours).state_dict().items():
            if name == "bn2.weight":                                  # they use |w| + 1e-5
                value = (value - 1e-5) * (-1) ** torch.arange(len(value))
            layout[f"{theirs}.{name.replace('bn2.', 'abn2.')}"] = value

    # The heads are one convolution, interleaved.
    for kind in ("weight", "bias"):
        heads = [getattr(model.heads[name], kind).data for name in ("mask", "p_r", "p_i", "q")]
        layout[f"after_conv2.{kind}"] = torch.stack(heads, dim=1).flatten(0, 1)
    return layout

def test_a_file_of_the_published_layout_is_read(tmp_path, monkeypatch):
    path = tmp_path / "resunet143_ismir2021_accompaniment_16.8dB_350k_steps.pth"
    _, model = as_if_trained("ResUNetDecouple+", targets=("vocals",))
    for name in ("mask", "p_r", "p_i", "q"):
        model.heads[name].bias.data.normal_()
    torch.save({"step": 350_000, "model": as_published(model)}, path)
    monkeypatch.setattr(mss, "Config", TinyConfig)

    config, read, state = mss.load_checkpoint(path)

    assert config == TinyConfig(targets=("accompaniment",))
    assert state == {"step": 350_000}
    found = read.state_dict()
    for name, value in model.state_dict().items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-6), name

def published_output(w, x, window, hop):
    """The published network's forward pass, written down from its code, on its own parameters."""
    def norm(x, name, weight):
        return F.batch_norm(x, w[f"{name}.running_mean"], w[f"{name}.running_var"], weight,
                            w[f"{name}.bias"], eps=1e-5)

    def conv_block(x, name):
        y = F.leaky_relu(norm(x, f"{name}.bn1", w[f"{name}.bn1.weight"]), 0.01)
        y = F.conv2d(y, w[f"{name}.conv1.weight"], padding=1)
        y = F.leaky_relu(norm(y, f"{name}.abn2", w[f"{name}.abn2.weight"].abs() + 1e-5), 0.01)
        y = F.conv2d(y, w[f"{name}.conv2.weight"], padding=1)
        if f"{name}.shortcut.weight" in w:
            x = F.conv2d(x, w[f"{name}.shortcut.weight"], w[f"{name}.shortcut.bias"])
        return x + y

    def four_blocks(x, name, first=1):
        for j in range(first, first + 4):
            x = conv_block(x, f"{name}.conv_block{j}")
        return x

    hann = torch.hann_window(window)
    X = torch.stft(x[0], window, hop, window=hann, return_complex=True)           # (C, F, T)
    magnitude = (X.real ** 2 + X.imag ** 2).clamp(min=1e-10).sqrt()
    frames = X.shape[2]

    x = norm(magnitude.transpose(0, 1)[None], "bn0", w["bn0.weight"])             # (1, F, C, T)
    x = F.pad(x.permute(0, 2, 3, 1), (0, -1, 0, -frames % 32))                    # (1, C, T, F - 1)
    skips = []
    for i in range(1, 7):
        skips.append(four_blocks(x, f"encoder_block{i}"))
        x = F.avg_pool2d(skips[-1], (1, 2) if i == 6 else (2, 2))
    for letter in "abcd":
        x = four_blocks(x, f"conv_block7{letter}")
    for i in range(1, 7):
        x = F.relu(norm(x, f"decoder_block{i}.bn1", w[f"decoder_block{i}.bn1.weight"]))
        stride = (1, 2) if i == 1 else (2, 2)
        x = F.conv_transpose2d(x, w[f"decoder_block{i}.conv1.weight"], stride=stride)
        x = four_blocks(torch.cat([x, skips.pop()], dim=1), f"decoder_block{i}", first=2)
    x = four_blocks(x, "after_conv_block1")
    x = F.conv2d(x, w["after_conv2.weight"], w["after_conv2.bias"])               # (1, 4 C, T, F-1)

    maps = F.pad(x[0, :, :frames], (0, 1)).transpose(1, 2).unflatten(0, (-1, 4))
    mask, p_r, p_i, q = maps.unbind(1)                                            # (C, F, T)
    size = F.relu(magnitude * torch.sigmoid(mask) + q)
    length = (p_r.tanh() ** 2 + p_i.tanh() ** 2).sqrt().clamp(min=1e-10)
    turn = torch.complex(p_r.tanh() / length, p_i.tanh() / length)
    return torch.istft(size * turn * X / magnitude, window, hop, window=hann)

def test_the_network_is_the_published_one():
    _, model = as_if_trained("ResUNetDecouple+", targets=("vocals",))
    for parameter in model.parameters():
        parameter.data.add_(noise(*parameter.shape, scale=0.05))
    x = noise(1, 2, 40 * 64, scale=1)

    with torch.inference_mode():
        y = model(x)[0, 0]
        expected = published_output(as_published(model), x, 256, 64)

    assert expected.std() > 0.05
    assert mss.sdr(expected, y) > 90                                  # rounding: 110 and more

# ---- Several models at once ---------------------------------------------------------------------

def test_together_models_estimate_all_their_targets():
    _, first = small("UNet", targets=("vocals", "drums"))
    _, second = small("Wave-U-Net", targets=("bass",))
    mixture = noise(1, 2, 1000)

    together = mss.Together([first, second]).eval()

    assert together.config.targets == ("vocals", "drums", "bass")
    assert together.stride == 4096
    assert together.residual is None
    with torch.inference_mode():
        y = together(mixture)
        assert torch.equal(y, torch.cat([first(mixture), second(mixture)], dim=1))

@pytest.mark.parametrize("changes", [
    {"targets": ("drums", "vocals")},
    {"targets": ("drums",), "sample_rate": 48000},
    {"targets": ("drums",), "channels": 1},
], ids=["one target twice", "two rates", "mono and stereo"])
def test_together_models_that_do_not_fit_are_refused(changes):
    _, first = small(targets=("vocals",))
    _, second = small(**changes)

    with pytest.raises(mss.UserError, match="different targets, one format expected, found vocals"):
        mss.Together([first, second])

def test_loaded_models_are_one_and_ready_for_inference(checkpoint, tmp_path):
    config, model = small(targets=("drums",))
    mss.save_checkpoint(tmp_path / "drums.pt", config, model)

    together = mss.load_models([checkpoint, tmp_path / "drums.pt"])

    assert together.config.targets == ("vocals", "drums")
    assert not any(model.training for model in together.models)
    assert len(batch_norms(together)) == 2                            # those of the bins stay

def test_a_single_loaded_model_is_itself(checkpoint):
    model = mss.load_models([checkpoint])

    assert isinstance(model, mss.Separator)
    assert len(batch_norms(model)) == 1

# ---- Weights that have names --------------------------------------------------------------------

@pytest.fixture(scope="session")
def card():
    return json.loads((HERE / "weights" / "card.json").read_text(encoding="utf-8"))

def test_the_bundled_weights_are_small_and_hold_their_card(card):
    path = HERE / "weights" / "vocals.pt"

    _, _, state = mss.load_checkpoint(path)

    assert path.stat().st_size <= 10_000_000
    assert {name: state[name] for name in card} == card

def test_without_a_network_separate_says_why_it_uses_the_bundled_weights(song):
    code, stdout, err = call(separate.main, song, "-o", song.parent)

    assert code == 0
    assert len(err.splitlines()) == 1
    assert len(err.strip()) <= 120
    for word in ("-m bundled", "paper-small", "refused"):
        assert word in err
    assert "bundled" in stdout

def test_without_a_network_evaluate_says_why_it_uses_the_bundled_weights(songs, tmp_path):
    code, stdout, err = call(evaluate.main, "--musdb", songs, "--results", tmp_path)

    assert code == 0
    for word in ("-m bundled", "paper-small", "refused"):
        assert word in err
    assert "bundled" in stdout

def test_the_bundled_weights_can_be_asked_for(song):
    code, _, err = call(separate.main, song, "-m", "bundled", "-o", song.parent)

    assert code == 0
    assert not err

def test_the_cards_recipe_makes_the_bundled_weights(card, songs, tmp_path, monkeypatch):
    """Its commands, each of which takes what those before it wrote."""
    readme = (HERE / "weights" / "README.md").read_text(encoding="utf-8").replace("\\\n    ", "")
    for name, flags in re.findall(r'^([A-Z]+)="(.*)"$', readme, re.MULTILINE):
        readme = readme.replace(f"${name} ", f"{flags} ")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    shutil.copy(HERE / "weights" / "card.json", "weights/card.json")
    scripts = {"train.py": train, "weights/average.py": script_of(HERE / "weights" / "average.py")}
    less = "--steps", 1, "--batch-size", 2, "--segment", 0.2, "--workers", 0, "--augment"

    for command in card["recipe"]:
        assert command in readme
        python, script, *words = command.split()
        assert python == "python"
        words += ("--musdb", songs, *less) if script == "train.py" else ()
        code, _, err = call(scripts[script].main, *words)
        assert code == 0, err

    config, _, state = mss.load_checkpoint("weights/vocals.pt")
    expected, _, _ = mss.load_checkpoint(HERE / "weights" / "vocals.pt")
    assert config == expected
    assert {name: state[name] for name in card} == card
    assert Path("weights/vocals.pt").stat().st_size <= 10_000_000     # in 8 bits

def test_weights_are_averaged_by_shares(tmp_path):
    average = script_of(HERE / "weights" / "average.py")
    config, model = small(targets=("vocals",))
    files = [tmp_path / f"{k}.pt" for k in range(3)]
    means = []
    for k, file in enumerate(files):
        for x in model.state_dict().values():
            x.fill_(k + 1)
        mss.save_checkpoint(file, config, model)
    for shares in ((), ("--shares", 1, 2, 5)):
        code, _, err = call(average.main, *files, "--out", tmp_path / "mean.pt", *shares)
        assert code == 0, err
        _, mean, _ = mss.load_checkpoint(tmp_path / "mean.pt")
        means.append({round(x.mean().item(), 4) for x in mean.parameters()})

    assert means == [{2.0}, {2.5}]

@pytest.mark.parametrize("words, expected", (
    (("other.pt",), "other.pt: the network of vocals.pt expected, found another"),
    (("vocals.pt", "--shares", 1), "2 positive numbers expected"),
    (("vocals.pt", "--shares", 1, 0), "2 positive numbers expected"),
    (("vocals.pt", "--shares", 1, "nan"), "2 positive numbers expected")))
def test_weights_that_cannot_be_averaged_are_refused(words, expected, tmp_path, monkeypatch):
    average = script_of(HERE / "weights" / "average.py")
    monkeypatch.chdir(tmp_path)
    for name, width in (("vocals", 1), ("other", 2)):
        mss.save_checkpoint(f"{name}.pt", *small(targets=("vocals",), width=width))

    code, _, err = call(average.main, "vocals.pt", *words, "--out", "mean.pt")

    assert code == 2
    assert expected in err
    assert not Path("mean.pt").exists()

def test_the_bundled_weights_are_share_alike_as_their_music_is(card):
    with open(HERE / "weights" / "tracks.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    readme = (HERE / "weights" / "README.md").read_text(encoding="utf-8")
    free = {"CC BY-SA 3.0", "CC BY-SA 4.0", "CC BY 3.0", "CC0 1.0", "MIT", "public domain"}

    assert {row["licence"] for row in rows} <= free
    for row in rows:
        assert row["by"] in readme or row["subset"] == "valid"
    for text in (card["licence"], (HERE / "weights" / "LICENSE").read_text(encoding="utf-8")):
        assert "CC BY-SA 4.0" in text

def test_the_bundled_weights_lift_a_voice_out_of_a_song_held_out():
    (track,) = mss.musdb_tracks(data("everything_is_free"), "valid")
    start, frames = 200 * RATE, 20 * RATE                             # 20 s of singing
    vocals = track.load("vocals", start, frames)
    mixture = track.load("mixture", start, frames)
    _, model, _ = mss.load_checkpoint(HERE / "weights" / "vocals.pt")

    (estimate,) = mss.separate_track(model, mixture)

    # Silence as the estimate would have 0 dB.
    assert mss.sdr(vocals, estimate) > 1
    assert mss.sdr(vocals, estimate) > mss.sdr(vocals, mixture) + 3

def test_bundled_weights_are_scored_where_there_is_no_voice_too(songs):
    score = script_of(HERE / "weights" / "score.py")
    (track,) = score.songs_in(songs, None)

    sdr, usdr, band_sdr, leakage = score.scores_of(lambda mixture: mixture / 2, track)

    estimate = track.load("mixture") / 2
    assert usdr == pytest.approx(mss.sdr(track.load("vocals"), estimate), abs=0.01)
    assert abs(sdr - usdr) < 3
    assert abs(band_sdr - mss.sdr(track.load("accompaniment"), estimate)) < 3
    assert leakage == pytest.approx(-6.02, abs=0.01)

def test_material_for_the_bundled_weights_is_made_of_what_there_is(tmp_path, capsys):
    material = script_of(HERE / "weights" / "material.py")
    song = tmp_path / "data" / "everything_is_free" / "train" / "1.Song"
    song.mkdir(parents=True)
    for source in mss.SOURCES:
        mss.write_audio(song / f"{source}.ogg", noise(2, 2 * RATE, scale=0.02), RATE)

    jobs = material.all_jobs([tmp_path / "data"], tmp_path / "packages", None)
    for name, form in (("1.Song whole", "wav"), ("1.Song band", "ogg"), ("1.Song voice", "ogg")):
        material.make(tmp_path / "songs" / name, jobs[f"train/{name}"], form)

    err = capsys.readouterr().err
    for words in ("pjs: left out; ", "apt-get download supertuxkart-data", "mixed ardentryst castle"):
        assert words in err
    files = {path.parent.name: mss.find_stems(path.parent) for path in tmp_path.glob("songs/*/*")}
    assert {name: tuple(stems) for name, stems in files.items()} == {
        "1.Song whole": ("vocals", "accompaniment"),
        "1.Song band": ("accompaniment",),
        "1.Song voice": ("vocals",)}
    whole = mss.open_track(tmp_path / "songs" / "1.Song whole")
    assert mss.sdr(mss.open_track(song).load("vocals"), whole.load("vocals")) > 50

def test_models_that_have_names_are_listed(card):
    code, stdout, _ = call(separate.main, "--list-models")

    assert code == 0
    assert max(map(len, stdout.splitlines())) <= 100
    paragraphs, metric = stdout.replace("\n    ", " ").strip().split("\n\n")
    lines = dict(line.split(": ", 1) for line in paragraphs.splitlines())
    assert tuple(lines) == mss.NAMES
    assert "SDR (museval)" in metric and "not measured here" in metric and "but bundled" in metric
    for name, *words in (
            ("paper-accompaniment", "accompaniment 16.8 dB", "461 MB", "non-commercial", "5513378"),
            ("paper-fast", "vocals 8.7 dB", "414 MB", "CC BY 4.0", "not seen here", "5804160"),
            ("paper-small", "vocals 7.2 dB", "4.6 MB", "CC BY 4.0", "the file's name"),
            ("umxhq", "drums 6.04 dB", "other 4.28 dB", "its authors", "MIT"),
            ("umxl", "bass 6.02 dB", "CC BY-NC-SA 4.0", "trained on"),
            ("bundled", "held out", "CC BY-SA 4.0", card["licence"])):
        for word in words:
            assert word in lines[name]

class Handler(http.server.SimpleHTTPRequestHandler):
    """A quiet server that may be slow: `delay` s until it answers, and then `stall` s."""
    delay = stall = 0.0

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        time.sleep(self.delay)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            super().do_GET()

    def copyfile(self, source, output):
        output.write(source.read(1000))
        time.sleep(self.stall)
        output.write(source.read())

@pytest.fixture
def zenodo(checkpoint, tmp_path, monkeypatch):
    """A server whose records are small files, and a cache without any.

    "paper" and "paper-small" are a checkpoint of ours, "umxhq" four of Open-Unmix.
    """
    www = tmp_path / "www"
    handler = type("Handler", (Handler,), {})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *arguments: handler(*arguments, directory=www))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def stop():
        server.shutdown()
        server.server_close()

    monkeypatch.setattr(mss, "ZENODO", f"http://127.0.0.1:{server.server_port}/records")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))

    def publish(name, *contents):
        """Let the files of a name be these -> where they are served, and where they are cached."""
        published = mss.PUBLISHED[name]
        files, sent = [], []
        for file, content in zip(published.files, contents):
            digest = hashlib.new(file.kind, content).hexdigest()[:len(file.hash)]
            files.append(mss.File(file.name, file.size and len(content), digest, file.kind))
            sent.append(www / "records" / str(published.record) / "files" / file.name)
            sent[-1].parent.mkdir(parents=True, exist_ok=True)
            sent[-1].write_bytes(content)
        changed = dataclasses.replace(published, files=tuple(files))
        monkeypatch.setitem(mss.PUBLISHED, name, changed)
        return sent, [mss.cached(file) for file in files]

    yield types.SimpleNamespace(
        publish=publish, content=checkpoint.read_bytes(), handler=handler, stop=stop)
    stop()

def is_not_downloaded(cached, song, *words):
    """The download of "paper" must fail with the words and advice, and leave nothing behind."""
    code, _, err = call(separate.main, song, "-m", "paper", "-o", song.parent)
    last = err.splitlines()[-1]
    assert code == 2
    for word in (*words, "127.0.0.1", str(cached), "by hand"):
        assert word in last
    assert not list(cached.parent.iterdir())

def test_published_weights_that_are_gone_are_named(zenodo, song):
    (sent,), (cached,) = zenodo.publish("paper", zenodo.content)
    sent.unlink()

    is_not_downloaded(cached, song, "404")

def test_published_weights_that_arrive_cut_are_not_kept(zenodo, song):
    (sent,), (cached,) = zenodo.publish("paper", zenodo.content)
    sent.write_bytes(zenodo.content[:9000])

    is_not_downloaded(cached, song, "sha256", "expected")

def test_published_weights_of_another_size_are_not_kept(zenodo, song):
    (sent,), (cached,) = zenodo.publish("paper", zenodo.content)
    file, = mss.PUBLISHED["paper"].files
    changed = dataclasses.replace(mss.PUBLISHED["paper"], files=(file._replace(size=5),))
    mss.PUBLISHED["paper"] = changed

    is_not_downloaded(cached, song, "5 bytes expected", f"found {len(zenodo.content)}")

def test_without_a_network_it_is_said_how_to_get_published_weights(zenodo, song):
    _, (cached,) = zenodo.publish("paper", zenodo.content)
    zenodo.stop()

    is_not_downloaded(cached, song, "refused")

def test_published_weights_that_are_damaged_are_to_be_deleted(zenodo, song):
    _, (cached,) = zenodo.publish("paper", zenodo.content)
    cached.parent.mkdir(parents=True)
    cached.write_bytes(zenodo.content[:9000])

    fails(separate.main, song, "-m", "paper", saying=(str(cached), "delete it"))

def test_published_weights_of_wrong_bytes_in_the_cache_are_to_be_deleted(zenodo, song):
    """Put there by hand, say; files of torch before zips have no checksums of their own."""
    _, (cached,) = zenodo.publish("paper", zenodo.content)
    cached.parent.mkdir(parents=True)
    cached.write_bytes(zenodo.content + b"x")

    fails(separate.main, song, "-m", "paper", saying=(str(cached), "sha256", "delete it"))

def test_a_hash_takes_little_memory(tmp_path):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(1 << 26)                                        # 64 MiB of zeros

    tracemalloc.start()
    found = mss.hash_of(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert found == hashlib.sha256(bytes(1 << 26)).hexdigest()
    assert peak < 1 << 23

def test_published_weights_are_downloaded_once(zenodo, song):
    _, (cached,) = zenodo.publish("paper", zenodo.content)
    command = song, "-m", "paper", "-o", song.parent

    code, _, err = call(separate.main, *command)
    assert code == 0 and "downloading" in err
    assert cached.read_bytes() == zenodo.content

    # Nobody listens any more.
    zenodo.stop()
    code, _, err = call(separate.main, *command)
    assert code == 0 and "downloading" not in err

def test_the_hash_of_weights_that_none_is_known_of_is_told(zenodo, song):
    name = "paper-fast"
    _, (cached,) = zenodo.publish(name, zenodo.content)

    code, _, err = call(separate.main, song, "-m", name, "-o", song.parent)

    assert code == 0
    assert hashlib.sha256(zenodo.content).hexdigest() in err

@pytest.fixture
def umxhq(zenodo, tmp_path):
    """Published: Open-Unmix's four networks, tiny -> where they are cached."""
    contents = []
    for target in mss.SOURCES:
        tiny_file("Open-Unmix", tmp_path / f"{target}.pth")
        contents.append((tmp_path / f"{target}.pth").read_bytes())
    return zenodo.publish("umxhq", *contents)[1]

def test_a_name_of_several_files_brings_a_model_of_all_their_targets(umxhq):
    model = mss.load_models(["umxhq"])

    assert all(path.exists() for path in umxhq)
    assert model.config.model == "Open-Unmix"
    assert model.config.targets == mss.SOURCES
    assert model.backbone.filtered

def test_a_name_of_several_files_has_no_single_path(umxhq):
    with pytest.raises(mss.UserError, match="umxhq: a name of one file expected, found 4"):
        mss.checkpoint_path("umxhq")

def test_files_of_open_unmix_that_are_loaded_together_filter(umxhq):
    """As if they were one name."""
    mixture = noise(1, 2, 9000)
    expected = mss.load_models(["umxhq"])

    model = mss.load_models(umxhq)

    with torch.inference_mode():
        assert torch.equal(model(mixture), expected(mixture))

def test_open_unmix_writes_four_stems_and_what_each_leaves(umxhq, song):
    code, _, _ = call(separate.main, song, "-m", "umxhq", "--two-stems", "-o", song.parent)

    assert code == 0
    written = {path.stem for path in (song.parent / song.stem).iterdir()}
    assert written == {*mss.SOURCES, "accompaniment", "no_bass", "no_drums", "no_other"}

def separates_by_default(song, name, *words):
    """Without -m that name's weights must be used; one line says so, in these words."""
    code, stdout, err = call(separate.main, song, "-o", song.parent)
    assert code == 0
    assert f", {name} on cpu" in stdout
    lines = [line for line in err.splitlines() if not line.startswith("downloading")]
    assert len(lines) == 1, err
    for word in (f"-m {name}", *words):
        assert word in lines[0]

def test_the_default_is_downloaded_once(zenodo, song):
    _, (cached,) = zenodo.publish("paper-small", zenodo.content)

    separates_by_default(song, "paper-small", "7.2 dB", "-m paper,")
    assert cached.read_bytes() == zenodo.content
    zenodo.stop()
    separates_by_default(song, "paper-small", "7.2 dB", "-m paper,")

def test_evaluate_has_the_same_default(zenodo, songs, tmp_path):
    zenodo.publish("paper-small", zenodo.content)

    code, stdout, err = call(evaluate.main, "--musdb", songs, "--results", tmp_path / "results")

    assert code == 0
    assert "-m paper-small" in err
    assert "paper-small: UNetDecouple+" in stdout

def falls_back(song, *words):
    """The bundled weights must be used, for a reason told in these words, and nothing be kept."""
    separates_by_default(song, "bundled", *words)
    folder = mss.cached(mss.File("x")).parent
    assert not folder.exists() or not list(folder.iterdir())

def test_a_default_that_is_gone_falls_back(zenodo, song):
    (sent,), _ = zenodo.publish("paper-small", zenodo.content)
    sent.unlink()

    falls_back(song, "404")

def test_a_default_that_arrives_cut_falls_back(zenodo, song):
    (sent,), _ = zenodo.publish("paper-small", zenodo.content)
    sent.write_bytes(zenodo.content[:9000])

    falls_back(song, "found 9000")

def test_a_default_of_wrong_bytes_falls_back(zenodo, song):
    (sent,), _ = zenodo.publish("paper-small", zenodo.content)
    sent.write_bytes(zenodo.content[:-1] + b"x")

    falls_back(song, "md5")

def test_a_default_that_nobody_serves_falls_back(zenodo, song):
    zenodo.publish("paper-small", zenodo.content)
    zenodo.stop()

    falls_back(song, "refused")

def test_a_default_that_does_not_answer_falls_back(zenodo, song, monkeypatch):
    zenodo.publish("paper-small", zenodo.content)
    zenodo.handler.delay = 60.0
    monkeypatch.setattr(mss, "PATIENCE", 0.1)

    falls_back(song, "no answer within 0.1 s")

def test_a_default_that_takes_for_ever_falls_back(zenodo, song, monkeypatch):
    """Its server answers at once, and each read of it ends in time."""
    zenodo.publish("paper-small", zenodo.content)
    zenodo.handler.stall = 60.0
    monkeypatch.setattr(mss, "PATIENCE", 0.1)

    separates_by_default(song, "bundled", "no answer within 1 s")

def test_a_default_that_stops_arriving_falls_back(zenodo, song, monkeypatch):
    zenodo.publish("paper-small", zenodo.content)
    zenodo.handler.stall = 60.0
    fetch = mss.fetch
    monkeypatch.setattr(mss, "fetch", lambda name, timeout: fetch(name, timeout / 100))

    falls_back(song, "timed out")

def test_a_slow_default_is_waited_for(zenodo, song):
    zenodo.publish("paper-small", zenodo.content)
    zenodo.handler.stall = 0.2

    separates_by_default(song, "paper-small")

def test_a_default_that_does_not_load_falls_back(zenodo, song):
    zenodo.publish("paper-small", b"no checkpoint")

    separates_by_default(song, "bundled", "damaged or foreign")

def test_a_cached_default_of_another_size_falls_back(zenodo, song):
    _, (cached,) = zenodo.publish("paper-small", zenodo.content)
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half")

    separates_by_default(song, "bundled", str(cached), "found 4", "delete it")

# ---- Songs --------------------------------------------------------------------------------------

def test_songs_come_by_name_and_know_their_format(songs):
    tracks = mss.musdb_tracks(songs, "train")

    assert [track.name for track in tracks] == [f"Synthetic - Song {i}" for i in range(3)]
    for track in tracks:
        assert (track.frames, track.sample_rate, track.channels) == (3 * RATE, RATE, 2)

def test_the_accompaniment_is_the_sum_of_three_stems(songs):
    track = mss.musdb_tracks(songs, "train")[0]

    accompaniment = track.load("accompaniment", 1000, 500)

    bass, drums, other = (track.load(name, 1000, 500) for name in ("bass", "drums", "other"))
    assert torch.equal(accompaniment, bass + drums + other)

def test_the_mixture_is_the_files(songs):
    track = mss.musdb_tracks(songs, "train")[0]

    mixture = track.load("mixture", 1000, 500)

    assert torch.equal(mixture, mss.read_audio(track.files["mixture"], 1000, 500)[0])
    total = sum(track.load(name, 1000, 500) for name in mss.SOURCES)
    assert (mixture - total).abs().max() < 1e-4

@pytest.fixture
def musdb18(songs, tmp_path):
    """A dataset as MUSDB18 is: with official titles, without valid/; and without mixtures."""
    root = tmp_path / "musdb"
    for name in ("A - B", mss.VALID[0]):
        song = root / "train" / name
        shutil.copytree(songs / "train" / "Synthetic - Song 0", song)
        (song / "mixture.flac").unlink()
    return root

def test_without_a_file_the_mixture_is_the_sum(musdb18):
    track = mss.musdb_tracks(musdb18, "train")[0]

    total = sum(track.load(name) for name in mss.SOURCES)

    assert (track.load("mixture") - total).abs().max() < 1e-6

def test_without_valid_the_official_songs_are_held_out(musdb18):
    assert [track.name for track in mss.musdb_tracks(musdb18, "train")] == ["A - B"]
    assert [track.name for track in mss.musdb_tracks(musdb18, "valid")] == [mss.VALID[0]]

def test_14_songs_are_official():
    """Those of the package musdb, whose file of settings has them in this order."""
    assert mss.VALID == (
        "Actions - One Minute Smile",
        "Clara Berry And Wooldog - Waltz For My Victims",
        "Johnny Lokke - Promises & Lies",
        "Patrick Talbot - A Reason To Leave",
        "Triviul - Angelsaint",
        "Alexander Ross - Goodbye Bolero",
        "Fergessen - Nos Palpitants",
        "Leaf - Summerghost",
        "Skelpolu - Human Mistakes",
        "Young Griffo - Pennies",
        "ANiMAL - Rockshow",
        "James May - On The Line",
        "Meaxic - Take A Step",
        "Traffic Experiment - Sirens")

def test_what_a_mac_leaves_behind_is_no_song(musdb18):
    (musdb18 / "train" / ".hidden").mkdir()
    (musdb18 / "train" / "__MACOSX").mkdir()

    assert [track.name for track in mss.musdb_tracks(musdb18, "train")] == ["A - B"]

def test_a_subset_instead_of_the_root_will_do(songs, capsys):
    tracks = mss.musdb_tracks(songs / "train", "train")

    assert len(tracks) == 3
    assert "notice: " in capsys.readouterr().err

def test_an_absent_root_is_named(tmp_path):
    with pytest.raises(mss.UserError, match="absent.*no folder"):
        mss.musdb_tracks(tmp_path / "absent", "train")

@pytest.mark.parametrize("subset, expected, found", [
    ("train", "Artist - Title", "empty folder"),
    ("test", "test/Artist", "found train"),
    ("valid", "valid/", "14 validation songs"),
])
def test_a_root_without_songs_says_what_was_expected(subset, expected, found, tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)

    with pytest.raises(mss.UserError) as error:
        mss.musdb_tracks(tmp_path / "empty", subset)

    assert expected in str(error.value)
    assert found in str(error.value)

@pytest.fixture
def drums(songs, tmp_path):
    """The drums of the only song of a dataset, "Bad - Song", for a test to spoil."""
    song = tmp_path / "root" / "train" / "Bad - Song"
    shutil.copytree(songs / "train" / "Synthetic - Song 0", song)
    return song / "drums.flac"

def assert_refused_as_song(drums, *words):
    """train.py must name the song and say so, before it makes its folder."""
    root = drums.parents[2]
    out = root.with_name("out")

    fails(train.main, "--musdb", root, "--out", out, saying=("Bad - Song", *words))

    assert not out.exists()

def test_a_song_without_stems_is_named(drums):
    for path in drums.parent.iterdir():
        path.rename(path.with_stem(f"my {path.stem}"))

    assert_refused_as_song(drums, "drums, other or accompaniment expected", "my bass.flac")

def test_all_songs_that_do_not_fit_are_named(drums):
    shutil.copytree(drums.parent, drums.parents[1] / "Another - Song")
    for path in drums.parents[1].glob("*/drums.flac"):
        path.write_bytes(b"not audio")

    assert_refused_as_song(drums, "Another - Song", "drums.flac")

def test_a_stem_that_is_no_audio_is_named(drums):
    drums.write_bytes(b"not audio")

    assert_refused_as_song(drums, "drums.flac")

@pytest.mark.parametrize("channels, frames, rate, words", [
    (2, 3 * RATE, 48000, ["one sample rate", "drums.flac 48000 Hz"]),
    (3, 500, RATE, ["1 or 2 channels", "found 3"]),
], ids=["at another rate", "of three channels"])
def test_a_stem_unlike_the_others_is_named(channels, frames, rate, words, drums):
    mss.write_audio(drums, noise(channels, frames), rate)

    assert_refused_as_song(drums, *words)

def test_a_shorter_stem_is_continued_by_silence(drums):
    audio = noise(2, 500)
    mss.write_audio(drums.with_suffix(".wav"), audio, RATE)

    track, = mss.musdb_tracks(drums.parents[2], "train")

    assert track.frames == 3 * RATE
    assert torch.equal(track.load("drums", 100), F.pad(audio, (0, 3 * RATE - 500))[:, 100:])
    assert not track.load("drums", 1000, 50).any()

def test_stems_of_unequal_length_are_told_of_once(drums, capsys):
    mss.write_audio(drums.with_suffix(".wav"), noise(2, 500), RATE)
    shutil.copytree(drums.parent, drums.parents[1] / "Another - Song")

    mss.musdb_tracks(drums.parents[2], "train")

    notice, = capsys.readouterr().err.splitlines()
    assert "2 of 2 songs have stems of unequal length" in notice

def test_a_mono_stem_of_a_stereo_song_is_in_both_channels(drums):
    audio = noise(1, 3 * RATE)
    mss.write_audio(drums.with_suffix(".wav"), audio, RATE)

    track, = mss.musdb_tracks(drums.parents[2], "train")

    assert torch.equal(track.load("drums"), audio.repeat(2, 1))

@pytest.mark.parametrize("name", ["drums.FLAC", "Drums.flac", "DRUMS.Flac"])
def test_capitals_in_a_stems_name_do_not_matter(name, drums):
    drums.rename(drums.with_name(name))

    track, = mss.musdb_tracks(drums.parents[2], "train")

    assert track.files["drums"].name == name

# Songs that lack stems.

@pytest.fixture
def incomplete(tmp_path):
    """train/ with a solo voice and a karaoke track, valid/ with a song of both."""
    for path, value in {"train/Voice/vocals": 0.25, "train/Band/accompaniment": 0.5,
                        "valid/Song/vocals": 0.1, "valid/Song/accompaniment": 0.2}.items():
        file = tmp_path / "songs" / f"{path}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        mss.write_audio(file, torch.full((2, 5000), value), RATE)
    return tmp_path / "songs"

def test_sources_come_from_the_songs_that_have_them(incomplete):
    segments = mss.Segments(
        mss.musdb_tracks(incomplete, "train"), mss.Config(), seconds=0.1, mix_audio=1)

    for i in range(10):
        mixture, targets = segments[i]
        assert (targets == 0.25).all()
        assert (mixture == 0.75).all()

def test_a_voice_and_a_band_are_a_whole_song(incomplete):
    track, = mss.musdb_tracks(incomplete, "valid")

    assert torch.equal(track.load("mixture"), track.load("vocals") + track.load("accompaniment"))

def test_songs_that_lack_stems_are_told_of_once(incomplete, capsys):
    mss.musdb_tracks(incomplete, "train")

    notice, = capsys.readouterr().err.splitlines()
    assert "2 of 2 songs lack stems" in notice

def test_a_source_that_no_song_has_is_named(incomplete):
    tracks = mss.musdb_tracks(incomplete, "train")

    with pytest.raises(mss.UserError, match="songs with bass expected"):
        mss.Segments(tracks, mss.Config(targets=("bass",)))

def test_a_source_that_a_song_lacks_is_named(incomplete):
    track, = mss.musdb_tracks(incomplete, "valid")

    with pytest.raises(mss.UserError, match="Song: drums expected, found vocals, accompaniment"):
        track.load("drums")

@pytest.mark.parametrize("subset", ["valid", "test"])
def test_songs_to_score_must_be_whole(subset, incomplete):
    shutil.copytree(incomplete / "train", incomplete / subset, dirs_exist_ok=True)

    with pytest.raises(mss.UserError, match="Band: .* found accompaniment; .*Voice: "):
        mss.musdb_tracks(incomplete, subset)

def test_a_network_learns_from_songs_that_lack_stems(incomplete, tmp_path):
    code, _, err = call(train.main, *quick(incomplete, tmp_path / "run", steps=1))

    assert code == 0, err
    assert math.isfinite(column(tmp_path / "run", "valid_sdr_vocals")[-1])

# Decoded copies.

@needs_ffmpeg
def test_a_stem_mp4_is_decoded_to_five_files_of_16_bits(tmp_path):
    mss.musdb_tracks(data("musdb_samples"), "train", cache=tmp_path)

    files = list(tmp_path.glob("train/Music Delta - 80s Rock */*"))
    assert sorted(path.stem for path in files) == sorted([*mss.SOURCES, "mixture"])
    assert {soundfile.info(path).subtype for path in files} == {"PCM_16"}

@needs_ffmpeg
def test_a_stem_mp4_in_capitals_is_a_song(tmp_path):
    song, = data("musdb_samples").glob("train/*.stem.mp4")
    (tmp_path / "root" / "train").mkdir(parents=True)
    shutil.copy(song, tmp_path / "root" / "train" / "A - B.Stem.MP4")

    track, = mss.musdb_tracks(tmp_path / "root", "train")

    assert track.name == "A - B"

@needs_ffmpeg
def test_a_stem_mp4_is_decoded_once(tmp_path, monkeypatch):
    root = data("musdb_samples")
    before = mss.musdb_tracks(root, "train", cache=tmp_path)
    monkeypatch.setenv("PATH", "")                                    # no ffmpeg any more

    assert mss.musdb_tracks(root, "train", cache=tmp_path) == before

def test_the_streams_of_a_stem_mp4_have_musdb18s_order(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(mss, "run_ffmpeg", lambda path, *output: commands.append(output))

    mss.decode_stem_mp4("song.stem.mp4", tmp_path)

    (words,) = commands
    streams = [word for word in words if str(word).startswith("0:")]
    files = [word.stem for word in words if isinstance(word, Path)]
    assert streams == ["0:a:0", "0:a:1", "0:a:2", "0:a:3", "0:a:4"]
    assert files == ["mixture", "drums", "bass", "other", "vocals"]

def test_a_stem_mp4_without_ffmpeg_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    song = tmp_path / "root" / "test" / "A - B.stem.mp4"
    song.parent.mkdir(parents=True)
    song.touch()
    monkeypatch.setenv("PATH", "")

    with pytest.raises(mss.UserError, match="A - B.stem.mp4.*ffmpeg"):
        mss.musdb_tracks(tmp_path / "root", "test")

    assert not list(tmp_path.glob("root-wav/test/*"))

def test_a_cache_holds_what_the_files_hold(songs, tmp_path):
    tracks = mss.musdb_tracks(songs, "train")

    cached_tracks = mss.musdb_tracks(songs, "train", tmp_path)

    for track, cached in zip(tracks, cached_tracks, strict=True):
        assert cached.name == track.name
        assert cached.files["bass"].match(f"{tmp_path}/train/{track.name} */bass.wav")
        assert list(cached.files) == list(track.files)
        for source in track.files:
            assert torch.equal(track.load(source), cached.load(source))

def test_a_cache_holds_all_values_of_16_bits(tmp_path):
    song = tmp_path / "root" / "train" / "A - B"
    song.mkdir(parents=True)
    values = np.arange(-2 ** 15, 2 ** 15).astype("int16")
    for source in mss.SOURCES:
        soundfile.write(song / f"{source}.flac", values, RATE, subtype="PCM_16")

    (track,) = mss.musdb_tracks(tmp_path / "root", "train", tmp_path / "cache")

    assert soundfile.info(track.files["vocals"]).subtype == "PCM_16"
    cached, _ = soundfile.read(track.files["vocals"], dtype="int16")
    assert np.array_equal(cached, values)

def test_a_cache_is_written_once(songs, tmp_path, capsys):
    mss.musdb_tracks(songs, "train", tmp_path)
    assert capsys.readouterr().err.count("decoded ") == 3

    mss.musdb_tracks(songs, "train", tmp_path)

    assert "decoded " not in capsys.readouterr().err

def test_a_cache_follows_the_files(drums, tmp_path):
    root, cache = drums.parents[2], tmp_path / "cache"
    mss.musdb_tracks(root, "train", cache)
    mss.write_audio(drums, noise(2, 3 * RATE, scale=0.1), RATE)

    track, = mss.musdb_tracks(root, "train", cache)

    assert torch.equal(track.load("drums"), mss.read_audio(drums)[0])

def test_a_cache_keeps_datasets_apart(drums, tmp_path):
    root, other, cache = drums.parents[2], tmp_path / "other", tmp_path / "cache"
    shutil.copytree(root, other, copy_function=shutil.copy2)          # sizes and times alike
    first, = mss.musdb_tracks(root, "train", cache)

    second, = mss.musdb_tracks(other, "train", cache)

    assert first.name == second.name
    assert first.files["drums"] != second.files["drums"]

@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-1000]), Path.unlink, shutil.rmtree,
], ids=["truncated", "a file gone", "a folder in its place"])
def test_a_broken_copy_is_made_again(damage, drums, tmp_path):
    root, cache = drums.parents[2], tmp_path / "cache"
    track, = mss.musdb_tracks(root, "train", cache)
    copy = track.files["drums"]
    if damage is shutil.rmtree:
        copy.unlink()
        copy.mkdir()
    else:
        damage(copy)

    track, = mss.musdb_tracks(root, "train", cache)

    assert torch.equal(track.load("drums"), mss.read_audio(drums)[0])

def test_a_cache_that_cannot_be_written_names_the_flag(drums, tmp_path):
    (tmp_path / "cache").write_text("a file")

    with pytest.raises(mss.UserError, match="not written.*--cache"):
        mss.musdb_tracks(drums.parents[2], "train", tmp_path / "cache")

# ---- Augmentations ------------------------------------------------------------------------------

def draws(name, x, count=200):
    """The augmentation's outputs for x by as many seeds."""
    function = mss.AUGMENTATIONS[name].function
    return [function(x, np.random.default_rng(seed)) for seed in range(count)]

@pytest.fixture
def ramp():
    """(2, 10,000) numbers that tell where they stand: 1, 2, 3 ... and 1.5, 2.5, 3.5 ..."""
    x = torch.arange(1.0, 10_001)
    return torch.stack([x, x + 0.5])

@pytest.mark.parametrize("name", mss.AUGMENTATIONS)
def test_an_augmentation_depends_on_its_random_numbers_only(name, ramp):
    first = draws(name, ramp, 8)

    assert all(map(torch.equal, first, draws(name, ramp, 8)))

@pytest.mark.parametrize("name", mss.AUGMENTATIONS)
def test_an_augmentation_leaves_its_input_alone(name, ramp):
    before = ramp.clone()

    draws(name, ramp, 15)                                             # odd, for `flip` and `swap`

    assert torch.equal(ramp, before)

@pytest.mark.parametrize("name", mss.AUGMENTATIONS)
def test_an_augmentation_gives_finite_samples_in_both_channels(name, ramp):
    for y in draws(name, ramp, 20):
        assert y.shape[0] == 2
        assert torch.isfinite(y).all()

@pytest.mark.parametrize("length", [0, 1, 100])
@pytest.mark.parametrize("name", mss.AUGMENTATIONS)
def test_an_augmentation_takes_very_short_songs(name, length, ramp):
    for y in draws(name, ramp[:, :length], 3):
        assert y.shape[1] <= length * 1.25 + 1

def test_shift_begins_later(ramp):
    outputs = draws("shift", ramp)

    starts = [int(y[0, 0]) - 1 for y in outputs]
    for y, start in zip(outputs, starts):
        assert torch.equal(y, ramp[:, start:])
    assert 0 <= min(starts) < 500
    assert 7700 < max(starts) <= 8192

def test_shift_begins_anywhere_in_a_short_song(ramp):
    lengths = {y.shape[1] for y in draws("shift", ramp[:, :10])}

    assert lengths == set(range(11))

def test_swap_exchanges_the_channels(ramp):
    (y,) = draws("swap", ramp, 1)

    assert torch.equal(y, ramp[[1, 0]])

def test_flip_inverts_the_sign(ramp):
    (y,) = draws("flip", ramp, 1)

    assert torch.equal(y, -ramp)

def test_gain_is_one_factor_from_a_quarter_to_five_quarters(ramp):
    gains = [y / ramp for y in draws("gain", ramp)]

    for gain in gains:
        assert gain.max() - gain.min() < 1e-6
    assert 0.25 <= min(gain.min() for gain in gains) < 0.3
    assert 1.2 < max(gain.max() for gain in gains) < 1.2501

def test_mono_is_the_left_or_the_right_channel_in_both(ramp):
    outputs = draws("mono", ramp)

    for y in outputs:
        assert torch.equal(y[0], y[1])
    assert {float(y[0, 0]) for y in outputs} == {1.0, 1.5}

def changed(x, y):
    """The places from the first to the last where y is not x."""
    places = (x != y).any(dim=0).nonzero()
    return slice(int(places.min()), int(places.max()) + 1)

def test_mask_silences_one_part_of_any_length_anywhere(ramp):
    parts = []
    for y in draws("mask", ramp):
        part = changed(ramp, y)
        assert not y[:, part].any()
        parts.append(part)

    lengths = [part.stop - part.start for part in parts]
    assert 0 <= min(lengths) < 150
    assert 9850 < max(lengths) <= 10_000
    assert min(part.start for part in parts) < 1000
    assert max(part.start for part in parts) > 6000

def test_mask_silences_two_seconds_at_most():
    outputs = draws("mask", torch.ones(1, 200_000), 20)

    longest = max(int(y.eq(0).sum()) for y in outputs)
    assert 80_000 < longest <= 2 * RATE

def test_reverse_turns_one_part_around_anywhere(ramp):
    parts = []
    for y in draws("reverse", ramp):
        part = changed(ramp, y)
        assert torch.equal(y[:, part], ramp[:, part].flip(1))
        parts.append(part)

    lengths = [part.stop - part.start for part in parts]
    assert 2000 <= min(lengths) < 2150
    assert 3850 < max(lengths) <= 4000
    assert min(part.start for part in parts) < 1000
    assert max(part.start for part in parts) > 6000

@pytest.fixture(scope="session")
def tones():
    """A second of 441 Hz in the left channel and of 882 Hz in the right one."""
    t = torch.arange(RATE) / RATE
    return torch.stack([torch.sin(2 * torch.pi * frequency * t) for frequency in (441.0, 882.0)])

def middle(x):
    return x[:, 4096:24576]

def frequencies(x):
    """Of the highest peak of each channel's spectrum, in Hz."""
    hann = torch.hann_window(20480)
    return torch.fft.rfft(middle(x) * hann).abs().argmax(dim=1) * RATE / 20480

def test_pitch_changes_by_up_to_five_semitones_in_the_same_time(tones):
    outputs = draws("pitch", tones, 20)

    factors = []
    for y in outputs:
        assert y.shape == tones.shape
        factors.append(frequencies(y)[0].item() / 441)
    assert 0.74 < min(factors) < 0.85
    assert 1.24 < max(factors) < 1.35

def test_pitch_changes_alike_in_both_channels(tones):
    for y in draws("pitch", tones, 20):
        left, right = frequencies(y)
        assert abs(right - 2 * left) < 6

def test_speed_changes_the_length_and_with_it_the_pitch(tones):
    outputs = draws("speed", tones, 20)

    factors = [RATE / y.shape[1] for y in outputs]
    assert 0.79 < min(factors) < 0.9
    assert 1.2 < max(factors) < 1.31
    for y, factor in zip(outputs, factors):
        assert (frequencies(y) - factor * torch.tensor([441, 882])).abs().max() < 3

@pytest.mark.parametrize("name", ["pitch", "speed"])
def test_a_tone_of_another_pitch_is_as_loud(name, tones):
    before = middle(tones).square().mean(1)

    for y in draws(name, tones, 20):
        after = middle(y).square().mean(1)
        assert (after / before - 1).abs().max() < 0.02

@pytest.mark.parametrize("name", ["pitch", "speed"])
def test_a_panned_source_of_another_pitch_stays_where_it_was(name, tones):
    panned = torch.stack([-0.5 * tones[0], tones[0]])

    for left, right in draws(name, panned, 8):
        assert (left + 0.5 * right).abs().max() < 1e-3
        assert right.abs().max() > 0.8

@pytest.mark.parametrize("frames", [1, 2, 33, 101])
def test_stretch_works_at_every_percentage_of_pitch(frames):
    length = 512 * (frames - 1)
    silence = torch.zeros(1, length)

    for percent in range(75, 134):
        y = mss.stretch(silence, percent)
        assert length * percent // 100 <= y.shape[1] <= length * percent / 100 + 3072, percent

def stereo_tone(frequency):
    """A second of a sine in both channels, of amplitude 0.5."""
    t = torch.arange(RATE) / RATE
    return 0.5 * torch.sin(2 * math.pi * frequency * t).repeat(2, 1)

def test_the_equalizer_changes_a_tone_by_up_to_6_decibels():
    x = stereo_tone(1000)
    middle = slice(RATE // 4, -RATE // 4)

    gains = [mss.decibels(*(float(z[:, middle].square().sum()) for z in (y, x)))
             for y in draws("equalizer", x, 50)]

    assert -6.1 < min(gains) < -3
    assert 3 < max(gains) < 6.1

def test_the_equalizer_has_its_own_gain_for_each_octave():
    x = stereo_tone(200) + stereo_tone(6400)

    (y,) = draws("equalizer", x, 1)

    before, after = torch.fft.rfft(x[0]).abs(), torch.fft.rfft(y[0]).abs()
    ratios = after[[200, 6400]] / before[[200, 6400]]
    assert (ratios[0] / ratios[1]).log().abs() > 0.05

def test_a_room_goes_on_sounding_when_the_voice_has_ended():
    x = torch.nn.functional.pad(noise(2, 4410), (0, RATE))

    for y in draws("room", x, 10):
        after, later = y[:, 4410:8820].square().mean(), y[:, -8820:].square().mean()
        assert after > 1e-8
        assert later < after

def test_a_room_keeps_the_direct_sound():
    x = torch.nn.functional.pad(noise(2, 4410), (0, RATE))

    for y in draws("room", x, 10):
        assert (y[:, :10] - x[:, :10]).abs().max() < 0.5 * x.abs().max()
        assert mss.sdr(x, y) > 3

def test_a_second_voice_is_added_later_and_softer():
    x = stereo_tone(400)

    for y in draws("second", x, 10):
        assert torch.equal(y[:, :441], x[:, :441])
        added = (y - x)[:, RATE // 4:-RATE // 4]
        assert 0.2 < added.square().mean() ** 0.5 / x.square().mean() ** 0.5 < 1.1

def test_a_second_voice_is_at_an_interval():
    """A third, a fourth, a fifth below or above 400 Hz, or in unison."""
    x = stereo_tone(400)
    intervals = {round(400 * round(100 * 2 ** (k / 12)) / 100) for k in (-5, -4, -3, 0, 3, 4, 5)}

    for y in draws("second", x, 20):
        added = (y - x)[0, RATE // 4:-RATE // 4]
        spectrum = torch.fft.rfft(added * torch.hann_window(len(added)), n=RATE).abs()
        assert min(abs(int(spectrum.argmax()) - f) for f in intervals) <= 3

def test_silence_takes_all_of_a_source(monkeypatch):
    silence = mss.AUGMENTATIONS["silence"]._replace(probability=0.5)
    monkeypatch.setitem(mss.AUGMENTATIONS, "silence", silence)
    segments = mss.Segments([Constant(1)], mss.Config(), seconds=10 / RATE, augment=("silence",))

    found = {(mixture[0, 0].item(), targets[0, 0, 0].item())
             for mixture, targets in map(segments.__getitem__, range(40))}

    # Two segments of each source, or none.
    assert found == {(0, 0), (2, 0), (2, 2), (4, 2)}

# ---- Segments -----------------------------------------------------------------------------------

class Constant:
    """A track whose sources are all one number, so that sums tell what was drawn."""
    name = "constant"
    sample_rate = RATE
    channels = 2

    def parts(self, source):
        return (source,)

    def __init__(self, value, frames=20):
        self.value = value
        self.frames = frames
        self.drawn = []                                               # (source, start)

    def load(self, source, start, frames):
        self.drawn.append((source, start))
        return torch.full((2, min(frames, self.frames - start)), float(self.value))

def examples(songs, seed):
    """Segments of a quarter of a second, augmented in all ways."""
    tracks = mss.musdb_tracks(songs, "train")
    return mss.Segments(tracks, mss.Config(), 0.25, augment=tuple(mss.AUGMENTATIONS), seed=seed)

def test_segments_are_a_pure_function_of_seed_and_index(songs):
    segments = examples(songs, seed=1)
    first = [segments[i] for i in range(5)]

    again = examples(songs, seed=1)

    for i in (3, 1, 0, 2, 4):
        assert all(map(torch.equal, again[i], first[i]))

def test_segments_have_the_length_that_was_asked_for(songs):
    mixture, targets = examples(songs, seed=1)[0]

    assert mixture.shape == (2, RATE // 4)
    assert targets.shape == (1, 2, RATE // 4)

def test_every_index_is_another_segment(songs):
    segments = examples(songs, seed=1)

    assert not torch.equal(segments[0][0], segments[1][0])

def test_every_seed_makes_other_segments(songs):
    assert not torch.equal(examples(songs, seed=1)[0][0], examples(songs, seed=2)[0][0])

def test_songs_at_another_rate_than_the_models_are_refused():
    with pytest.raises(mss.UserError, match="22050 Hz expected, found 44100 Hz"):
        mss.Segments([Constant(1)], mss.Config(sample_rate=22050))

TWICE = {"vocals": 2, "accompaniment": 2}
TWICE_BUT_BASS = {"vocals": 2, "bass": 1, "drums": 2, "other": 2}

@pytest.mark.parametrize("target, count", [
    ("vocals", TWICE),
    ("accompaniment", TWICE),
    ("bass", TWICE_BUT_BASS),
    ("other", TWICE_BUT_BASS),
])
def test_two_segments_of_each_source_are_mixed_but_one_of_bass(target, count):
    tracks = [Constant(1), Constant(100)]
    config = mss.Config(targets=(target,))

    mss.Segments(tracks, config, seconds=10 / RATE)[0]

    drawn = [source for track in tracks for source, _ in track.drawn]
    assert {source: drawn.count(source) for source in drawn} == count

@pytest.mark.parametrize("target", ["vocals", "accompaniment", "bass", "other"])
def test_the_mixture_and_the_target_are_the_sums_of_what_was_drawn(target):
    tracks = [Constant(1), Constant(100)]
    config = mss.Config(targets=(target,))

    mixture, targets = mss.Segments(tracks, config, seconds=10 / RATE)[0]

    total = of_target = 0
    for track in tracks:
        sources = [source for source, _ in track.drawn]
        total += track.value * len(sources)
        of_target += track.value * sources.count(target)
    assert (mixture == total).all()
    assert (targets == of_target).all()

def test_the_accompaniment_beside_its_parts_is_what_the_vocals_leave():
    config = mss.Config(targets=("accompaniment", "vocals", "bass"))

    mixture, targets = mss.Segments([Constant(1)], config, seconds=10 / RATE)[0]

    assert (mixture == 7).all()
    assert targets[:, 0, 0].tolist() == [5, 2, 1]

@pytest.mark.parametrize("target", ["vocals", "bass"])
def test_every_position_of_every_song_is_as_likely(target):
    tracks = [Constant(1), Constant(100)]
    segments = mss.Segments(tracks, mss.Config(targets=(target,)), seconds=10 / RATE)

    for i in range(200):
        segments[i]

    for track in tracks:
        starts = {start for _, start in track.drawn}
        assert starts == set(range(11))                               # to the last that is whole
    first, second = (len(track.drawn) for track in tracks)
    assert 0.45 < first / (first + second) < 0.55

def test_a_song_is_drawn_from_as_often_as_it_is_long():
    short, long = Constant(1, frames=19), Constant(100, frames=39)    # 10 and 30 positions
    segments = mss.Segments([short, long], mss.Config(), seconds=10 / RATE)

    for i in range(200):
        segments[i]

    assert 2.5 < len(long.drawn) / len(short.drawn) < 3.5

def test_what_a_short_song_lacks_is_silence():
    mixture, _ = mss.Segments([Constant(1)], mss.Config(), seconds=30 / RATE, mix_audio=1)[0]

    assert mixture.shape == (2, 30)
    assert (mixture[:, :20] == 2).all()
    assert not mixture[:, 20:].any()

def test_a_stereo_song_becomes_mono_for_a_mono_model():
    config = mss.Config(channels=1)

    mixture, targets = mss.Segments([Constant(1)], config, seconds=10 / RATE, mix_audio=1)[0]

    assert (mixture.shape, targets.shape) == ((1, 10), (1, 1, 10))
    assert (mixture == 2).all()

class Unreadable(Constant):
    def load(self, source, start, frames):
        raise OSError("gone")

def test_ten_songs_in_a_row_that_cannot_be_read_are_too_many():
    segments = mss.Segments([Unreadable(1)], mss.Config(), seconds=10 / RATE)

    with pytest.raises(mss.UserError, match="constant: gone"):
        segments[0]

    assert segments.unreadable.tolist() == [9]                        # and the tenth

def watch_augmentations(monkeypatch, **changes):
    """Let all augmentations do nothing but note themselves -> [(name, samples given)]."""
    calls = []
    for name, augmentation in mss.AUGMENTATIONS.items():
        def function(x, rng, name=name):
            calls.append((name, x.shape[1]))
            return x
        watched = augmentation._replace(function=function, **changes)
        monkeypatch.setitem(mss.AUGMENTATIONS, name, watched)
    return calls

def augmented_examples(names):
    """Of 10 samples, of songs of 20,000."""
    return mss.Segments(
        [Constant(1, frames=20_000)], mss.Config(), seconds=10 / RATE, mix_audio=1, augment=names)

OFTEN = dict(shift=0.5, pitch=0.2, speed=0.2, swap=0.5, flip=0.5, gain=1, mask=0.1, mono=0.1,
             reverse=0.2)

def test_augmentations_are_as_frequent_as_pm_unets(monkeypatch):
    calls = watch_augmentations(monkeypatch)
    segments = augmented_examples(tuple(OFTEN))

    for i in range(500):
        segments[i]

    # 500 segments of vocals and 500 of accompaniment, which has its own pitch and direction.
    names = [name for name, _ in calls]
    assert set(names) == set(OFTEN)
    for name, often in OFTEN.items():
        total = 500 if name in ("pitch", "reverse") else 1000
        assert abs(names.count(name) / total - often) < 0.06, name

def test_augmentations_that_need_more_work_before_the_cut(monkeypatch):
    calls = watch_augmentations(monkeypatch)
    segments = augmented_examples(tuple(OFTEN))

    for i in range(50):
        segments[i]

    # `speed` reads 1.3 times as much as 10 samples, and `shift` 8192 more.
    before = {"shift", "pitch", "speed"}
    assert {length for name, length in calls if name in before} == {13 + 8192}
    assert {length for name, length in calls if name not in before} == {10}

def test_augmentations_work_in_their_own_order(monkeypatch):
    calls = watch_augmentations(monkeypatch, probability=1.0)

    augmented_examples(tuple(OFTEN)[::-1])[0]

    vocals = list(OFTEN)
    accompaniment = [name for name in OFTEN if name not in ("pitch", "reverse")]
    assert [name for name, _ in calls] == vocals + accompaniment

# ---- Audio files --------------------------------------------------------------------------------

@pytest.mark.parametrize("name, tolerance", [("a b (1) ü.wav", 0), ("x.flac", 2e-5)])
def test_audio_comes_back_from_a_file(name, tolerance, tmp_path):
    audio = noise(2, 1000)

    mss.write_audio(tmp_path / name, audio, RATE)
    read, rate = mss.read_audio(tmp_path / name)

    assert rate == RATE
    assert read.dtype == torch.float32
    assert (read - audio).abs().max() <= tolerance

@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_part_of_a_file_is_read(suffix, tmp_path):
    path = tmp_path / f"audio.{suffix}"
    mss.write_audio(path, noise(2, 1000), RATE)
    whole, _ = mss.read_audio(path)

    assert torch.equal(mss.read_audio(path, 300, 50)[0], whole[:, 300:350])
    assert torch.equal(mss.read_audio(path, 990, 50)[0], whole[:, 990:])
    assert mss.read_audio(path, 2000, 50)[0].shape == (2, 0)

def test_a_file_may_hold_no_samples(tmp_path):
    mss.write_audio(tmp_path / "empty.wav", noise(2, 0), RATE)

    assert mss.read_audio(tmp_path / "empty.wav")[0].shape == (2, 0)

@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_samples_that_are_not_finite_are_not_read(value, tmp_path):
    samples = np.zeros((1000, 2), "float32")
    samples[500, 1] = value
    soundfile.write(tmp_path / "bad.wav", samples, RATE, "FLOAT")

    with pytest.raises(mss.UserError, match="NaN or infinity at sample 500"):
        mss.read_audio(tmp_path / "bad.wav")

def test_samples_that_are_not_finite_are_not_written(tmp_path):
    audio = noise(2, 1000)
    audio[1, 500] = math.nan

    with pytest.raises(mss.UserError, match="NaN"):
        mss.write_audio(tmp_path / "nan.wav", audio, RATE)

    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("name", ["x.m4a", "x", "x.opus2"])
def test_a_name_of_no_format_is_refused(name, tmp_path):
    with pytest.raises(mss.UserError, match="ends in .wav, .flac, .ogg or .mp3 expected"):
        mss.write_audio(tmp_path / name, noise(2, 100), RATE)

@pytest.mark.parametrize("tail", [b"ID3\3" + b"\xff\x80" * 9000, bytes(9000)])
def test_tags_and_padding_behind_a_wav_are_no_sound(tail, tmp_path, capsys):
    path = tmp_path / "tagged.wav"
    mss.write_audio(path, noise(2, 1000), RATE)
    path.write_bytes(path.read_bytes() + tail)

    audio, _ = mss.read_audio(path)

    assert audio.shape == (2, 1000)
    assert not capsys.readouterr().err

@needs_ffmpeg                                                         # soundfile opens none of them
@pytest.mark.parametrize("name", ["joined.wav", "joined.aiff"])
def test_what_is_left_out_of_joined_files_is_told(name, tmp_path, capsys):
    path = tmp_path / name
    soundfile.write(path, noise(1000, 2).numpy(), RATE, "PCM_16")
    path.write_bytes(2 * path.read_bytes())

    audio, _ = mss.read_audio(path)

    assert audio.shape == (2, 1000)
    assert f"{name}: another file follows in it and is left out" in capsys.readouterr().err

@pytest.mark.parametrize("start, frames", [(-5, 10), (0.5, 10), (0, -2), (None, 10)])
def test_a_part_before_the_file_is_refused(start, frames, tmp_path):
    mss.write_audio(tmp_path / "noise.wav", noise(2, 100), RATE)

    with pytest.raises(mss.UserError, match="a whole number from -?. on expected"):
        mss.read_audio(tmp_path / "noise.wav", start, frames)

@pytest.mark.parametrize("frames, form", [(400_000_000, "WAV"), (600_000_000, "RF64")])
def test_a_wav_of_over_4_gb_to_come_is_an_rf64(frames, form, tmp_path):
    path = tmp_path / "long.wav"

    with mss.write_blocks(path, RATE, 2, frames) as write:
        write(noise(2, 10))

    assert soundfile.info(path).format == form

@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_is_ignored_stays_so(name):
    """As SIGHUP under nohup."""
    if not hasattr(signal, name):
        pytest.skip("Windows has no SIGHUP")
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        mss.unwind_on_signals()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)

@needs_ffmpeg
def test_ffmpeg_reads_what_soundfile_does_not(tmp_path):
    mss.write_audio(tmp_path / "tone.wav", noise(2, RATE), RATE)
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "tone.wav", tmp_path / "tone.m4a"]
    subprocess.run(command, check=True, timeout=PATIENCE)

    audio, rate = mss.read_audio(tmp_path / "tone.m4a")

    assert rate == RATE
    assert abs(audio.shape[1] - RATE) < 2100

@needs_ffmpeg
def test_what_not_even_ffmpeg_reads_is_named(tmp_path):
    (tmp_path / "broken.m4a").touch()

    with pytest.raises(mss.UserError, match="broken.m4a.*neither by soundfile nor by ffmpeg"):
        mss.read_audio(tmp_path / "broken.m4a")

@pytest.mark.parametrize("given, channels, expected", [
    ([[1.0, 2.0], [3.0, 6.0]], 2, [[1.0, 2.0], [3.0, 6.0]]),
    ([[1.0, 2.0], [3.0, 6.0]], 1, [[2.0, 4.0]]),
    ([[1.0, 2.0]], 2, [[1.0, 2.0], [1.0, 2.0]]),
], ids=["as it is", "stereo to mono", "mono to stereo"])
def test_mono_is_doubled_and_stereo_averaged(given, channels, expected):
    assert mss.to_channels(torch.tensor(given), channels).tolist() == expected

def test_other_numbers_of_channels_are_refused():
    with pytest.raises(mss.UserError, match="2 channels expected, or 1; found 3"):
        mss.to_channels(torch.zeros(3, 10), 2)

def write_mp3(path, *pieces, mode):
    """Write an MP3; of constant or variable bit rate, each frame as long as its sound needs."""
    audio = torch.cat(pieces, dim=1)
    soundfile.write(path, audio.T.numpy(), RATE, bitrate_mode=mode, compression_level=0.0)
    return path

def without_header(song):
    """Drop the frame that states an MP3's length; libsndfile guesses it from the next frame's."""
    content = song.read_bytes()
    second = content.index(content[:2], 4)                            # all frames begin alike
    song.write_bytes(content[second:])
    return song

def assert_separated_as_long_as_it_plays(song, checkpoint):
    """-> what is printed on stderr."""
    played, _ = soundfile.read(song)
    assert soundfile.info(song).frames > len(played)

    code, _, err = call(separate.main, song, "-m", checkpoint, "-o", song.parent)

    mixture, _ = mss.read_audio(song)
    assert mixture.shape == (2, len(played))
    assert code == 0
    vocals, accompaniment = stems(song.with_suffix(""))
    assert vocals.shape == mixture.shape
    assert torch.allclose(vocals + accompaniment, mixture, rtol=0, atol=1e-6)
    return err

def test_a_truncated_mp3_is_as_long_as_it_plays(checkpoint, tmp_path):
    song = write_mp3(tmp_path / "song.mp3", noise(2, 3 * RATE), mode="CONSTANT")
    os.truncate(song, song.stat().st_size * 2 // 3)                   # a player would just stop

    err = assert_separated_as_long_as_it_plays(song, checkpoint)

    assert f"{song}: truncated? 3.0 s expected, found" in err

def test_an_mp3_whose_length_is_guessed_too_high_is_as_long_as_it_plays(
        checkpoint, tmp_path, monkeypatch):
    pieces = torch.zeros(2, RATE), noise(2, RATE)
    song = without_header(write_mp3(tmp_path / "song.mp3", *pieces, mode="VARIABLE"))
    monkeypatch.setenv("PATH", "")

    err = assert_separated_as_long_as_it_plays(song, checkpoint)

    assert "truncated" not in err                                     # nothing was stated

@pytest.fixture
def long_mp3(tmp_path):
    """An MP3 of 2 s whose length libsndfile guesses too low."""
    pieces = noise(2, RATE // 2), torch.zeros(2, 3 * RATE // 2)
    song = without_header(write_mp3(tmp_path / "song.mp3", *pieces, mode="VARIABLE"))
    assert soundfile.info(song).frames < RATE
    return song

@needs_ffmpeg
def test_an_mp3_whose_length_is_guessed_too_low_is_read_to_its_end_by_ffmpeg(long_mp3):
    audio, _ = mss.read_audio(long_mp3)

    assert 0 <= audio.shape[1] - 2 * RATE < 2 * 1152                  # whole frames

def test_an_mp3_whose_length_is_guessed_is_noted_without_ffmpeg(long_mp3, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")

    mss.read_audio(long_mp3)

    assert "song.mp3: longer than its header says; the rest is left out" in capsys.readouterr().err

# Files whose header says something else than they hold.

def joined(folder, suffix):
    """Two files of a second, one behind the other."""
    path = folder / f"song.{suffix}"
    soundfile.write(path, noise(2, RATE).T.numpy(), RATE)
    path.write_bytes(2 * path.read_bytes())
    return path

@needs_ffmpeg
@pytest.mark.parametrize("suffix", ["flac", "mp3", "ogg"])
def test_a_second_file_behind_the_first_is_read_by_ffmpeg(suffix, tmp_path):
    song = joined(tmp_path, suffix)

    audio, _ = mss.read_audio(song)

    assert 1.6 * RATE < audio.shape[1] < 2.1 * RATE                   # some is lost at the seam

@pytest.mark.parametrize("suffix", ["flac", "mp3", "ogg"])
def test_a_second_file_behind_the_first_is_noted_without_ffmpeg(
        suffix, tmp_path, monkeypatch, capsys):
    song = joined(tmp_path, suffix)
    monkeypatch.setenv("PATH", "")

    audio, _ = mss.read_audio(song)

    assert audio.shape == (2, RATE)
    assert f"{song.name}: longer than its header says; the rest is left out" in (
        capsys.readouterr().err)

def with_size(path, size):
    """A second of noise in a WAV or AIFF whose header states another size -> the noise."""
    samples = noise(2, RATE)
    soundfile.write(path, samples.T.numpy(), RATE, "FLOAT")
    content = bytearray(path.read_bytes())
    chunk, order = (b"data", "<I") if path.suffix == ".wav" else (b"SSND", ">I")
    struct.pack_into(order, content, content.index(chunk) + 4, size)
    path.write_bytes(content)
    return samples

@needs_ffmpeg
@pytest.mark.parametrize("size", [0, 40_000], ids=["none", "wrapped at 4 GB"])
def test_a_wav_is_read_past_its_stated_size_by_ffmpeg(size, tmp_path, capsys):
    audio = with_size(tmp_path / "song.wav", size)

    read, _ = mss.read_audio(tmp_path / "song.wav")

    assert torch.equal(read, audio)
    assert "longer than its header says" in capsys.readouterr().err

def test_a_wav_of_no_stated_size_is_refused_without_ffmpeg(tmp_path, monkeypatch):
    with_size(tmp_path / "song.wav", 0)
    monkeypatch.setenv("PATH", "")

    with pytest.raises(mss.UserError, match="song.wav: longer than its header says.*ffmpeg"):
        mss.read_audio(tmp_path / "song.wav")

@pytest.mark.parametrize("size", [0x7F000008, 0x7FFFF000, 0x7FFFFFFF, 0x80000024, 0xFFFFFFFF])
@pytest.mark.parametrize("suffix", [".wav", ".aiff"])
def test_a_size_that_stands_for_an_unknown_one_is_none(suffix, size, tmp_path):
    audio = with_size(tmp_path / f"streamed{suffix}", size)

    read, _ = mss.read_audio(tmp_path / f"streamed{suffix}")

    assert torch.equal(read, audio)

@pytest.mark.parametrize("form", ["WAV", "AIFF", "W64", "RF64", "AU"])
def test_samples_that_are_missing_at_the_end_are_an_error(form, tmp_path):
    path = tmp_path / "song"
    soundfile.write(path, noise(2, RATE).T.numpy(), RATE, "PCM_16", format=form)
    os.truncate(path, path.stat().st_size // 2)

    with pytest.raises(mss.UserError, match="song: truncated"):
        mss.read_audio(path)

def test_an_ogg_without_its_end_is_noted(tmp_path, capsys):
    song = tmp_path / "song.ogg"
    soundfile.write(song, noise(2, RATE).T.numpy(), RATE)
    os.truncate(song, song.stat().st_size - 1)

    mss.read_audio(song)

    assert "song.ogg: truncated? its last page is missing" in capsys.readouterr().err

def ogg_checksum(page):
    """The CRC of an Ogg page (RFC 3533): polynomial 0x04C11DB7, its own four bytes taken as 0."""
    value = 0
    for byte in page[:22] + bytes(4) + page[26:]:
        value ^= byte << 24
        for _ in range(8):
            value = value << 1 ^ (0x104C11DB7 if value >> 31 else 0)
    return value

def test_an_ogg_that_is_a_few_samples_shorter_than_stated_is_whole(tmp_path, capsys, checkpoint):
    song = tmp_path / "song.ogg"
    soundfile.write(song, noise(2, RATE).T.numpy(), RATE)
    content = bytearray(song.read_bytes())
    last = content.rindex(b"OggS")
    struct.pack_into("<q", content, last + 6, RATE + 2000)            # where the music ends
    struct.pack_into("<I", content, last + 22, ogg_checksum(content[last:]))
    song.write_bytes(content)
    missing = soundfile.info(song).frames - len(soundfile.read(song)[0])
    assert 0 < missing < RATE / 10

    folder, _ = separate_song(checkpoint, song)

    assert soundfile.info(folder / "vocals.wav").frames == RATE + 2000 - missing

@pytest.mark.parametrize("missing, is_refused", [(RATE // 11, False), (RATE // 9, True)])
def test_a_tenth_of_a_second_may_be_missing_at_the_end(missing, is_refused, tmp_path):
    song = tmp_path / "song.wav"
    soundfile.write(song, noise(2, RATE).T.numpy(), RATE, "PCM_16")
    os.truncate(song, song.stat().st_size - 4 * missing)

    if is_refused:
        with pytest.raises(mss.UserError, match="truncated"):
            mss.read_audio(song)
    else:
        assert mss.read_audio(song)[0].shape == (2, RATE - missing)

def test_a_damaged_length_in_an_mp3_is_not_believed(tmp_path, monkeypatch):
    song = write_mp3(tmp_path / "song.mp3", noise(2, RATE), mode="CONSTANT")
    played, _ = soundfile.read(song)
    content = bytearray(song.read_bytes())
    content[content.index(b"Info") + 8] |= 1 << 6                     # 2^30 frames more: 325 days
    song.write_bytes(content)
    monkeypatch.setenv("PATH", "")

    audio, _ = mss.read_audio(song)

    assert 0 <= audio.shape[1] - len(played) < 2 * 1152               # whole frames

@needs_ffmpeg
@pytest.mark.parametrize("suffix", ["mp3", "flac", "ogg"])
def test_ffmpeg_reads_on_where_soundfile_cannot(suffix, tmp_path, capsys):
    song = tmp_path / f"song.{suffix}"
    soundfile.write(song, noise(2, 3 * RATE).T.numpy(), RATE)
    content = bytearray(song.read_bytes())
    middle = len(content) // 2
    content[middle:middle + 3000] = bytes(3000)
    song.write_bytes(content)

    audio, _ = mss.read_audio(song)

    assert 2 * RATE < audio.shape[1] < 3.1 * RATE
    assert f"{song.name}: damaged" in capsys.readouterr().err

def test_tags_behind_the_sound_are_no_sound(tmp_path, capsys):
    tags = struct.pack("<4sI", b"LIST", 5000) + bytes(5000)
    soundfile.write(tmp_path / "song.wav", noise(2, RATE).T.numpy(), RATE)
    soundfile.write(tmp_path / "song.mp3", noise(2, RATE).T.numpy(), RATE)

    for song in (tmp_path / "song.wav", tmp_path / "song.mp3"):
        song.write_bytes(song.read_bytes() + tags)
        assert mss.read_audio(song)[0].shape == (2, RATE)

    assert capsys.readouterr().err == ""

def test_samples_of_absurd_size_are_damage(tmp_path):
    soundfile.write(tmp_path / "song.wav", np.full((100, 2), 1e30), RATE, "FLOAT")

    with pytest.raises(mss.UserError, match="song.wav: finite samples expected"):
        mss.read_audio(tmp_path / "song.wav")

def test_a_sample_rate_of_no_sound_is_damage(tmp_path):
    mss.write_audio(tmp_path / "song.wav", noise(2, 1000), 172)

    with pytest.raises(mss.UserError, match="song.wav: 1000 Hz or more expected, found 172 Hz"):
        mss.read_audio(tmp_path / "song.wav")

# What cannot be written.

@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
def test_a_disk_that_is_full_at_the_end_leaves_no_file(suffix, tmp_path):
    path = tmp_path / f"vocals.{suffix}"
    audio = noise(2, RATE)
    mss.write_audio(path, audio, RATE)
    size = path.stat().st_size
    path.unlink()

    with no_file_above(size - 1000), pytest.raises(mss.UserError) as error:
        mss.write_audio(path, audio, RATE)

    assert str(error.value) == f"{path}: not written: {os.strerror(errno.EFBIG)}"
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("suffix, channels, rate, words", [
    ("mp3", 2, 44_056, "44100, 48000 Hz, found 44056 Hz"),
    ("ogg", 2, 384_000, "up to 200000 Hz, found 384000 Hz"),
    ("flac", 2, 700_000, "up to 655350 Hz, found 700000 Hz"),
    ("mp3", 3, RATE, "2 channels, found 3"),
    ("flac", 9, RATE, "8 channels, found 9"),
    ("ogg", 256, RATE, "255 channels, found 256"),
])
def test_a_formats_limits_are_named(suffix, channels, rate, words, tmp_path):
    with pytest.raises(mss.UserError, match=f"not written: .{suffix} holds.*{words}"):
        with mss.write_blocks(tmp_path / f"vocals.{suffix}", rate, channels):
            pass

    assert not list(tmp_path.iterdir())

# ---- Resampling ---------------------------------------------------------------------------------

@pytest.mark.parametrize("rate_in, rate_out", [
    (48000, 44100), (44100, 48000), (8000, 44100), (96000, 44100), (100, 83)])
def test_n_samples_become_n_times_the_ratio_of_the_rates(rate_in, rate_out):
    for n in (0, 1, 2, 159, 160, 161, 5000):
        y = mss.resample(noise(2, n), rate_in, rate_out)

        assert y.shape == (2, -(-n * rate_out // rate_in))

def test_a_stream_is_resampled_as_the_whole():
    x = noise(2, 300_000)

    blocks = list(mss.resample_blocks(x.split(7777, dim=-1), 48000, 44100))

    assert len(blocks) == 3
    assert torch.equal(torch.cat(blocks, dim=-1), mss.resample(x, 48000, 44100))

def tone(frequency, rate):
    """A second of it, in double precision; it isn't 0 at every sample at half the rate, either."""
    return np.sin(2 * np.pi * frequency * np.arange(rate) / rate + 0.5)

def resampled_tone(frequency, rate_in, rate_out):
    x = torch.from_numpy(tone(frequency, rate_in)).float()
    return mss.resample(x[None], rate_in, rate_out)[0].numpy()

def power(x):
    """Of what lies between the ends, in dB."""
    return 10 * np.log10((x[5000:-5000] ** 2).mean())

@pytest.mark.parametrize("frequency", [100, 9000, 20_000])
@pytest.mark.parametrize("rate_in, rate_out", [(48000, 44100), (44100, 48000)])
def test_tones_up_to_20_kHz_pass_without_delay_or_images(rate_in, rate_out, frequency):
    y = resampled_tone(frequency, rate_in, rate_out)

    assert power(y - tone(frequency, rate_out)) < -100

@pytest.mark.parametrize("frequency", [22_050, 23_000, 23_999])
def test_tones_that_the_lower_rate_cannot_hold_vanish(frequency):
    y = resampled_tone(frequency, 48000, 44100)

    assert power(y) < -100

# ---- What the scripts share ---------------------------------------------------------------------

class Broken(io.StringIO):
    """A stream that can't be written."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

@pytest.mark.parametrize("stream", [
    None, types.SimpleNamespace(write=len), Broken(OSError(28, "No space left")),
    Broken(BrokenPipeError())], ids=["no console", "a text field", "full", "closed"])
def test_whatever_stdout_and_stderr_are_the_work_is_done(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(mss, "unwind_on_signals", lambda: None)
    done = []

    def main():
        print("begun", flush=True)
        print("begun", file=sys.stderr, flush=True)
        done.append(mss.on_terminal(sys.stderr))
        return 0

    with pytest.raises(SystemExit) as stop:
        mss.run(main)

    assert (stop.value.code, done) == (0, [False])

def test_a_full_disk_under_stdout_is_told(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(OSError(28, "No space left")))
    monkeypatch.setattr(mss, "unwind_on_signals", lambda: None)
    err = io.StringIO()

    with contextlib.redirect_stderr(err), pytest.raises(SystemExit):
        mss.run(lambda: print("told"))

    assert "not all of stdout" in err.getvalue() and "No space left" in err.getvalue()

def test_what_an_encoding_lacks_is_escaped():
    raw = io.BytesIO()
    stream = mss.Reports(io.TextIOWrapper(raw, "cp1252"))

    print("é 日 \udce9", file=stream, flush=True)

    assert raw.getvalue().decode("cp1252").split() == ["é", r"\u65e5", r"\udce9"]

def test_what_a_terminal_would_obey_is_escaped_but_for_a_line_of_progress():
    text = io.StringIO()

    print("50 %", end=mss.CLEAR, file=mss.Reports(text))
    print("a\x1b[2Jb\rc\td", file=mss.Reports(text))

    assert text.getvalue() == "50 %" + mss.CLEAR + "a\\x1b[2Jb\\rc\td\n"

@pytest.mark.parametrize("words", [[""], ["-d", ""], ["--device", ""], ["--device="], ["-d="]])
def test_empty_arguments_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        mss.parser("").parse_args(words)

    assert stop.value.code == 2 and "empty argument" in capsys.readouterr().err

@pytest.mark.parametrize("words", [["--device=~/x"], ["-d~/x"]])
def test_a_home_that_the_shell_left_is_found(words, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")

    args = mss.parser("").parse_args(words)

    assert args.device == "/home/me/x"

@pytest.mark.parametrize("name", [
    "hpu", "meta", "privateuseone", pytest.param("cuda:999", id="absent GPU"), "nonsense", " "])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(mss.UserError, match="no such device here"):
        mss.pick_device(name)

@pytest.mark.parametrize("variables", [
    {"RANK": "0"}, {"RANK": "1", "WORLD_SIZE": "2"}, {"RANK": "", "WORLD_SIZE": "2"},
    {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
    {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
    {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "one"},
])
def test_a_part_of_a_launchers_environment_is_refused(variables, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**variables, "TORCHELASTIC_RUN_ID": "1"}.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(mss.UserError, match="torchrun"):
        mss.shared_store()

def test_an_ffmpeg_that_leaves_no_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "song.m4a").write_bytes(b"song")
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable)
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=0, stderr=""))

    with pytest.raises(mss.UserError, match="no output"):
        mss.read_audio(tmp_path / "song.m4a")

def test_a_dataset_that_is_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")

    with pytest.raises(mss.UserError, match="found no folder"):
        mss.musdb_root(tmp_path / "loop")

# ---- Training: what the tests share -------------------------------------------------------------

def quick(songs, out, **changes):
    """As flags, with a third of the work: few bins, and as few frames as the pooling takes."""
    return flags(songs, out, **{"window": 512, "hop": 128, "segment": 0.1, **changes})

def train_well(*words):
    """Run train.py, which must succeed -> stdout."""
    code, stdout, stderr = call(train.main, *words)
    assert code == 0, stderr
    return stdout

def content(path):
    return torch.load(path, map_location="cpu", weights_only=True)

def weights(path):
    return content(path)["model"]

def column(folder, name):
    """The numbers in a column of a run's log, where there are any."""
    return [float(row[name]) for row in read_csv(folder / "log.csv") if row[name]]

@pytest.fixture
def eight(trained, tmp_path):
    """A copy of the run of 8 steps, to go on with."""
    return shutil.copytree(trained, tmp_path / "eight")

def start_training(words, output):
    """Start train.py in a process group of its own, as a shell does; it writes to a file."""
    return start(HERE / "train.py", *words, stdout=output, stderr=subprocess.STDOUT,
                 start_new_session=True)

def wait_until(condition, process):
    """Until the condition holds, or the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)

# ---- Training: recipes --------------------------------------------------------------------------

def parsed(*words):
    return train.parse(["--musdb", "x", *words])

def test_the_network_is_the_papers():
    args = parsed()

    assert (args.model, args.width) == ("ResUNetDecouple+", 32)
    assert (args.window, args.hop) == (2048, 441)
    assert args.source == ("vocals",)

def test_examples_are_the_papers():
    args = parsed()

    assert args.batch_size == 16
    assert args.segment == 3.0
    assert args.mix_audio == 2
    assert args.augment == []

def test_optimization_is_the_papers():
    args = parsed()

    assert (args.loss, args.optimizer, args.schedule) == ("l1", "amsgrad", "steps")
    assert (args.steps, args.warmup) == (300_000, 1000)
    assert (args.clip, args.weight_decay) == (0, 0)

@pytest.mark.parametrize("source, rate", (
    ("vocals", 1e-3), ("accompaniment", 5e-4), ("bass", 1e-4), ("drums", 2e-4), ("other", 5e-4)))
def test_a_source_has_the_papers_learning_rate(source, rate):
    assert parsed("--source", source).lr == rate

def test_several_sources_have_the_mean_of_their_learning_rates():
    assert parsed("--source", "vocals,drums").lr == pytest.approx(6e-4)

@pytest.mark.parametrize("name, loss, optimizer, rate, batch, segment, clip, decay", (
    ("Wave-U-Net", "mse", torch.optim.Adam, 1e-3, 32, 1.0, 0, 0),
    ("Wave-U-Net-12", "mse", torch.optim.Adam, 1e-4, 16, 3.0, 0, 0),
    ("DPRNN", "phase", torch.optim.Adam, 1e-3, 16, 3.0, 5.0, 1e-5),
    ("PM-Unet", "l1+spec", torch.optim.RAdam, 1.5e-3, 6, 5.0, 0.5, 0),
    ("PM-Unet-conv", "l1+spec", torch.optim.RAdam, 1.5e-3, 6, 5.0, 0.5, 0)))
def test_a_relatives_recipe_is_its_seeds(
        name, loss, optimizer, rate, batch, segment, clip, decay):
    args = parsed("--model", name)
    made = train.optimizer_of(nn.Linear(1, 1), args)

    assert args.loss == loss
    assert (args.batch_size, args.segment, args.clip) == (batch, segment, clip)
    assert type(made) is optimizer
    assert (made.defaults["lr"], made.defaults["weight_decay"]) == (rate, decay)
    assert not made.defaults.get("amsgrad")

@pytest.mark.parametrize("name", RELATIVES)
def test_a_relatives_name_alone_decides_on_its_recipe(name):
    recipe = dict(train.RECIPES[name])
    source = tuple(recipe.pop("source").split(","))

    args = vars(parsed("--model", name))

    assert args["source"] == source
    assert recipe.items() <= args.items()

def test_pm_unet_learns_four_sources_augmented():
    args = parsed("--model", "PM-Unet")

    assert args.source == ("vocals", "bass", "drums", "other")
    assert args.augment == "shift pitch speed swap flip gain mask mono reverse".split()

def test_flags_overrule_a_recipe():
    args = parsed("--model", "PM-Unet", "--loss", "l1", "--clip", "0", "--augment")

    assert (args.loss, args.clip, args.augment) == ("l1", 0, [])

def test_augmentations_have_their_own_order():
    assert parsed("--augment", "gain", "shift").augment == ["shift", "gain"]

def test_a_scheduler_that_counts_processes_starts_none(monkeypatch):
    """WORLD_SIZE alone, without torchrun's RANK, says nothing about this process."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    spec = importlib.util.spec_from_file_location("train_of_a_scheduler", HERE / "train.py")
    module = importlib.util.module_from_spec(spec)

    spec.loader.exec_module(module)

    assert (module.RANK, module.WORLD) == (0, 1)

# ---- Training: losses, against numpy ------------------------------------------------------------

# Estimates and targets (B, S, C, L); one source is silent.
ESTIMATES = noise(2, 2, 2, 9000, seed=0, scale=0.3).double()
TARGETS = noise(2, 2, 2, 9000, seed=1, scale=0.3).double()
TARGETS[1, 1] = 0
SILENCE = torch.zeros_like(TARGETS)

def spectrum(audio, window, hop):
    """numpy's own STFT, (..., L) -> (..., T, F): centred, reflected, periodic Hann, normalised."""
    margins = [(0, 0)] * (audio.ndim - 1) + [(window // 2, window // 2)]
    x = np.pad(audio, margins, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(x, window, axis=-1)[..., ::hop, :]
    hann = np.hanning(window + 1)[:-1]
    return np.fft.rfft(frames * hann) / math.sqrt(window)

def expected_spectral_loss(window, hop):
    compressed = []
    phased = []
    for audio in (ESTIMATES, TARGETS):
        X = spectrum(audio.numpy(), window, hop)
        magnitude = np.maximum(abs(X), 1e-5)
        compressed.append(magnitude ** 0.3)
        phased.append(magnitude ** 0.3 * X / magnitude)
    error = phased[0] - phased[1]
    parts = np.mean([error.real ** 2, error.imag ** 2])
    return np.mean((compressed[0] - compressed[1]) ** 2) + parts

def expected_si_sdr():
    """The mean over all channels, in dB."""
    tiny = 2.0 ** -23
    ratios = []
    for y, s in zip(ESTIMATES.view(-1, 9000).numpy(), TARGETS.view(-1, 9000).numpy()):
        part = (y @ s + tiny) / (s @ s + tiny) * s
        error = part - y
        ratios.append(10 * np.log10((part @ part + tiny) / (error @ error + tiny)))
    return np.mean(ratios)

def assert_loss(name, expected):
    loss = train.LOSSES[name](ESTIMATES, TARGETS).item()
    assert loss == pytest.approx(expected, rel=1e-9)

def test_l1_against_numpy():
    assert_loss("l1", abs(ESTIMATES.numpy() - TARGETS.numpy()).mean())

def test_mse_against_numpy():
    assert_loss("mse", ((ESTIMATES.numpy() - TARGETS.numpy()) ** 2).mean())

def test_phase_loss_against_numpy():
    assert_loss("phase", expected_spectral_loss(2048, 441))

def test_compound_loss_against_numpy():
    l1 = abs(ESTIMATES.numpy() - TARGETS.numpy()).mean()
    assert_loss("l1+spec", (l1 + expected_spectral_loss(4096, 1024) - expected_si_sdr()) / 3)

@pytest.mark.parametrize("estimates, targets", (
    pytest.param(ESTIMATES, TARGETS, id="noise for noise"),
    pytest.param(TARGETS, TARGETS, id="right"),
    pytest.param(SILENCE, TARGETS, id="silence for noise"),
    pytest.param(SILENCE, SILENCE, id="silence for silence")))
@pytest.mark.parametrize("name", train.LOSSES)
def test_a_loss_and_its_gradient_are_finite(name, estimates, targets):
    estimates = estimates.float().requires_grad_()

    loss = train.LOSSES[name](estimates, targets.float())
    loss.backward()

    assert torch.isfinite(loss)
    assert torch.isfinite(estimates.grad).all()

# ---- Training: the learning rate ----------------------------------------------------------------

@pytest.mark.parametrize("step, expected", (
    (1, 1e-6), (500, 5e-4), (14_999, 1e-3), (45_000, 1e-3 * 0.9 ** 3)))
def test_the_learning_rate_is_the_papers(step, expected):
    assert train.learning_rate(step, 1e-3, 1000) == pytest.approx(expected)

@pytest.mark.parametrize("step, expected", (
    (1, 1), (65_000, 0.5), (129_999, 0), (130_000, 1)))
def test_cosine_falls_to_nothing_and_starts_again(step, expected):
    assert train.learning_rate(step, 1.0, 1, "cosine") == pytest.approx(expected, abs=1e-3)

def test_constant_stays():
    assert train.learning_rate(10 ** 6, 1.0, 1, "constant") == 1

# ---- Training: the loop -------------------------------------------------------------------------

def plain_losses(songs, steps):
    """Those of the paper's loop, in a few lines."""
    config = mss.Config(model="UNetDecouple+", width=2, window=512, hop=128)
    segments = mss.Segments(mss.musdb_tracks(songs, "train"), config, 0.1)
    torch.manual_seed(0)
    model = mss.MODELS["UNetDecouple+"](config).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True, fused=True)

    losses = []
    for step in range(steps):
        mixtures, targets = zip(segments[2 * step], segments[2 * step + 1])
        optimizer.param_groups[0]["lr"] = 2e-3 * min((step + 1) / 5, 1)
        optimizer.zero_grad()
        loss = (model(torch.stack(mixtures)) - torch.stack(targets)).abs().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

def test_the_loop_against_a_plain_one(songs, tmp_path):
    train_well(*quick(songs, tmp_path, steps=16, lr=2e-3, warmup=5, log_every=1,
                      validate_every=99, save_every=99))

    assert np.allclose(column(tmp_path, "loss"), plain_losses(songs, 16), rtol=1e-6, atol=0)

@pytest.fixture(scope="session")
def forty(songs, tmp_path_factory):
    """OUT of a run of 40 steps, long enough to learn something, of the steadiest network."""
    out = tmp_path_factory.mktemp("runs") / "forty"
    train_well(*quick(
        songs, out, model="UNet", width=4, hop=170, segment=0.2, steps=40, lr=5e-3, warmup=3,
        ema=0.9, validate_every=20))
    return out

def test_the_loss_falls_on_the_built_in_songs(forty):
    losses = column(forty, "loss")

    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])

def test_sdr_rises_on_the_built_in_songs(forty):
    first, last = column(forty, "valid_sdr_vocals")

    assert last > first

@pytest.mark.parametrize("step, share", ((1, 1 - 2 / 11), (80, 0.1), (10 ** 6, 0.1)))
def test_an_average_soon_forgets_the_first_weights(step, share):
    """And then takes a tenth of the weights with --ema 0.9; of batch norm's statistics, too."""
    average, model = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    nn.init.zeros_(average.weight)
    model.running_mean.fill_(1.0)

    train.update_average(train.floats(average), train.floats(model), step, 0.9)

    assert average.weight.item() == pytest.approx(share)
    assert average.running_mean.item() == pytest.approx(share)

def test_an_average_stays_where_nothing_was_learned():
    average = [noise(5, seed=1)]
    before = average[0].clone()

    train.update_average(average, [noise(5, seed=2)], 3, 0.9, torch.tensor(False))

    assert torch.equal(average[0], before)

@pytest.fixture(scope="session")
def averaged(songs, tmp_path_factory):
    """OUT of a single step with averaged weights."""
    out = tmp_path_factory.mktemp("runs") / "averaged"
    train_well(*quick(songs, out, steps=1, lr=0.1, warmup=1, ema=0.9))
    return out

def test_the_first_step_counts_as_the_first_in_the_average(averaged):
    last = content(averaged / "last.pt")
    torch.manual_seed(0)
    initial = mss.MODELS["UNetDecouple+"](mss.Config(**last["config"])).state_dict()

    name = "heads.q.weight"
    expected = torch.lerp(initial[name], last["raw"][name], 9 / 11)
    assert (last["raw"][name] - initial[name]).abs().max() > 0.05
    assert torch.allclose(last["model"][name], expected, rtol=0, atol=1e-6)

def test_the_average_is_what_is_kept_as_the_best(averaged):
    last = content(averaged / "last.pt")

    best = weights(averaged / "best.pt")

    assert equal(best, last["model"])
    assert not equal(best, last["raw"])

# ---- Training: a step ---------------------------------------------------------------------------

def gradient_of_a_step(batches, *words):
    """-> (loss, norm, gradient) in float64, with fixed statistics."""
    _, network = small()
    network.double().eval()
    args = parsed("--model", "UNetDecouple+", "--batch-size", "2", *words)
    optimizer = train.optimizer_of(network, args)

    loss, norm, _ = train.train_step(network, optimizer, iter(batches), args)

    gradient = torch.cat([value.grad.flatten() for value in network.parameters()])
    return loss.item(), norm.item(), gradient

def test_a_step_in_two_parts_is_one_of_both():
    mixture = noise(2, 2, 3000, seed=1).double()
    targets = noise(2, 1, 2, 3000).double()
    parts = list(zip(mixture.split(1), targets.split(1)))

    loss, norm, gradient = gradient_of_a_step([(mixture, targets)])
    loss_of_two, norm_of_two, gradient_of_two = gradient_of_a_step(parts, "--accumulate", "2")

    assert loss_of_two == pytest.approx(loss, rel=1e-9)
    assert norm_of_two == pytest.approx(norm, rel=1e-9)
    assert torch.allclose(gradient_of_two, gradient, rtol=1e-6, atol=1e-9 * norm)

def test_a_gradient_is_clipped_to_the_norm_given():
    batch = noise(2, 2, 3000, seed=1).double(), noise(2, 1, 2, 3000).double()

    _, norm, gradient = gradient_of_a_step([batch], "--clip", "1e-3")

    assert norm > 2e-3
    assert gradient.norm().item() == pytest.approx(1e-3, rel=1e-3)

@pytest.fixture(params=("amsgrad", "radam"))
def learner(request):
    """A small network, its optimizer, and args for train_step."""
    _, network = small()
    args = parsed("--model", "UNetDecouple+", "--batch-size", "1", "--optimizer", request.param)
    return network, train.optimizer_of(network, args), args

def step_once(learner, mixture=noise(1, 2, 3000, seed=1)):
    """-> (loss, norm, whether anything was learned)"""
    network, optimizer, args = learner
    values = [*network.parameters(), *network.buffers()]
    before = [value.clone() for value in values if value.is_floating_point()]

    loss, norm, _ = train.train_step(
        network, optimizer, iter([(mixture, noise(1, 1, 2, 3000))]), args)

    after = [value for value in values if value.is_floating_point()]
    same = [torch.equal(a, b) for a, b in zip(before, after)]
    moved = any(value.any() for state in optimizer.state.values() for value in state.values())
    return loss, norm, moved or not all(same)

def test_a_step_learns(learner):
    loss, norm, learned = step_once(learner)

    assert math.isfinite(loss)
    assert math.isfinite(norm)
    assert learned

# ---- Training: steps that are not finite --------------------------------------------------------

def test_nothing_is_learned_from_nan(learner):
    loss, _, learned = step_once(learner, mixture=torch.full((1, 2, 3000), math.nan))

    assert math.isnan(loss)
    assert not learned

def test_nothing_is_learned_from_an_infinite_loss(learner, monkeypatch):
    """Whose gradient is finite."""
    def infinite(estimates, targets):
        return estimates.abs().mean() + math.inf

    monkeypatch.setitem(train.LOSSES, "l1", infinite)
    loss, norm, learned = step_once(learner)

    assert loss == math.inf
    assert math.isfinite(norm)
    assert not learned

def test_nothing_is_learned_from_a_gradient_of_nan(learner):
    """As an overflow in the network would make it, where the loss is finite."""
    network, _, _ = learner
    next(network.parameters()).register_hook(lambda gradient: gradient * math.nan)

    loss, norm, learned = step_once(learner)

    assert math.isfinite(loss)
    assert math.isnan(norm)
    assert not learned

def spoil(monkeypatch, steps):
    """Let the mixtures of these steps, of two examples each, be NaN."""
    real = mss.Segments.__getitem__

    def example(self, i):
        mixture, targets = real(self, i)
        if i // 2 + 1 in steps:
            mixture = mixture * math.nan
        return mixture, targets

    monkeypatch.setattr(mss.Segments, "__getitem__", example)

def test_steps_that_are_not_finite_are_skipped_and_counted(songs, tmp_path, monkeypatch):
    spoil(monkeypatch, steps=(3, 4))

    train_well(*quick(songs, tmp_path, ema=0.9))

    last = content(tmp_path / "last.pt")
    assert column(tmp_path, "skipped") == [0, 2, 2, 2]
    assert last["skipped"] == 2
    for value in [*last["model"].values(), *last["raw"].values()]:
        assert torch.isfinite(value).all()

def test_steps_read_late_are_skipped_and_counted_too(songs, tmp_path, monkeypatch):
    """As on a GPU."""
    monkeypatch.setitem(train.AHEAD, "cpu", 1)
    spoil(monkeypatch, steps=(3, 4))

    train_well(*quick(songs, tmp_path, ema=0.9))

    assert column(tmp_path, "skipped") == [0, 2, 2, 2]
    assert content(tmp_path / "last.pt")["skipped"] == 2

def figures(loss, norm=1.0, flags=(0, 0, 0)):
    """What train_step gives."""
    return torch.tensor(loss), torch.tensor(norm), torch.tensor(flags, dtype=torch.float)

def test_only_20_steps_in_a_row_end_a_run(songs, tmp_path, monkeypatch):
    """Not 19, a good one, and 19 more."""
    results = iter(19 * [math.nan] + [1.0] + 19 * [math.nan])
    monkeypatch.setattr(train, "train_step", lambda *words: figures(next(results)))

    train_well(*quick(songs, tmp_path, steps=39, save_every=99, validate_every=99))

    assert content(tmp_path / "last.pt")["skipped"] == 38

@pytest.fixture(scope="session")
def diverged(songs, tmp_path_factory):
    """OUT of a run whose steps are finite to the second one only."""
    out = tmp_path_factory.mktemp("runs") / "diverged"
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, steps=range(3, 99))
        fails(train.main, *quick(songs, out, steps=50, ema=0.9),
              saying=("20 steps", "to step 22", "loss nan", "--lr"))
    return out

def test_20_steps_in_a_row_that_are_not_finite_end_a_run(diverged):
    assert 3 <= content(diverged / "last.pt")["step"] < 22

def test_a_run_that_diverged_keeps_what_it_had_learned(diverged, songs, tmp_path):
    train_well(*quick(songs, tmp_path / "good", steps=2, ema=0.9))

    good = content(tmp_path / "good" / "last.pt")
    last = content(diverged / "last.pt")
    for name in ("model", "raw"):
        for key, value in good[name].items():
            if value.is_floating_point():
                assert torch.equal(last[name][key], value)

# ---- Training: going on -------------------------------------------------------------------------

def test_a_resumed_run_equals_an_uninterrupted_one(songs, trained, tmp_path):
    """Also where it is resumed with other numbers of workers."""
    train_well(*flags(songs, tmp_path, steps=4))
    train_well(*flags(songs, tmp_path, workers=2))

    assert content(tmp_path / "last.pt")["step"] == 8
    assert equal(weights(tmp_path / "last.pt"), weights(trained / "last.pt"))

def test_to_read_steps_late_changes_nothing(songs, trained, tmp_path, monkeypatch):
    """As on a GPU, which goes on meanwhile; interrupted, too."""
    monkeypatch.setitem(train.AHEAD, "cpu", 1)

    train_well(*flags(songs, tmp_path, steps=4))
    train_well(*flags(songs, tmp_path))

    assert equal(weights(tmp_path / "last.pt"), weights(trained / "last.pt"))
    for name in ("loss", "grad_norm", "skipped"):
        assert column(tmp_path, name) == column(trained, name)

def test_flags_read_late_end_a_run_a_step_later(songs, tmp_path, monkeypatch):
    monkeypatch.setitem(train.AHEAD, "cpu", 1)

    stdout = train_well(*quick(songs, tmp_path, hours=1e-9))

    assert "out of --hours at step 2" in stdout
    assert content(tmp_path / "last.pt")["step"] == 2

def test_a_run_that_is_done_stays_as_it_is(songs, eight):
    before = (eight / "last.pt").read_bytes()

    assert "done at step 8" in train_well(*flags(songs, eight))
    assert (eight / "last.pt").read_bytes() == before

def test_hours_end_a_run(songs, tmp_path):
    stdout = train_well(*quick(songs, tmp_path, hours=1e-9))

    assert "out of --hours at step 1" in stdout
    assert content(tmp_path / "last.pt")["step"] == 1

@pytest.fixture
def steady(monkeypatch):
    """Steps take a second each, by a clock of ours, and learn nothing; the loss is their number."""
    seconds = [0.0]

    def step(network, optimizer, batches, args, flags):
        seconds[0] += 1
        return figures(seconds[0], 0.5, flags)

    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])

def test_hours_are_hours(songs, tmp_path, steady):
    stdout = train_well(*quick(songs, tmp_path, hours=2.5 / 3600, save_every=99, validate_every=99))

    # Before step 4 three seconds have passed.
    assert "out of --hours at step 4" in stdout

def test_a_row_of_the_log_holds_the_means_since_the_last(songs, tmp_path, steady):
    train_well(*quick(songs, tmp_path, save_every=99, validate_every=99))

    assert column(tmp_path, "loss") == [1.5, 3.5, 5.5, 7.5]
    assert column(tmp_path, "grad_norm") == [0.5] * 4
    assert column(tmp_path, "ms_per_step") == [1000] * 4
    assert column(tmp_path, "data_wait") == [0] * 4

def kill_after_a_save(words, last, seconds):
    """Start a run, and kill -9 it that long after its first save -> the step that it saved."""
    before = 0
    if last.exists():
        before = last.stat().st_mtime_ns
    process = start_training(words, subprocess.DEVNULL)
    wait_until(lambda: last.exists() and last.stat().st_mtime_ns > before, process)
    time.sleep(seconds)
    process.kill()
    process.wait()
    return content(last)["step"]

@pytest.fixture(scope="session")
def killed(songs, tmp_path_factory):
    """Two runs of 20 steps, with averaged weights: one killed again and again, one undisturbed."""
    folder = tmp_path_factory.mktemp("killed")
    settings = dict(steps=20, ema=0.9, workers=1, save_every=2, validate_every=10)
    words = quick(songs, folder / "killed", **settings)
    last = folder / "killed" / "last.pt"
    steps = [kill_after_a_save(words, last, seconds) for seconds in (0, 0.1, 0.3)]
    (folder / "killed" / ".partial-1-last.pt").touch()

    train_well(*words)
    train_well(*quick(songs, folder / "whole", **settings))
    return types.SimpleNamespace(
        steps=steps, killed=folder / "killed", whole=folder / "whole")

def test_whenever_a_run_is_killed_it_had_saved_some_steps(killed):
    assert killed.steps[0] > 0
    assert killed.steps == sorted(killed.steps)

@pytest.mark.parametrize("name", ("model", "raw"), ids=("averages", "weights"))
def test_a_killed_run_learns_what_an_undisturbed_one_does(killed, name):
    ours = content(killed.killed / "last.pt")[name]
    theirs = content(killed.whole / "last.pt")[name]

    assert equal(ours, theirs)

def test_a_killed_runs_optimizer_is_an_undisturbed_ones(killed):
    ours = content(killed.killed / "last.pt")["optimizer"]["state"]
    theirs = content(killed.whole / "last.pt")["optimizer"]["state"]

    assert list(ours) == list(theirs)
    for number, state in theirs.items():
        assert equal(ours[number], state)

def test_a_killed_runs_log_is_an_undisturbed_ones(killed):
    for name in ("step", "loss", "skipped", "valid_sdr_vocals"):
        assert column(killed.killed, name) == column(killed.whole, name)

def test_a_killed_process_leaves_no_half_files(killed):
    assert list(killed.killed.glob(".partial*")) == []

# ---- Training: validation -----------------------------------------------------------------------

@pytest.fixture
def interrupted(songs, tmp_path, monkeypatch):
    """OUT of a run of 3 steps that was interrupted while it validated."""
    out = tmp_path / "interrupted"
    real = evaluate.separated

    def separated(*words):
        signal.raise_signal(signal.SIGINT)
        return real(*words)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(evaluate, "separated", separated)
    code, _, _ = call(train.main, *quick(songs, out, steps=3))
    monkeypatch.undo()
    signal.signal(signal.SIGINT, before)
    assert code == 130
    return out

def test_dropout_follows_from_the_step_alone(songs, tmp_path, monkeypatch):
    """Open-Unmix has some; the others' steps draw nothing."""
    monkeypatch.setattr(train, "standardise", lambda model, segments: None)
    words = dict(model="Open-Unmix", source="vocals", width=4, window=512, hop=128)
    train_well(*flags(songs, tmp_path / "whole", steps=3, **words))
    for steps in (1, 3):
        train_well(*flags(songs, tmp_path / "resumed", steps=steps, **words))

    assert equal(weights(tmp_path / "whole" / "last.pt"), weights(tmp_path / "resumed" / "last.pt"))

def test_open_unmix_begins_with_standardised_inputs(songs):
    tracks = mss.musdb_tracks(songs, "train")
    config, model = small("Open-Unmix")
    segments = mss.Segments(tracks, config, seconds=0.2)

    train.standardise(model, segments, count=20)

    network, = model.backbone.networks
    X = torch.stack([mss.stft(segments[i][0], 256, 64) for i in range(20)])
    x = X.abs()[..., :network.bins_read]
    x = (x + network.input_mean) * network.input_scale
    deviation, mean = torch.std_mean(x.flatten(0, 2), dim=0)
    assert mean.abs().max() < 1e-3
    assert (deviation - 1).abs().max() < 0.01

def test_an_interrupted_validation_makes_no_best(interrupted):
    assert (interrupted / "last.pt").exists()
    assert not (interrupted / "best.pt").exists()
    assert column(interrupted, "valid_sdr_vocals") == []

def test_an_interrupted_validation_is_made_up_for(songs, interrupted):
    train_well(*quick(songs, interrupted, steps=3))

    row = read_csv(interrupted / "log.csv")[-1]
    last = content(interrupted / "last.pt")
    best = content(interrupted / "best.pt")
    assert last["validated"] == best["step"] == int(row["step"]) == 3
    assert last["best"] == best["valid_sdr_vocals"] == float(row["valid_sdr_vocals"])

def test_a_validation_is_made_up_for_once(songs, interrupted):
    for _ in range(2):
        train_well(*quick(songs, interrupted, steps=3))

    assert len(column(interrupted, "valid_sdr_vocals")) == 1

def test_a_worse_validation_leaves_the_best(songs, eight, monkeypatch):
    def worse(model, track, bf16):
        mixture = track.load("mixture")
        return mixture, {"vocals": 99 * mixture}

    before = (eight / "best.pt").read_bytes()
    monkeypatch.setattr(evaluate, "separated", worse)
    train_well(*flags(songs, eight, steps=9))

    assert read_csv(eight / "log.csv")[-1]["step"] == "9"
    assert (eight / "best.pt").read_bytes() == before

def test_a_validation_is_the_median_of_its_songs_and_the_mean_of_their_usdr(monkeypatch):
    _, model = small()
    tracks = [types.SimpleNamespace(name="song", score=score) for score in (1.0, 2.0, 6.0)]
    seen = []

    def separated(model, track, bf16):
        seen.append((model.training, bf16))
        return None, None

    def compare(track, mixture, estimates):
        def scores(sdr):
            return {"vocals": {"SDR": np.array([sdr]), "uSDR": 10 + sdr}}
        return {"estimate": scores(track.score), "mixture": scores(-track.score)}, None, None

    monkeypatch.setattr(evaluate, "separated", separated)
    monkeypatch.setattr(evaluate, "compare", compare)

    scores = train.validate(model.train(), tracks, False, [])

    assert scores == {
        "valid_sdr_vocals": 2, "valid_mixture_sdr_vocals": -2, "valid_usdr_vocals": 13}
    assert seen == [(False, False)] * 3
    assert model.training

def test_silent_validation_songs_are_refused_at_the_start(songs, tmp_path):
    root = shutil.copytree(songs, tmp_path / "root")
    for stem in root.glob("valid/*/vocals.flac"):
        mss.write_audio(stem, torch.zeros(2, 3 * RATE), RATE)

    fails(train.main, *quick(root, tmp_path / "run"),
          saying=("a validation song with vocals", "silence"))
    assert not (tmp_path / "run").exists()

@pytest.mark.parametrize("subset, named", [("train", 3), ("valid", 1)])
def test_songs_at_another_rate_are_all_named_at_the_start(songs, tmp_path, subset, named):
    root = shutil.copytree(songs, tmp_path / "root")
    for stem in root.glob(f"{subset}/*/*.flac"):
        audio, _ = mss.read_audio(stem)
        mss.write_audio(stem, audio, 48000)

    code, _, stderr = call(train.main, *quick(root, tmp_path / "run"))

    assert code == 2
    assert "44100 Hz expected, found 48000 Hz" in stderr
    assert stderr.count("Synthetic - Song") == named
    assert not (tmp_path / "run").exists()

@pytest.mark.parametrize("stem, words", [
    ("bass", ("a validation song with vocals expected", "bass.flac", "truncated")),
    ("vocals", ("a validation song with vocals expected", "vocals.flac", "truncated"))])
def test_validation_songs_of_which_none_can_be_scored_are_refused_at_the_start(
        songs, tmp_path, stem, words):
    root = shutil.copytree(songs, tmp_path / "root")
    (root / "valid" / "Synthetic - Song 3" / "mixture.flac").unlink()
    break_file(root / "valid" / "Synthetic - Song 3" / f"{stem}.flac")

    fails(train.main, *quick(root, tmp_path / "run"), saying=words)
    assert not (tmp_path / "run").exists()

def test_songs_without_anything_but_vocals_cannot_be_validated_with(songs, tmp_path):
    """BSS Eval counts no frame in which the accompaniment is silent."""
    root = shutil.copytree(songs, tmp_path / "root")
    for name in ("bass", "drums", "other"):
        mss.write_audio(root / "valid" / "Synthetic - Song 3" / f"{name}.flac",
                        torch.zeros(2, 3 * RATE), RATE)

    fails(train.main, *quick(root, tmp_path / "run"), saying=("validation song with vocals",))

def test_a_run_ends_where_no_validation_song_can_be_read_any_more(songs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "separated", lambda *words: mss.read_audio("gone.wav"))

    code, _, stderr = call(train.main, *quick(songs, tmp_path))

    assert code == 2
    assert "none of the validation songs could be separated and scored" in stderr
    assert content(tmp_path / "last.pt")["step"] == 3

def test_a_run_whose_validations_gave_no_score_ends_with_an_error(songs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "aggregate", lambda *words: math.nan)

    fails(train.main, *quick(songs, tmp_path), saying=("no validation gave a score",))
    assert content(tmp_path / "last.pt")["step"] == 8

# ---- Training: checkpoints and log --------------------------------------------------------------

def test_last_holds_what_a_run_needs(trained):
    last = content(trained / "last.pt")

    assert last["step"] == 8
    assert last["config"]["model"] == "UNetDecouple+"
    assert "optimizer" in last

def test_the_log_has_a_row_for_every_few_steps(trained):
    rows = [row for row in read_csv(trained / "log.csv") if row["loss"]]

    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8]

def test_the_log_has_a_row_for_every_validation(trained):
    rows = [row for row in read_csv(trained / "log.csv") if row["valid_sdr_vocals"]]

    assert [int(row["step"]) for row in rows] == [3, 6, 8]

def test_best_is_the_highest_validation(trained):
    _, _, state = mss.load_checkpoint(trained / "best.pt")

    rows = [row for row in read_csv(trained / "log.csv") if row["valid_sdr_vocals"]]
    best = max(rows, key=lambda row: float(row["valid_sdr_vocals"]))
    assert state["step"] == int(best["step"])
    assert state["valid_sdr_vocals"] == float(best["valid_sdr_vocals"])

@pytest.mark.parametrize("run", ["trained", "averaged"])
def test_the_sdr_of_best_is_evaluates(run, songs, request):
    """Also of averaged weights."""
    _, model, state = mss.load_checkpoint(request.getfixturevalue(run) / "best.pt")
    track, = mss.musdb_tracks(songs, "valid")

    scores, _, _ = evaluate.compare(track, *evaluate.separated(model, track))

    sdr = evaluate.finite(np.median, scores["estimate"]["vocals"]["SDR"])
    assert state["valid_sdr_vocals"] == pytest.approx(sdr, abs=1e-4)

@pytest.mark.parametrize("change", [
    lambda log: b"\xef\xbb\xbf" + log,
    lambda log: log.replace(b",", b";"),
    lambda log: log.replace(b"\r\n", b"\n"),
    lambda log: log.replace(b"\r\n6,", b"\r\n9,"),
    lambda log: log.replace(b"\r\n6,", b"\r\nx,\0"),
    lambda log: b"",
], ids=["byte order mark", "semicolons", "other line ends", "another step", "no number", "empty"])
def test_a_log_that_something_has_changed_loses_no_row(change, songs, eight):
    before = column(eight, "step")
    changed = change((eight / "log.csv").read_bytes())
    (eight / "log.csv").write_bytes(changed)

    _, _, stderr = call(train.main, *flags(songs, eight, steps=10))

    assert before == [2, 3, 4, 6, 6, 8, 8]
    assert column(eight, "step") == [*before, 9, 10, 10]
    assert drawn_lines(eight) == [5, 5]
    if changed:
        assert "kept as log-1.csv" in stderr
        assert (eight / "log-1.csv").read_bytes() == changed

def test_a_log_that_nothing_has_changed_is_gone_on_with(songs, eight):
    """Also where it holds rows of steps that are to be done again."""
    with open(eight / "log.csv", "ab") as file:
        file.write(b"9,0.5\r\n")

    _, _, stderr = call(train.main, *flags(songs, eight, steps=9))

    assert "kept" not in stderr
    assert column(eight, "step") == [2, 3, 4, 6, 6, 8, 8, 9, 9]
    assert not (eight / "log-1.csv").exists()

def test_the_log_of_a_run_whose_checkpoint_is_gone_is_kept(songs, eight):
    old = (eight / "log.csv").read_bytes()
    (eight / "log-1.csv").write_text("an older one")
    (eight / "last.pt").unlink()
    (eight / "best.pt").unlink()

    train_well(*quick(songs, eight, steps=1))

    assert (eight / "log-1.csv").read_text() == "an older one"
    assert (eight / "log-2.csv").read_bytes() == old

def test_a_row_of_the_log_is_of_the_steps_that_were_finite(songs, tmp_path, monkeypatch):
    results = iter([(1.0, 2.0), (math.nan, 3.0), (3.0, math.inf), (5.0, 7.0)])
    monkeypatch.setattr(train, "train_step", lambda *words: figures(*next(results)))

    train_well(*quick(songs, tmp_path, steps=4, save_every=99, validate_every=99))

    assert column(tmp_path, "loss") == [1.0, 4.0]
    assert column(tmp_path, "grad_norm") == [2.5, 7.0]

def drawn_lines(folder):
    """The number of points of each line in a run's curve.svg."""
    root = xml.etree.ElementTree.parse(folder / "curve.svg").getroot()
    lines = root.iter("{http://www.w3.org/2000/svg}polyline")
    return [len(line.get("points").split()) for line in lines]

def test_the_curve_shows_the_loss_and_the_validations(trained):
    """Up to the last validation, of step 8, and so all of them."""
    assert drawn_lines(trained) == [4, 3]

def test_the_curve_names_what_it_shows(trained):
    curve = (trained / "curve.svg").read_text(encoding="utf-8")
    last_loss = column(trained, "loss")[-1]

    assert f"loss {last_loss:.3g}" in curve
    assert "vocals SDR, dB" in curve
    assert "steps 2 to 8" in curve

# ---- Training: one run in a folder --------------------------------------------------------------

def test_a_second_run_in_a_folder_is_refused_and_one_after_a_kill_is_not(songs, tmp_path):
    words = quick(songs, tmp_path, steps=100_000, workers=1)
    process = start_training(words, subprocess.DEVNULL)
    try:
        wait_until((tmp_path / "last.pt").exists, process)
        code, _, stderr = call(train.main, *quick(songs, tmp_path, steps=1))
    finally:
        process.kill()
        process.wait()

    assert code == 2
    assert "another run is at work there" in stderr
    train_well(*quick(songs, tmp_path, steps=1))

@pytest.mark.parametrize("error, refused", [
    (BlockingIOError(11, "held"), True), (PermissionError(13, "held, on Windows"), True),
    (OSError(37, "no locks available"), False)])
def test_a_disk_without_locks_will_do(error, refused, tmp_path, monkeypatch):
    def lock(file):
        raise error

    monkeypatch.setattr(train, "lock", lock)

    expectation = pytest.raises(mss.UserError) if refused else contextlib.nullcontext()
    with expectation, train.alone_in(tmp_path):
        (tmp_path / "last.pt").touch()
    assert (tmp_path / "last.pt").exists() != refused

def test_a_system_without_locks_will_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", None)

    with train.alone_in(tmp_path):
        pass

def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(songs, tmp_path):
    (tmp_path / "file").touch()

    code, stdout, stderr = call(train.main, *quick(songs, tmp_path / "file" / "run"))

    assert code == 2
    assert "--out" in stderr and "a folder to write to expected" in stderr
    assert "step 1" not in stdout

def test_a_last_whose_counters_are_none_is_named(songs, eight):
    change_checkpoint(eight / "last.pt", lambda last: last.update(rows=5))

    fails(train.main, *flags(songs, eight), saying=("last.pt", "rows: list expected"))

def test_a_last_that_no_run_has_saved_is_named(songs, eight):
    def forget(last):
        del last["optimizer"]

    change_checkpoint(eight / "last.pt", forget)

    fails(train.main, *flags(songs, eight), saying=("last.pt", "another checkpoint", "optimizer"))

@pytest.mark.parametrize("words, expected", (
    (["5000"], (5000, math.inf)),
    (["600s"], (math.inf, 600)),
    (["5000", "600s"], (5000, 600)),
    (["1.5s", "7", "900s"], (7, 1.5))))
def test_saves_are_steps_or_seconds_apart(words, expected):
    assert parsed("--save-every", *words).save_every == expected

def test_a_run_saves_whenever_the_seconds_are_over(songs, tmp_path, steady, monkeypatch):
    saved = set()
    monkeypatch.setattr(mss, "save_checkpoint", lambda *words, **state: saved.add(state["step"]))

    train_well(*quick(songs, tmp_path, save_every="2.5s", validate_every=99))

    assert saved == {3, 6, 8}

def test_a_chart_has_its_highest_value_at_the_top():
    chart = train.svg([{"loss": [(5, 1.0), (15, 3.0), (25, 2.0)]}], width=100, height=50)

    assert 'points="10.0,80.0 60.0,30.0 110.0,55.0"' in chart

# ---- Training: a full disk ----------------------------------------------------------------------

@pytest.fixture
def full_disk(monkeypatch):
    """A set of (name of a file, step) for which there is no space."""
    full = set()
    real = mss.save_checkpoint

    def save(path, *words, **state):
        if (path.name, state["step"]) in full:
            raise mss.UserError(f"{path}: No space left on device")
        real(path, *words, **state)

    monkeypatch.setattr(mss, "save_checkpoint", save)
    return full

def test_a_disk_full_at_the_first_save_ends_a_run(songs, tmp_path, full_disk):
    full_disk.add(("last.pt", 3))

    fails(train.main, *quick(songs, tmp_path), saying=("No space left",))
    assert column(tmp_path, "valid_sdr_vocals") == []

def test_a_disk_full_for_a_while_is_survived(songs, trained, tmp_path, full_disk):
    full_disk.update([("last.pt", 6), ("best.pt", 6)])

    code, _, stderr = call(train.main, *flags(songs, tmp_path))

    assert code == 0
    assert "going on" in stderr
    assert equal(weights(tmp_path / "last.pt"), weights(trained / "last.pt"))

def test_a_disk_full_at_the_end_is_an_error(songs, eight, full_disk):
    before = (eight / "last.pt").read_bytes()
    full_disk.add(("last.pt", 9))

    fails(train.main, *flags(songs, eight, steps=9), saying=("No space left",))
    assert (eight / "last.pt").read_bytes() == before

def test_a_best_that_was_not_saved_is_none(songs, tmp_path, full_disk, monkeypatch):
    """A later validation, as good, is saved."""
    monkeypatch.setattr(evaluate, "aggregate", lambda *words: 1.0)
    full_disk.update([("best.pt", 3), ("best.pt", 6)])

    train_well(*quick(songs, tmp_path))

    assert content(tmp_path / "best.pt")["step"] == 8

def test_a_best_that_was_not_saved_at_the_end_is_made_up_for(
        songs, eight, full_disk, monkeypatch):
    monkeypatch.setattr(evaluate, "aggregate", lambda *words: 99.0)   # the best so far
    full_disk.add(("best.pt", 9))
    fails(train.main, *flags(songs, eight, steps=9), saying=("best.pt", "No space left"))

    full_disk.clear()
    train_well(*flags(songs, eight, steps=9))

    assert content(eight / "best.pt")["step"] == 9

# ---- Training: the demo -------------------------------------------------------------------------

@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """What a run without --musdb, on fewer and shorter songs, prints; and where it ran."""
    folder = tmp_path_factory.mktemp("demo")
    fewer = (("train", 1), ("valid", 1), ("test", 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "synthetic_musdb", functools.partial(
            train.synthetic_musdb, songs=fewer, seconds=2))
        stdout = train_well(*quick(None, "my runs/demo", steps=1))
    return types.SimpleNamespace(folder=folder, stdout=stdout)

def follow(demo, script, main, monkeypatch):
    """Run the one printed command of that script, as printed, where the demo ran -> stdout."""
    line, = re.findall(rf"(?m)^ .*{script} .*$", demo.stdout)
    python, path, *words = shlex.split(line)
    assert Path(python).samefile(sys.executable)
    assert Path(path).samefile(HERE / script)
    monkeypatch.chdir(demo.folder)
    code, stdout, stderr = call(main, *words)
    assert code == 0, stderr
    return stdout

def test_without_songs_a_small_network_learns_for_a_short_time():
    args = train.parse([])

    assert args.model == "UNetDecouple+"
    assert args.width <= 8
    assert args.steps <= 300
    assert args.lr == train.DEMO["lr"]

def test_the_demo_ends_with_a_command_to_hear_it(demo, monkeypatch):
    follow(demo, "separate.py", separate.main, monkeypatch)

    vocals, accompaniment = stems(demo.folder / "separated" / "mixture")
    assert vocals.shape == accompaniment.shape == (2, 2 * RATE)

def test_the_demo_ends_with_a_command_to_see_it(demo, monkeypatch):
    stdout = follow(demo, "evaluate.py", evaluate.main, monkeypatch)

    assert "vocals" in stdout
    assert (demo.folder / "my runs" / "demo" / "report" / "index.html").exists()

def test_a_run_on_other_songs_ends_without_commands(songs, eight):
    stdout = train_well(*flags(songs, eight))

    assert "done at step 8" in stdout
    assert "python" not in stdout

# ---- Training: songs that break -----------------------------------------------------------------

def break_file(path):
    """Leave its header, so that only reading finds out."""
    os.truncate(path, 9000)

@pytest.fixture(scope="session")
def broken(songs, tmp_path_factory):
    """A run with a broken song among three to train on, and another of two to validate with."""
    root = shutil.copytree(songs, tmp_path_factory.mktemp("broken") / "root")
    shutil.copytree(root / "valid" / "Synthetic - Song 3", root / "valid" / "Synthetic - Song 5")
    break_file(root / "train" / "Synthetic - Song 0" / "vocals.flac")
    break_file(root / "valid" / "Synthetic - Song 3" / "bass.flac")

    out = root.parent / "run"
    code, _, stderr = call(train.main, *quick(root, out, steps=10))
    return types.SimpleNamespace(root=root, out=out, code=code, stderr=stderr)

def test_a_broken_song_is_survived(broken):
    assert broken.code == 0, broken.stderr

def test_a_broken_song_is_named_once(broken):
    assert broken.stderr.count("vocals.flac") == 1

def test_draws_of_a_broken_song_are_counted(broken):
    assert column(broken.out, "unreadable")[-1] > 3

def test_a_broken_song_is_not_validated_but_the_others_are(broken):
    assert "not validated: Synthetic - Song 3" in broken.stderr
    assert math.isfinite(column(broken.out, "valid_sdr_vocals")[-1])

def test_a_run_without_songs_that_can_be_read_ends_in_one_line(broken, tmp_path):
    """As a process: what the loader's workers write is seen, too."""
    root = shutil.copytree(broken.root, tmp_path / "root")
    for stem in root.glob("train/*/vocals.flac"):
        break_file(stem)

    with open(tmp_path / "output", "w") as output:
        process = start_training(quick(root, tmp_path / "run", steps=500, workers=2), output)
        code = process.wait(timeout=PATIENCE)

    text = (tmp_path / "output").read_text()
    assert code == 2
    assert "train.py: error" in text
    assert "Traceback" not in text

# ---- Training: the loader -----------------------------------------------------------------------

@pytest.fixture
def watchful(monkeypatch):
    """torch looks after the loader's workers 50 times as often as every 5 s; all end here."""
    loader = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(loader._try_get_data, "__defaults__", (0.1,))
    yield
    train.end_workers()

@pytest.mark.parametrize("at", (0, 2, 5))
def test_a_dead_worker_is_replaced(songs, tmp_path, capfd, watchful, at):
    args = train.parse(quick(songs, tmp_path, workers=2, steps=12))
    segments = mss.Segments(mss.musdb_tracks(songs, "train"), mss.Config(), args.segment)

    mixtures = []
    for mixture, _ in train.loader(segments, args, 0):
        mixtures.append(mixture)
        if len(mixtures) == at + 1:
            multiprocessing.active_children()[at % 2].kill()

    assert "starting the loader anew" in capfd.readouterr().err
    assert len(mixtures) == 12
    for step, mixture in enumerate(mixtures):
        expected = torch.stack([segments[2 * step][0], segments[2 * step + 1][0]])
        assert torch.equal(mixture, expected)

def test_the_parts_of_a_step_have_examples_of_their_own(songs, tmp_path):
    args = train.parse(quick(songs, tmp_path, steps=3, batch_size=4, accumulate=2))
    segments = mss.Segments(mss.musdb_tracks(songs, "train"), mss.Config(), args.segment)

    parts = [mixture for mixture, _ in train.loader(segments, args, 1)]

    expected = [segments[i][0] for i in range(4, 12)]                 # of steps 2 and 3
    assert torch.equal(torch.cat(parts), torch.stack(expected))
    assert len(parts) == 4

@pytest.mark.parametrize("source", ["vocals", "vocals,accompaniment", "vocals,bass"])
def test_an_echo_mixes_the_sources_of_a_batch_anew(songs, tmp_path, source):
    args = train.parse(quick(songs, tmp_path, source=source, steps=6, batch_size=4, echo=3))
    config = mss.Config(targets=args.source)
    segments = mss.Segments(mss.musdb_tracks(songs, "train"), config, args.segment)

    batches = list(train.remixed(train.loader(segments, args, 0), args, 0))

    assert len(batches) == 6
    for part in (0, 3):                                               # as they are read
        mixture, targets = zip(*(segments[i] for i in range(part // 3 * 4, part // 3 * 4 + 4)))
        assert torch.equal(batches[part][0], torch.stack(mixture))
        assert torch.equal(batches[part][1], torch.stack(targets))
    for part in (1, 2, 4, 5):
        mixture, targets = batches[part]
        read_mixture, read_targets = batches[part - part % 3]
        assert not torch.allclose(mixture, read_mixture)
        for ours, theirs in zip(targets.unbind(1), read_targets.unbind(1)):
            assert_same_rows(ours, theirs)
        rest, read_rest = mixture - targets.sum(1), read_mixture - read_targets.sum(1)
        if source == "vocals,accompaniment":
            assert rest.abs().max() < 1e-5
        else:
            assert_same_rows(rest, read_rest)

def assert_same_rows(ours, theirs):
    """Each row of one (B, ...) is a row of the other, up to rounding, and none is there twice."""
    distances = torch.cdist(ours.flatten(1), theirs.flatten(1))
    assert (distances < 1e-3).sum(0).tolist() == [1] * len(ours)
    assert (distances < 1e-3).sum(1).tolist() == [1] * len(ours)

def test_a_resumed_run_goes_on_within_an_echo(songs, tmp_path):
    args = train.parse(quick(songs, tmp_path, steps=5, batch_size=4, echo=3))
    segments = mss.Segments(mss.musdb_tracks(songs, "train"), mss.Config(), args.segment)
    whole = list(train.remixed(train.loader(segments, args, 0), args, 0))

    rest = list(train.remixed(train.loader(segments, args, 2), args, 2))

    assert len(rest) == len(whole) - 2
    for (mixture, targets), (expected, expected_targets) in zip(rest, whole[2:]):
        assert torch.equal(mixture, expected)
        assert torch.equal(targets, expected_targets)

def test_workers_may_die_at_two_places(songs, tmp_path, watchful):
    args = train.parse(quick(songs, tmp_path, workers=1, steps=8))
    segments = mss.Segments(mss.musdb_tracks(songs, "train"), mss.Config(), args.segment)

    count = 0
    for _ in train.loader(segments, args, 0):
        count += 1
        if count in (1, 5):
            multiprocessing.active_children()[0].kill()

    assert count == 8

class Deadly(torch.utils.data.Dataset):
    """Ends the process that reads it, as the kernel does where memory is short."""

    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGKILL)

def test_workers_that_die_again_and_again_end_a_run(songs, tmp_path, watchful, monkeypatch):
    args = train.parse(quick(songs, tmp_path, workers=1))
    real = torch.utils.data.DataLoader
    starts = []

    def counted(*words, **options):
        starts.append(1)
        assert len(starts) < 4, "the loader is started anew without end"
        return real(*words, **options)

    monkeypatch.setattr(torch.utils.data, "DataLoader", counted)

    with pytest.raises(mss.UserError, match="the loader's workers die: fewer --workers"):
        next(train.loader(Deadly(), args, 0))

# ---- Training: blocks computed again ------------------------------------------------------------

def three_steps(name, *words):
    """Of two parts each -> losses, norms, weights, and how often the last block ran."""
    _, model = small(name)
    args = parsed("--model", name, "--batch-size", "2", "--accumulate", "2", *words)
    block = [module for module in model.modules() if isinstance(module, train.BLOCKS)][-1]
    leaf = next(module for module in block.modules() if not list(module.children()))
    calls = []
    leaf.register_forward_hook(lambda *_: calls.append(1))

    batches = [(noise(1, 2, 3000, seed=i), noise(1, 1, 2, 3000, seed=9 + i)) for i in range(6)]
    batches = iter(batches)
    network = train.network_of(model, args)
    optimizer = train.optimizer_of(model, args)
    figures = []
    for _ in range(3):
        loss, norm, _ = train.train_step(network, optimizer, batches, args)
        figures.append((loss.item(), norm.item()))
    return figures, model.state_dict(), len(calls)

@pytest.mark.parametrize("name", ("UNet", "ResUNetDecouple+", "Wave-U-Net", "DPRNN", "PM-Unet"))
def test_blocks_computed_again_change_nothing(name):
    figures, state, calls = three_steps(name)
    figures_again, state_again, calls_again = three_steps(name, "--checkpoint-blocks")

    assert (calls, calls_again) == (6, 12)
    assert figures == figures_again
    assert equal(state, state_again)

def test_a_run_in_bf16_with_blocks_computed_again(songs, tmp_path):
    train_well(*quick(songs, tmp_path, steps=1), "--bf16", "--checkpoint-blocks")

    assert content(tmp_path / "last.pt")["step"] == 1
    assert math.isfinite(column(tmp_path, "valid_sdr_vocals")[0])

# ---- Training: several processes ----------------------------------------------------------------

PARALLEL = ("ResUNetDecouple+", "Wave-U-Net", "PM-Unet")

def learn_twice(songs, path, device, name, dtype, *words):
    """Two steps of all processes: losses, and the last gradient and statistics -> a file."""
    words = [*quick(songs, "-", batch_size=4, accumulate=2, model=name, device=device), *words]
    args = train.parse(words)
    config = train.config_of(args)
    segments = mss.Segments(mss.musdb_tracks(songs, "train"), config, args.segment)
    batches = ((mixture.to(dtype), targets.to(dtype))
               for mixture, targets in train.loader(segments, args, 0))
    torch.manual_seed(0)
    model = mss.MODELS[name](config).to(device, dtype).train()
    network = train.network_of(model, args)
    optimizer = train.optimizer_of(model, args)

    losses = []
    for _ in range(2):
        losses.append(train.train_step(network, optimizer, batches, args)[0])

    found = {name: value for name, value in model.named_buffers() if value.is_floating_point()}
    found["losses"] = torch.tensor(losses, dtype=torch.float64)
    found["gradient"] = torch.cat([value.grad.flatten() for value in model.parameters()])
    if train.RANK == 0:
        torch.save(found, path)

def learn_in_all_ways(songs, folder, device):
    """What each of torchrun's processes does in the fixture below, and one in the tests."""
    if train.WORLD > 1:
        train.dist.init_process_group("gloo")                         # NCCL: no two on a GPU
    for name in PARALLEL:
        learn_twice(songs, Path(folder, name), device, name, torch.float64)
    learn_twice(songs, Path(folder, "bf16"), device, "UNetDecouple+", torch.float32,
                "--bf16", "--checkpoint-blocks")

@pytest.fixture(scope="session", params=("cpu", "cuda"))
def learned(request, songs, tmp_path_factory):
    """A function: a name above -> what one process learned, and what two did, on one GPU if any."""
    device = present(request.param)
    folder = tmp_path_factory.mktemp("learned")
    one, two = folder / "one", folder / "two"
    one.mkdir()
    two.mkdir()
    tests = Path(__file__)
    script = folder / "script.py"
    script.write_text(
        f"import os, sys\n"
        f"sys.path.insert(0, {str(tests.parent)!r})\n"
        f"import train\n"
        f"launched = dict(os.environ)\n"
        f"import {tests.stem}\n"
        f"os.environ.update(launched)\n"
        f"{tests.stem}.learn_in_all_ways({str(songs)!r}, {str(two)!r}, {device!r})\n",
        encoding="utf-8")

    learn_in_all_ways(songs, one, device)
    done = torchrun(script)
    assert done.returncode == 0, done.stderr
    return lambda name: (content(one / name), content(two / name))

@pytest.mark.parametrize("name", PARALLEL)
def test_two_processes_learn_what_one_does(learned, name):
    """In float64: float32's rounding alone changes a gradient of an L1 norm and angles by 1e-3."""
    one, two = learned(name)

    assert list(one) == list(two)
    for key, value in one.items():
        assert (value - two[key]).norm() < 1e-8 * value.norm(), key

def test_two_processes_learn_what_one_does_in_bf16_with_blocks_computed_again(learned):
    """Before they have learned: what follows from bfloat16's rounding differs by percents."""
    one, two = learned("bf16")

    assert two["losses"][0].item() == pytest.approx(one["losses"][0].item(), rel=1e-2)
    assert torch.isfinite(two["losses"]).all()

@pytest.fixture(scope="session")
def begun_by_two(songs, tmp_path_factory):
    """4 steps of two processes, each of which has a song to validate with."""
    folder = tmp_path_factory.mktemp("begun")
    root = shutil.copytree(songs, folder / "root")
    another = "Synthetic - Song 4"
    shutil.copytree(songs / "test" / another, root / "valid" / another)
    done = torchrun(HERE / "train.py", *flags(root, folder / "run", steps=4, ema=0.5))
    assert done.returncode == 0, done.stderr
    return types.SimpleNamespace(root=root, out=folder / "run", stdout=done.stdout)

def test_one_of_two_processes_tells(begun_by_two):
    assert begun_by_two.stdout.count("done at step 4") == 1

def test_two_processes_save_what_they_did(begun_by_two):
    last = content(begun_by_two.out / "last.pt")

    assert last["step"] == last["validated"] == 4

def test_two_processes_share_the_validation_out(begun_by_two):
    _, average, _ = mss.load_checkpoint(begun_by_two.out / "last.pt")
    tracks = mss.musdb_tracks(begun_by_two.root, "valid")

    scores = train.validate(average, tracks, False, [])

    logged = column(begun_by_two.out, "valid_sdr_vocals")[-1]
    assert len(tracks) == 2
    assert scores["valid_sdr_vocals"] == pytest.approx(logged, abs=1e-3)

def test_one_process_goes_on_with_what_two_began(begun_by_two, trained, tmp_path):
    """And learns from the same examples as if there had always been one."""
    out = shutil.copytree(begun_by_two.out, tmp_path / "run")

    stdout = train_well(*flags(begun_by_two.root, out, ema=0.5))

    ratios = np.array(column(out, "loss")) / column(trained, "loss")
    assert "at step 4" in stdout
    assert ratios[0] == pytest.approx(1, abs=1e-3)
    assert ratios == pytest.approx(1, abs=0.05)

# ---- Training: signals --------------------------------------------------------------------------

@pytest.mark.parametrize("number", train.SIGNALS, ids=lambda number: number.name)
def test_signals_of_terminals_and_schedulers_are_caught(number, clock):
    before = signal.signal(number, signal.SIG_DFL)                    # may be ignored here
    caught = train.catch_signals()

    signal.raise_signal(number)

    assert [found for found, _ in caught] == [number]
    signal.signal(number, before)

@pytest.fixture(scope="session", ids=lambda number: number.name,
                params=(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
def stopped(request, songs, tmp_path_factory):
    """A run that a signal stopped.

    To the whole process group, as a terminal or a scheduler sends them: the loader's workers get
    them, too.
    """
    folder = tmp_path_factory.mktemp("stopped")
    out, printed = folder / "run", folder / "printed"
    never = 100_000
    words = quick(songs, out, steps=never, save_every=never, validate_every=never, workers=2)
    with open(printed, "w") as output:
        process = start_training(words, output)
    try:
        wait_until(lambda: "step 2/" in printed.read_text(), process)
        os.killpg(process.pid, request.param)
        code = process.wait(timeout=PATIENCE)
    finally:
        process.kill()
    return types.SimpleNamespace(
        number=request.param, code=code, printed=printed.read_text(), out=out)

def test_a_signal_stops_a_run_without_noise(stopped):
    assert stopped.code == 128 + stopped.number
    assert "Traceback" not in stopped.printed

def test_a_stopped_run_goes_on_as_if_it_had_not_been(songs, stopped, tmp_path):
    step = content(stopped.out / "last.pt")["step"]
    resumed = shutil.copytree(stopped.out, tmp_path / "resumed")
    straight = tmp_path / "straight"

    for out in (resumed, straight):
        train_well(*quick(songs, out, steps=step + 2))

    assert step >= 2
    assert equal(weights(resumed / "last.pt"), weights(straight / "last.pt"))

@pytest.fixture
def clock(monkeypatch):
    """A list whose one item is the time, while signals are caught."""
    handlers = {number: signal.signal(number, signal.default_int_handler)     # not ignored
                for number in train.SIGNALS}
    now = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    yield now
    for number, handler in handlers.items():
        signal.signal(number, handler)

def test_a_second_signal_ends_a_run_at_once(clock):
    train.catch_signals()
    signal.raise_signal(signal.SIGINT)
    clock[0] = 3.0

    with pytest.raises(SystemExit) as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.value.code == 130

def test_a_signal_that_is_ignored_stops_no_run(clock):
    """As SIGHUP under nohup; SIGTERM stands for it here."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    caught = train.catch_signals()
    signal.raise_signal(signal.SIGTERM)

    assert caught == []

def test_a_second_signal_within_two_seconds_is_the_first_ones(clock):
    caught = train.catch_signals()
    signal.raise_signal(signal.SIGINT)
    clock[0] = 1.0

    signal.raise_signal(signal.SIGTERM)

    assert [number for number, _ in caught] == [signal.SIGINT, signal.SIGTERM]

# ---- Training: several targets, and weights to begin with ---------------------------------------

@pytest.fixture(scope="session")
def four(songs, tmp_path_factory):
    """OUT of a run that learned four targets."""
    out = tmp_path_factory.mktemp("runs") / "four"
    train_well(*quick(songs, out, source="vocals,drums,bass,other", ema=0.5, steps=4))
    return out

def unless_told(songs, out, **changes):
    """As quick, without what --init may decide on."""
    return quick(songs, out, model=None, width=None, window=None, hop=None, **changes)

def test_one_network_learns_several_targets(four):
    config, _, state = mss.load_checkpoint(four / "best.pt")

    assert config.targets == ("vocals", "drums", "bass", "other")
    for target in config.targets:
        assert math.isfinite(state[f"valid_sdr_{target}"])

def test_the_best_of_several_targets_is_that_of_their_mean(four):
    best = content(four / "best.pt")

    mean = np.mean([best[f"valid_sdr_{target}"] for target in best["config"]["targets"]])
    assert content(four / "last.pt")["best"] == pytest.approx(mean, abs=1e-9)

def test_the_curve_has_a_line_for_each_target(four):
    assert drawn_lines(four) == [2, 2, 2, 2, 2]

def test_a_run_begins_with_the_weights_given(songs, four, tmp_path):
    config, model, _ = mss.load_checkpoint(four / "best.pt")

    train_well(*unless_told(songs, tmp_path, init=four / "best.pt", steps=1, seed=1))

    tuned_config, tuned, _ = mss.load_checkpoint(tmp_path / "last.pt")
    assert tuned_config == config
    for ours, theirs in zip(tuned.parameters(), model.parameters()):
        assert (ours - theirs).abs().max() < 1e-5

def test_weights_to_begin_with_are_read_once(songs, four, tmp_path, monkeypatch):
    read = []
    load = mss.load_checkpoint
    monkeypatch.setattr(mss, "load_checkpoint", lambda path, *rest: (
        read.append(path) or load(path, *rest)))

    code, _, _ = call(train.main, *flags(songs, tmp_path / "out", init=four / "best.pt", steps=1,
                                         model=None, width=None))

    assert code == 0
    assert read == [four / "best.pt"]

def test_weights_to_begin_with_bring_their_rate_and_channels(tmp_path):
    config, model = small(window=512, sample_rate=48000, channels=1)
    mss.save_checkpoint(tmp_path / "init.pt", config, model)

    assert train.config_of(parsed("--init", str(tmp_path / "init.pt"))) == config

def test_weights_for_other_numbers_of_targets_are_refused(songs, four, tmp_path):
    fails(train.main, *unless_told(songs, tmp_path, init=four / "best.pt", source="vocals"),
          saying=("--init", "number"))

def test_weights_of_another_size_are_refused(songs, four, tmp_path):
    fails(train.main, *quick(songs, tmp_path, init=four / "best.pt", source=None, width=4),
          saying=("--init", "same model, sizes"))

def test_weights_to_begin_with_have_a_name_of_their_own(songs, tmp_path):
    fails(train.main, *quick(songs, tmp_path, init="default"), saying=("--init", "bundled"))

def test_weights_for_another_residual_are_refused(songs, tmp_path):
    """Of vocals and accompaniment a Wave-U-Net estimates one; of vocals and bass both."""
    config, model = small("Wave-U-Net", targets=("vocals", "accompaniment"), window=512)
    init = tmp_path / "init.pt"
    mss.save_checkpoint(init, config, model)

    fails(train.main, *unless_told(songs, tmp_path, init=init, source="vocals,bass"),
          saying=("--init", "not for --source vocals,bass"))

# ---- Training: what is refused ------------------------------------------------------------------

@pytest.mark.parametrize("changes, words", (
    pytest.param(dict(width=4), ("--width 2", "this command: 4"), id="width"),
    pytest.param(dict(lr=0.5), ("--lr 0.001", "this command: 0.5"), id="learning rate"),
    pytest.param(dict(ema=0.5), ("--ema 0.0", "this command: 0.5"), id="average"),
    pytest.param(dict(batch_size=4), ("--batch-size 2", "this command: 4"), id="batch size"),
    pytest.param(dict(seed=4), ("--seed 0", "this command: 4"), id="seed")))
def test_a_run_of_other_settings_is_left_alone(songs, trained, changes, words):
    before = (trained / "last.pt").read_bytes()

    fails(train.main, *flags(songs, trained, **changes), saying=words)
    assert (trained / "last.pt").read_bytes() == before

def test_a_run_in_another_precision_is_left_alone(songs, trained):
    fails(train.main, *flags(songs, trained), "--bf16",
          saying=("--bf16 False", "this command: True"))

def test_a_run_on_other_songs_is_left_alone(begun_by_two, trained):
    before = (trained / "last.pt").read_bytes()

    fails(train.main, *flags(begun_by_two.root, trained), saying=("4 songs (here 5",))
    assert (trained / "last.pt").read_bytes() == before

def test_a_run_on_songs_of_ones_own_is_not_gone_on_with_on_the_built_in_ones(trained):
    fails(train.main, *flags(None, trained), saying=("songs of your own", "--musdb"))

@pytest.mark.parametrize("changes, words", (
    pytest.param(dict(model="ResUnet"), ("ResUnet", "ResUNetDecouple+"), id="unknown model"),
    pytest.param(dict(hop=683), ("--hop 683",), id="hop of over a third of a window"),
    pytest.param(dict(device="cuda:99"), ("cuda:99",), id="absent device"),
    pytest.param(dict(steps=0), ("--steps 0",), id="no steps"),
    pytest.param(dict(step=3), ("--step",), id="abbreviated flag"),
    pytest.param(dict(lr="nan"), ("nan",), id="learning rate of nan"),
    pytest.param(dict(workers=-1), ("--workers",), id="negative number of workers"),
    pytest.param(dict(source="vocal"), ("vocal", "accompaniment"), id="unknown source"),
    pytest.param(dict(source="vocals,vocals"), ("--source", "vocals,vocals"), id="source twice"),
    pytest.param(dict(accumulate=3), ("--batch-size", "multiples of 3"), id="uneven parts"),
    pytest.param(dict(window=1000, hop=100), ("--window 1000", "multiple of 512"), id="window"),
    pytest.param(dict(segment=0.05), ("--segment 0.05", "0.1"), id="segment of a few frames"),
    pytest.param(dict(ema=1), ("--ema 1", "below 1"), id="average that never moves"),
    pytest.param(dict(save_every=0), ("--save-every",), id="saves all the time"),
    pytest.param(dict(clip=-1), ("--clip",), id="negative norm"),
    pytest.param(dict(seed=-1), ("--seed",), id="negative seed"),
    pytest.param(dict(musdb="x"), ("x: ", "no folder"), id="absent songs")))
def test_train_refuses(songs, tmp_path, changes, words):
    fails(train.main, *flags(songs, tmp_path / "run", **changes), saying=words)
    assert not (tmp_path / "run").exists()

# ---- Training: relatives by name, through all three scripts -------------------------------------

@pytest.fixture(scope="session")
def relative(songs, tmp_path_factory):
    """A function: a relative's name -> best.pt of two steps, with the sizes of its recipe."""
    @functools.cache
    def path(name):
        out = tmp_path_factory.mktemp("relative") / "run"
        stdout = train_well(*flags(songs, out, model=name, steps=2, segment=0.1))
        assert "done at step 2" in stdout
        return out / "best.pt"

    return path

def separated_by(checkpoint, song, folder):
    """{target: (C, L)} that separate.py writes."""
    code, _, stderr = call(separate.main, song, "-m", checkpoint, "-o", folder)
    assert code == 0, stderr
    return {path.stem: mss.read_audio(path)[0] for path in folder.glob("*/*.wav")}

@pytest.mark.parametrize("name", RELATIVES)
def test_a_relative_is_trained_for_its_recipes_targets(name, relative):
    config, _, _ = mss.load_checkpoint(relative(name))

    assert config.model == name
    assert config.targets == parsed("--model", name).source

@pytest.mark.parametrize("name, window, hop", (
    ("Wave-U-Net", 2048, 441), ("Wave-U-Net-12", 2048, 441), ("DPRNN", 2048, 441),
    ("PM-Unet", 4096, 1024), ("PM-Unet-conv", 4096, 1024), ("Open-Unmix", 4096, 1024)))
def test_a_relative_has_spectrograms_of_its_own(name, window, hop, relative):
    config, _, _ = mss.load_checkpoint(relative(name))

    assert (config.window, config.hop) == (window, hop)

@pytest.mark.parametrize("name", RELATIVES)
def test_a_relative_separates_a_song(name, relative, songs, tmp_path):
    track, = mss.musdb_tracks(songs, "test")

    found = separated_by(relative(name), track.files["mixture"], tmp_path)

    assert set(found) == set(parsed("--model", name).source)
    for audio in found.values():
        assert audio.shape == (2, track.frames)

def test_a_network_on_bands_learns_resumes_and_separates(songs, tmp_path):
    track, = mss.musdb_tracks(songs, "test")
    words = dict(model="MobileNet-subband", lr=0.02, warmup=1, validate_every=99, log_every=1)
    out = tmp_path / "run"

    train_well(*quick(songs, out, steps=2, **words))
    resumed = train_well(*quick(songs, out, steps=8, **words))
    found = separated_by(out / "best.pt", track.files["mixture"], tmp_path / "stems")

    assert "at step 2" in resumed
    losses = column(out, "loss")
    assert len(losses) == 8 and np.mean(losses[-3:]) < np.mean(losses[:3])
    assert set(found) == set(PAIR)
    for audio in found.values():
        assert audio.shape == (2, track.frames)

@pytest.mark.parametrize("name", ("Wave-U-Net", "Wave-U-Net-12", "DPRNN"))
def test_a_relatives_stems_sum_to_the_mixture(name, relative, songs, tmp_path):
    track, = mss.musdb_tracks(songs, "test")

    found = separated_by(relative(name), track.files["mixture"], tmp_path)

    assert (sum(found.values()) - track.load("mixture")).abs().max() < 1e-5

@pytest.mark.parametrize("name", ("Wave-U-Net", "Wave-U-Net-12", "DPRNN"))
def test_a_relatives_stems_sum_to_the_mixture_at_another_rate(name, relative, tmp_path):
    mixture = noise(2, 30_000)
    mss.write_audio(tmp_path / "48.wav", mixture, 48_000)

    found = separated_by(relative(name), tmp_path / "48.wav", tmp_path / "stems")

    assert (sum(found.values()) - mixture).abs().max() < 1e-6

@pytest.mark.parametrize("name", RELATIVES)
def test_a_relative_takes_another_rate(name, relative, tmp_path):
    mss.write_audio(tmp_path / "48.wav", noise(2, 30_000), 48_000)

    found = separated_by(relative(name), tmp_path / "48.wav", tmp_path / "stems")

    assert set(found) == set(parsed("--model", name).source)
    for audio in found.values():
        assert audio.shape == (2, 30_000)

@pytest.mark.parametrize("name", RELATIVES)
def test_a_relative_is_evaluated(name, relative, songs, tmp_path):
    code, stdout, stderr = call(
        evaluate.main, "-m", relative(name), "--musdb", songs, "--results", tmp_path)

    assert code == 0, stderr
    for target in parsed("--model", name).source:
        assert target in stdout

# ---- separate.py: one song ----------------------------------------------------------------------

def separate_song(checkpoint, song, *words):
    """Run separate.py, which must go well and quietly -> (the stems' folder, what it printed)."""
    out = song.parent / "out"
    code, stdout, err = call(
        separate.main, song, "-m", checkpoint, "-o", out, "-d", "cpu", *words)
    assert (code, err) == (0, "")
    return out / song.stem, stdout

def check_stems(folder, song):
    """Float stems of the song's format and length, which sum to it -> the vocals."""
    mixture, rate = mss.read_audio(song)
    for name in ("vocals.wav", "accompaniment.wav"):
        info = soundfile.info(folder / name)
        assert (info.subtype, info.samplerate) == ("FLOAT", rate)
    vocals, accompaniment = stems(folder)
    assert vocals.shape == accompaniment.shape == mixture.shape
    assert torch.allclose(vocals + accompaniment, mixture, rtol=0, atol=1e-6)
    return vocals

@pytest.mark.parametrize("name, rate, channels, length", [
    ("a song (1) ü.wav", RATE, 2, 50_001),
    ("fast.wav", 48000, 2, 50_001),
    ("mono.flac", 22050, 1, 30_000),
], ids=["44.1 kHz", "48 kHz", "mono"])
def test_stems_sum_to_the_song(name, rate, channels, length, checkpoint, tmp_path):
    mss.write_audio(tmp_path / name, noise(channels, length), rate)

    folder, _ = separate_song(checkpoint, tmp_path / name)

    vocals = check_stems(folder, tmp_path / name)
    assert vocals.abs().max() > 0

@pytest.mark.parametrize("length", [0, 1])
def test_a_song_of_hardly_any_samples(length, checkpoint, tmp_path):
    mss.write_audio(tmp_path / "short.wav", noise(2, length), RATE)

    folder, stdout = separate_song(checkpoint, tmp_path / "short.wav")

    check_stems(folder, tmp_path / "short.wav")
    assert "real-time factor" in stdout

def test_files_device_and_speed_are_printed(checkpoint, tmp_path):
    mss.write_audio(tmp_path / "song.wav", noise(2, 1000), RATE)

    folder, stdout = separate_song(checkpoint, tmp_path / "song.wav")

    paths = [str(folder / "vocals.wav"), str(folder / "accompaniment.wav")]
    assert stdout.splitlines()[:2] == paths
    assert "on cpu" in stdout and "real-time factor" in stdout

def test_blocks_of_a_file_equal_the_whole_in_memory(checkpoint, tmp_path):
    _, model, _ = mss.load_checkpoint(checkpoint)
    mixture = noise(2, 14 * RATE)                                     # three blocks, three windows
    mss.write_audio(tmp_path / "song.wav", mixture, RATE)

    separate.separate_file(model, tmp_path / "song.wav", tmp_path)

    vocals, _ = mss.read_audio(tmp_path / "vocals.wav")
    assert torch.equal(vocals, mss.separate_track(model, mixture)[0])

def test_the_options_reach_the_network(tmp_path):
    class Witness(Identity):
        def forward(self, x):
            seen.append((tuple(x.shape), torch.is_autocast_enabled("cpu")))
            return super().forward(x)

    seen = []
    mss.write_audio(tmp_path / "song.wav", noise(2, 8100), RATE)
    options = separate.Options(segment=1000, overlap=100, batch_size=4, bf16=True)

    separate.separate_file(Witness(), tmp_path / "song.wav", tmp_path, options)

    shapes = [shape for shape, _ in seen]
    assert shapes == [(4, 2, 1000), (4, 2, 1000), (1, 2, 900)]
    assert all(bf16 for _, bf16 in seen)

def test_progress_goes_from_nothing_to_everything(checkpoint, tmp_path):
    _, model, _ = mss.load_checkpoint(checkpoint)
    mss.write_audio(tmp_path / "song.wav", noise(2, 14 * RATE), RATE)
    shares = []

    separate.separate_file(model, tmp_path / "song.wav", tmp_path, progress=shares.append)

    assert shares == sorted(shares)
    assert len(shares) > 2
    assert 0 < shares[0] < 1
    assert shares[-1] == 1

def test_progress_tells_the_time_that_is_left(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(time, "time", lambda: 100.0)
    progress = separate.Progress("song.wav")
    monkeypatch.setattr(time, "time", lambda: 110.0)

    progress(0.25)

    assert "song.wav:  25%, 30 s left" in terminal.getvalue()

def is_refused(checkpoint, song, word):
    """The song must be named as the failure, with the word, and leave nothing behind."""
    out = song.parent / "out"
    fails(separate.main, song, "-m", checkpoint, "-o", out, saying=(song.name, word))
    assert not list(out.rglob("*"))

def test_a_file_that_is_no_audio_is_refused(checkpoint, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"junk")

    is_refused(checkpoint, tmp_path / "bad.wav", "soundfile")

def test_a_file_that_is_not_there_is_refused(checkpoint, tmp_path):
    is_refused(checkpoint, tmp_path / "bad.wav", "found no file")

def test_a_truncated_file_is_refused(checkpoint, tmp_path):
    bad = tmp_path / "bad.wav"
    mss.write_audio(bad, noise(2, RATE), RATE)
    bad.write_bytes(bad.read_bytes()[:4000])

    is_refused(checkpoint, bad, "truncated")

@pytest.mark.parametrize("name, place", [("bad.flac", 8700), ("bad.ogg", 40_000)],
                         ids=["in the first samples", "in a page"])
def test_a_damaged_file_is_refused_without_ffmpeg(name, place, checkpoint, tmp_path, monkeypatch):
    bad = tmp_path / name
    mss.write_audio(bad, noise(2, RATE), RATE)
    content = bytearray(bad.read_bytes())
    content[place:place + 500] = bytes(500)
    bad.write_bytes(content)
    monkeypatch.setenv("PATH", "")

    is_refused(checkpoint, bad, f"{name}: damaged, perhaps truncated")

def test_too_little_memory_for_a_song_fails_that_song_only(checkpoint, song, monkeypatch):
    other = song.with_name("other.wav")
    other.write_bytes(song.read_bytes())
    separate_file = separate.separate_file

    def forgetful(model, path, *rest):
        if path == song:
            raise MemoryError
        return separate_file(model, path, *rest)

    monkeypatch.setattr(separate, "separate_file", forgetful)
    code, _, err = call(
        separate.main, song, other, "-m", checkpoint, "-o", song.parent / "out")

    assert code == 1 and f"{song}: MemoryError" in err
    check_stems(song.parent / "out" / "other", other)

def test_a_rate_of_no_simple_ratio_is_named(checkpoint, tmp_path):
    mss.write_audio(tmp_path / "bad.wav", noise(2, 1000), 44_056)

    is_refused(checkpoint, tmp_path / "bad.wav", "44056 Hz: two sample rates in a simpler")

def test_a_truncated_rf64_file_is_refused(checkpoint, tmp_path):
    bad = tmp_path / "bad.wav"
    soundfile.write(bad, noise(RATE, 2).numpy(), RATE, "FLOAT", format="RF64")
    os.truncate(bad, 4000)

    is_refused(checkpoint, bad, "truncated")

def test_samples_that_are_not_numbers_are_refused(checkpoint, tmp_path):
    samples = np.full((9000, 2), np.nan, "float32")
    soundfile.write(tmp_path / "bad.wav", samples, RATE, "FLOAT")

    is_refused(checkpoint, tmp_path / "bad.wav", "NaN")

def test_six_channels_are_refused(checkpoint, tmp_path):
    mss.write_audio(tmp_path / "bad.wav", noise(6, 100), RATE)

    is_refused(checkpoint, tmp_path / "bad.wav", "found 6; to mix them down: ffmpeg")

def test_the_songs_beside_a_bad_one_are_separated(checkpoint, tmp_path):
    good = tmp_path / "good.wav"
    mss.write_audio(good, noise(2, 1000), RATE)

    code, _, err = call(
        separate.main, tmp_path / "bad.wav", good, "-m", checkpoint, "-o", tmp_path / "out")

    assert code == 1 and "bad.wav" in err
    check_stems(tmp_path / "out" / "good", good)

def test_an_empty_argument_is_refused(checkpoint, song):
    fails(separate.main, song, "", "-m", checkpoint, saying=("empty", "song.wav"))

def test_a_song_in_a_name_that_is_not_utf_8_is_separated(checkpoint, tmp_path):
    mss.write_audio(tmp_path / "song.wav", noise(2, 1000), RATE)
    song = tmp_path / os.fsdecode(b"caf\xe9.wav")
    try:
        os.rename(tmp_path / "song.wav", song)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")

    folder, stdout = separate_song(checkpoint, song)

    mixture, _ = mss.read_audio(song)
    assert torch.allclose(sum(stems(folder)), mixture, rtol=0, atol=1e-6)
    assert "caf\\udce9" in stdout

def test_control_characters_of_a_name_are_not_printed(checkpoint, tmp_path):
    song = tmp_path / "a\x1b[2J\a\rb\n\x9b\u202ec.wav"
    mss.write_audio(song, noise(2, 1000), RATE)

    _, stdout = separate_song(checkpoint, song)

    lines = stdout.split("\n")
    assert len(lines) == 4 and not lines[-1]
    assert all(line.isprintable() for line in lines)
    assert "a\\x1b[2J\\x07" in stdout

def test_stems_are_not_written_over_a_song(checkpoint, tmp_path):
    song = tmp_path / "vocals" / "vocals.wav"
    mss.write_audio(song, noise(2, 100), RATE)
    before = song.read_bytes()

    fails(separate.main, song, "-m", checkpoint, "-o", tmp_path, saying=("written over",))

    assert song.read_bytes() == before

def test_a_song_that_would_be_written_over_another_does_not_keep_the_others_back(
        checkpoint, tmp_path):
    """The stems of a.wav would be written over the second song."""
    songs = tmp_path / "a.wav", tmp_path / "a" / "vocals.wav"
    for song in songs:
        mss.write_audio(song, noise(2, 1000), RATE)

    code, _, err = call(separate.main, *songs, "-m", checkpoint, "-o", tmp_path)

    assert code == 1 and "written over" in err and "1 of 2 songs failed" in err
    check_stems(tmp_path / "vocals", songs[1])

# ---- separate.py: formats and levels ------------------------------------------------------------

@pytest.fixture
def loud(tmp_path):
    """A song with peaks above full scale, and with 18 kHz, which poor MP3s leave out."""
    t = torch.arange(RATE) / RATE
    left = 0.9 * torch.sin(2 * np.pi * 18_000 * t)
    right = noise(RATE, scale=0.27)
    path = tmp_path / "loud.wav"
    mss.write_audio(path, torch.stack([left, right]), RATE)
    return path

@pytest.mark.parametrize("flags, subtype, tolerance", [
    ([], "FLOAT", 1e-6),
    (["--int24"], "PCM_24", 2 / 2 ** 23),
    (["--int16"], "PCM_16", 2 / 2 ** 15),
], ids=["float32", "24 bits", "16 bits"])
def test_wav_files_sum_to_the_song_up_to_their_rounding(
        flags, subtype, tolerance, checkpoint, loud):
    code, _, _ = call(separate.main, loud, "-m", checkpoint, "-o", loud.parent, *flags)

    assert code == 0
    assert soundfile.info(loud.parent / "loud" / "vocals.wav").subtype == subtype
    mixture, _ = mss.read_audio(loud)
    vocals, accompaniment = stems(loud.parent / "loud")
    inside = (accompaniment.abs() < 0.999) & (vocals.abs() < 0.999)
    assert inside.float().mean() > 0.9
    assert (vocals + accompaniment - mixture)[inside].abs().max() <= tolerance

def test_flac_may_have_16_bits(checkpoint, song):
    folder, _ = separate_song(checkpoint, song, "--ext", "flac", "--int16")

    assert soundfile.info(folder / "vocals.flac").subtype == "PCM_16"

def test_a_flac_cannot_be_empty(checkpoint, tmp_path):
    mss.write_audio(tmp_path / "empty.wav", noise(2, 0), RATE)

    fails(separate.main, tmp_path / "empty.wav", "-m", checkpoint, "-o", tmp_path / "out",
          "--ext", "flac", saying=("empty.wav", "more than 0 s expected"))

def test_a_peak_may_be_negative(tmp_path):
    blocks = [[torch.tensor([[0.5, -3.0]])], [torch.tensor([[0.25, 0.5]])]]

    done, peak = separate.write_stems([tmp_path / "a.wav"], blocks, RATE, 1, 4, "FLOAT")

    assert (done, peak) == (4, 3.0)

@pytest.mark.parametrize("ext, subtype, error", [
    ("flac", "PCM_24", 1e-3),
    ("mp3", "MPEG_LAYER_III", 0.3),
    ("ogg", "VORBIS", 0.3),
])
def test_compressed_files_sound_as_the_wav(ext, subtype, error, checkpoint, loud):
    folder = loud.parent / "loud"
    for form in (["--int16"], ["--ext", ext]):
        code, _, _ = call(separate.main, loud, "-m", checkpoint, "-o", loud.parent, *form)
        assert code == 0

    assert soundfile.info(folder / f"vocals.{ext}").subtype == subtype
    wav, compressed = stems(folder, "vocals.wav", f"vocals.{ext}")
    assert compressed.shape == wav.shape
    assert (compressed - wav).square().mean().sqrt() < error * wav.std()

@pytest.fixture
def too_loud(loud):
    """A song of which the stems' peaks lie far above full scale."""
    mixture, _ = mss.read_audio(loud)
    mss.write_audio(loud, 5 * mixture, RATE)
    return loud

def peak_of_stems(folder):
    return max(audio.abs().max().item() for audio in stems(folder))

def test_floats_keep_what_is_above_full_scale(checkpoint, too_loud):
    folder, _ = separate_song(checkpoint, too_loud)

    check_stems(folder, too_loud)
    assert peak_of_stems(folder) > 4

@pytest.mark.parametrize("flags", [
    ["--int24"], ["--int24", "--clip-mode", "clamp"], ["--clip-mode", "clamp"],
], ids=["24 bits", "24 bits, clamped", "float32, clamped"])
def test_clipping_is_noticed(flags, checkpoint, too_loud):
    out = too_loud.parent

    code, _, err = call(separate.main, too_loud, "-m", checkpoint, "-o", out, *flags)

    assert code == 0 and "clips above 1" in err
    assert peak_of_stems(out / "loud") == pytest.approx(1, abs=1e-6)

def test_rescaled_stems_share_a_gain_that_lets_none_clip(checkpoint, too_loud):
    folder, stdout = separate_song(checkpoint, too_loud, "--int24", "--clip-mode", "rescale")

    gain, decibels = re.search(r"all stems x ([\d.]+) \((.*?) dB\)", stdout).groups()
    gain = float(gain)
    assert float(decibels) == pytest.approx(20 * math.log10(gain), abs=0.02)
    mixture, _ = mss.read_audio(too_loud)
    vocals, accompaniment = stems(folder)
    assert gain < 0.25
    assert torch.allclose(vocals + accompaniment, gain * mixture, rtol=0, atol=1e-3)
    assert peak_of_stems(folder) == pytest.approx(1, abs=1e-6)
    assert not list(folder.parent.rglob(".partial*"))

def test_rescaling_makes_nothing_louder(checkpoint, song):
    folder, stdout = separate_song(checkpoint, song, "--clip-mode", "rescale")

    check_stems(folder, song)
    assert peak_of_stems(folder) < 0.9
    assert "all stems x" not in stdout

def test_mp3_has_no_16_bits(checkpoint, loud):
    fails(separate.main, loud, "-m", checkpoint, "--ext", "mp3", "--int16",
          saying=("--ext mp3", "--int16"))

def test_a_rate_that_mp3_lacks_leaves_nothing_behind(checkpoint, tmp_path):
    song = tmp_path / "fast.wav"
    mss.write_audio(song, noise(2, 5000), 96_000)

    fails(separate.main, song, "-m", checkpoint, "-o", tmp_path / "out", "--ext", "mp3",
          saying=("fast", "mp3", "not written"))

    assert not (tmp_path / "out" / "fast").exists()

# ---- separate.py: excerpts and several checkpoints ----------------------------------------------

@pytest.fixture
def song(tmp_path):
    path = tmp_path / "song.wav"
    mss.write_audio(path, noise(2, RATE), RATE)
    return path

@pytest.fixture
def bass_and_drums(tmp_path):
    """A checkpoint of two targets."""
    path = tmp_path / "bass_and_drums.pt"
    mss.save_checkpoint(path, *small(targets=("bass", "drums")))
    return path

def names_in(folder):
    return {path.name for path in folder.iterdir()}

def test_an_excerpt_in_short_segments(checkpoint, song):
    folder, _ = separate_song(
        checkpoint, song, "--start", 0.25, "--duration", 0.5, "--segment", 0.2, "--overlap", 0.1)

    mixture, _ = mss.read_audio(song)
    mixture = mixture[:, RATE // 4:RATE * 3 // 4]
    assert torch.allclose(sum(stems(folder)), mixture, rtol=0, atol=1e-6)

def test_an_excerpt_after_the_end_is_refused(checkpoint, song):
    fails(separate.main, song, "-m", checkpoint, "--start", 1, saying=("song.wav", "--start"))

def test_the_model_may_be_named_before_the_song(checkpoint, song):
    """To argparse the song is a second model."""
    code, _, _ = call(separate.main, "-o", song.parent, "-m", checkpoint, song)

    assert code == 0
    check_stems(song.parent / "song", song)

def test_several_checkpoints_at_once_give_what_each_gives(checkpoint, bass_and_drums, song):
    out = song.parent
    for folder, models in (("one", [checkpoint]), ("both", [checkpoint, bass_and_drums])):
        code, _, _ = call(separate.main, song, "-o", out / folder, "-m", *models)
        assert code == 0

    assert names_in(out / "both" / "song") == {"vocals.wav", "bass.wav", "drums.wav"}
    (alone,) = stems(out / "one" / "song", "vocals.wav")
    (together,) = stems(out / "both" / "song", "vocals.wav")
    assert torch.equal(alone, together)

def test_lengths_of_blocks_that_do_not_fit_are_refused_once_before_the_songs(checkpoint, song):
    code, _, err = call(separate.main, song, "absent.wav", "-m", checkpoint, "--overlap", "5",
                        "-o", song.parent)

    assert code == 2
    (line,) = err.splitlines()
    assert "--segment" in line and "found 6.39 and 5 s" in line

def test_a_segment_of_one_and_a_half_overlaps_will_do(checkpoint, song):
    separate_song(checkpoint, song, "--segment", 0.3, "--overlap", 0.2)

@pytest.mark.parametrize("flag, said", [
    ("--segment=0", "--segment: 0.01 to 100000 s expected, found 0"),
    ("--segment=nan", "--segment: 0.01 to 100000 s expected, found nan"),
    ("--segment=0.00001", "--segment: 0.01 to 100000 s expected, found 1e-05"),
    ("--segment=1e308", "--segment: 0.01 to 100000 s expected, found 1e+308"),
    ("--overlap=-1", "--overlap: 0 to 100000 s expected, found -1"),
])
def test_a_length_of_blocks_that_makes_no_sense_is_told_by_itself(flag, said, checkpoint, song):
    fails(separate.main, song, "-m", checkpoint, flag, saying=(said,))

def test_lengths_of_blocks_are_seconds_at_the_models_rate(tmp_path, song, monkeypatch):
    config, model = small(sample_rate=22050)
    mss.save_checkpoint(tmp_path / "slow.pt", config, model)
    lengths = []
    whole = mss.separate_blocks
    monkeypatch.setattr(mss, "separate_blocks", lambda model, blocks, segment, overlap, *rest: (
        lengths.append((segment, overlap)) or whole(model, blocks, segment, overlap, *rest)))

    separate_song(tmp_path / "slow.pt", song, "--segment", "2", "--overlap", "1")

    assert lengths == [(44100, 22050)]

def test_one_stem_only(checkpoint, song):
    folder, _ = separate_song(checkpoint, song, "--no-two-stems")

    assert names_in(folder) == {"vocals.wav"}

def test_what_each_of_two_targets_leaves(bass_and_drums, song):
    folder, _ = separate_song(bass_and_drums, song, "--two-stems")

    assert names_in(folder) == {"bass.wav", "drums.wav", "no_bass.wav", "no_drums.wav"}
    mixture, _ = mss.read_audio(song)
    for target in ("bass", "drums"):
        both = stems(folder, f"{target}.wav", f"no_{target}.wav")
        assert torch.allclose(sum(both), mixture, rtol=0, atol=1e-6)

def test_two_checkpoints_of_one_target_are_refused(checkpoint, song):
    other = shutil.copy(checkpoint, checkpoint.with_name("other.pt"))

    fails(separate.main, song, "-m", checkpoint, other,
          saying=(f"vocals in {checkpoint} and {other}",))

def test_two_names_of_one_target_are_refused_before_anything_is_downloaded(zenodo, song):
    fails(separate.main, song, "-m", "umxhq", "paper-small",
          saying=("vocals in umxhq and paper-small",))

def test_a_command_without_songs_is_refused(checkpoint):
    fails(separate.main, "-m", checkpoint, saying=("FILE",))

@pytest.mark.parametrize("flag", [
    "--segment=0", "--overlap=6", "--batch-size=0", "--duration=0", "--start=nan"])
def test_numbers_that_make_no_sense_are_refused(flag, checkpoint, song):
    name, _ = flag.split("=")

    fails(separate.main, song, "-m", checkpoint, flag, saying=(name,))

# ---- separate.py: many songs --------------------------------------------------------------------

@pytest.fixture
def music(tmp_path, monkeypatch):
    """A folder of songs, of files that are none, and of names that are hard; the current one."""
    folder = tmp_path / "music"
    for name in ("a.wav", "a.flac", "cd 1/a.wav", "cd [2]/-b.wav", "cd [2]/.hidden.wav",
                 "__MACOSX/c.wav"):
        mss.write_audio(folder / name, noise(2, 500), RATE)
    (folder / "cover.jpg").write_bytes(b"no audio")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(folder)
    return folder

def test_each_song_of_a_folder_is_separated_once(music, checkpoint):
    """Also the second time, when stems lie in the folder, too."""
    songs = ".", "a.wav", "../music/cd 1/a.wav"

    for _ in range(2):
        code, _, err = call(separate.main, *songs, "-m", checkpoint, "-o", "out")

        assert (code, err) == (0, "")
        folders = {str(path.parent) for path in Path("out").rglob("vocals.wav")}
        assert folders == {"out/a (wav)", "out/a (flac)", "out/cd 1/a", "out/cd [2]/-b"}

def test_a_folder_without_songs_is_a_failure(music, checkpoint):
    code, _, err = call(separate.main, "a.wav", "../empty", "-m", checkpoint, "-o", "out")

    assert code == 1
    assert "../empty: an audio file expected" in err
    assert "1 of 2 songs failed: ../empty" in err

def test_songs_of_one_name_get_folders_of_their_own(music, checkpoint):
    code, _, _ = call(separate.main, "a.wav", "cd 1/a.wav", "-m", checkpoint, "-o", "out")

    assert code == 0
    folders = {str(path.parent) for path in Path("out").rglob("vocals.wav")}
    assert folders == {"out/music/a", "out/cd 1/a"}

def test_songs_that_meet_nowhere_else_get_numbers():
    found = dict.fromkeys(map(Path, ("x/a.b.wav", "x/a.b.WAV", "x/a.wav")), 0)

    songs = separate.name_folders(found, Path("out"))

    assert [folder.name for _, folder in songs] == ["a.b (wav)", "a.b (WAV) 2", "a"]

def test_names_are_cut_to_what_file_systems_take():
    found = {Path("é" * 125 + ending): 0 for ending in (".wav", ".mp3")}

    songs = separate.name_folders(found, Path("out"))

    names = [folder.name for _, folder in songs]
    assert names == ["é" * 124 + " (wav)", "é" * 124 + " (mp3)"]
    assert max(len(os.fsencode(name)) for name in names) <= 255

def test_a_long_name_is_not_too_long_while_it_is_written(tmp_path):
    path = tmp_path / ("é" * 125 + ".wav")

    mss.write_audio(path, noise(2, 10), RATE)

    assert path.is_file()

def test_a_second_run_beside_the_songs_separates_the_songs_alone(checkpoint, tmp_path):
    """Stems lie below --out, in other formats, too, and of songs that are gone."""
    for name in ("a.wav", "vocals.wav", "b/vocals.flac", "gone/no_bass.wav"):
        mss.write_audio(tmp_path / name, noise(2, 500), RATE)

    for _ in range(2):
        code, stdout, err = call(
            separate.main, tmp_path, "-m", checkpoint, "-o", tmp_path, "--ext", "flac")

        assert code == 0 and "stems of an earlier run left out" in err
        assert stdout.count("real-time factor") == 2

def test_folders_of_stems_among_the_songs_are_no_failures(checkpoint, music):
    command = "a.wav", "cd 1", "-m", checkpoint, "-o", "."
    call(separate.main, *command)

    code, _, _ = call(separate.main, "music", *command)

    assert code == 0
    fails(separate.main, "music", "-m", checkpoint, "-o", ".", saying=("stems of earlier runs",))

@pytest.mark.parametrize("names, left", [
    (("vocals.wav", "accompaniment.wav"), set()),
    (("vocals.wav", "accompaniment.mp3"), {"vocals.wav", "accompaniment.mp3"}),
    (("bass.wav", "no_bass.wav", "song.wav"), {"song.wav"}),
    (("vocals.wav", "bass.wav", "drums.wav", "other.wav", "mixture.wav"), {"mixture.wav"}),
    (("vocals.wav", "bass.wav"), {"vocals.wav", "bass.wav"}),
])
def test_stems_of_another_run_are_known_by_those_beside_them(names, left, tmp_path):
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).touch()

    songs, stems = separate.audio_files(tmp_path / "in", tmp_path / "out")

    assert {path.name for path in songs} == left
    assert {path.name for path in stems} == set(names) - left

def test_what_a_search_leaves_out_is_named(tmp_path, capsys, monkeypatch):
    for name in ("closed", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "loop.wav").symlink_to(tmp_path / "loop.wav")
    for name in ("a.OGA", "b.m4b", "c.w64", "d.weba", "e.mid", "f.jpg"):
        (tmp_path / name).touch()
    scandir = os.scandir

    def closed(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    songs, _ = separate.audio_files(tmp_path, tmp_path / "out")

    assert [path.name for path in songs] == ["a.OGA", "b.m4b", "c.w64", "d.weba"]
    links, folders, files = capsys.readouterr().err.splitlines()
    assert "linked" in links and "(1)" in links and links.endswith("linked")
    assert "folders that" in folders and "(1)" in folders and folders.endswith("closed")
    assert "(2)" in files and "e.mid" in files and "loop.wav" in files

def test_a_link_to_itself_is_a_failure_as_others(checkpoint, song):
    loop = song.parent / "loop"
    loop.symlink_to(loop)

    code, _, err = call(separate.main, loop, song, "-m", checkpoint, "-o", song.parent / "out")

    assert code == 1 and "1 of 2 songs failed" in err

def test_a_song_that_fails_in_a_way_unheard_of_leaves_the_others(
        checkpoint, song, tmp_path, monkeypatch):
    mss.write_audio(tmp_path / "bad.wav", noise(2, 1000), RATE)
    good = separate.excerpt

    def excerpt(file, path, options):
        if path.name == "bad.wav":
            raise RuntimeError
        return good(file, path, options)

    monkeypatch.setattr(separate, "excerpt", excerpt)
    code, _, err = call(
        separate.main, tmp_path / "bad.wav", song, "-m", checkpoint, "-o", tmp_path / "out")

    assert code == 1 and "bad.wav: RuntimeError" in err
    check_stems(tmp_path / "out" / "song", song)

def test_songs_that_are_done_are_skipped_unless_they_are_new(checkpoint, tmp_path):
    for name in "abc":
        mss.write_audio(tmp_path / "in" / f"{name}.wav", noise(2, 500), RATE)
    command = (separate.main, tmp_path / "in", "-m", checkpoint, "-o", tmp_path / "out",
               "--skip-existing")
    call(*command)
    (tmp_path / "out" / "b" / "accompaniment.wav").unlink()
    os.utime(tmp_path / "in" / "c.wav", (2e9, 2e9))

    code, stdout, err = call(*command)

    assert code == 0
    assert "skipped, for their stems are there (1): " in err and err.strip().endswith("a.wav")
    assert re.findall(r"(\w)\.wav: 0\.0 s", stdout) == ["b", "c"]

def test_what_killed_processes_left_is_removed_at_the_next_start(checkpoint, song, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    partials = [tmp_path / "out" / folder / f"{mss.partial_prefix(pid)}{name}"
                for folder, pid, name in (("song", dead.pid, "vocals.wav"),
                                          ("other", os.getpid(), "vocals.wav"),
                                          ("other", dead.pid, "x/0.wav"),
                                          ("other", os.getppid(), "vocals.wav"))]
    for path in partials:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    separate_song(checkpoint, song)

    assert [path for path in tmp_path.rglob(".partial-*")] == [partials[-1]]

def test_what_processes_of_other_machines_write_stays(checkpoint, song, tmp_path, monkeypatch):
    theirs = tmp_path / "out" / "song" / mss.partial_prefix(os.getpid())
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    monkeypatch.setattr("socket.gethostname", lambda: "another")

    separate_song(checkpoint, song)

    assert theirs.exists()

def test_songs_whose_names_differ_in_case_get_folders_of_their_own():
    found = separate.find_songs([Path("x/song.wav"), Path("y/Song.wav")], Path("out"))

    songs = separate.name_folders(found, Path("out"))

    folders = {str(folder).casefold() for _, folder in songs}
    assert len(folders) == 2

def test_a_folders_name_ends_neither_in_dots_nor_in_blanks():
    """Windows would drop them."""
    found = separate.find_songs([Path("x/song. ..wav")], Path("out"))

    songs = separate.name_folders(found, Path("out"))

    assert songs == [(Path("x/song. ..wav"), Path("out/song"))]

def test_waiting_ends_when_another_process_is_ready():
    store = torch.distributed.HashStore()
    other = threading.Timer(0.3, lambda: store.set("ready", ""))
    other.start()

    mss.wait_for(store, ["ready"])

    assert store.check(["ready"])

def test_processes_beside_their_own_stems_all_end_well(checkpoint, tmp_path):
    """Stems are written into the folder that is searched: none is taken for a song."""
    for i in range(6):
        mss.write_audio(tmp_path / "songs" / f"{i}.wav", noise(2, 5000), RATE)

    done = torchrun(
        HERE / "separate.py", tmp_path / "songs", "-m", checkpoint, "-o", tmp_path / "songs")

    assert done.returncode == 0, done.stderr
    written = [path.parent.name for path in tmp_path.rglob("vocals.wav")]
    assert sorted(written) == list("012345")

def test_torchrun_tells_once_which_songs_failed(checkpoint, tmp_path):
    for i in range(5):
        mss.write_audio(tmp_path / "songs" / f"{i}.wav", noise(2, 5000), RATE)
    (tmp_path / "songs" / "bad.wav").write_bytes(b"junk")

    done = torchrun(
        HERE / "separate.py", tmp_path / "songs", "-m", checkpoint, "-o", tmp_path / "out")

    assert done.returncode == 1
    assert "1 of 6 songs failed" in done.stderr
    assert 'separate.py", line' not in done.stderr
    reported = re.findall(r"^\[\d/6\] .*?(\d)\.wav", done.stdout, re.MULTILINE)
    assert sorted(reported) == list("01234")
    assert names_in(tmp_path / "out") == set("01234")

@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_song_leaves_nothing_behind(number, code, checkpoint, tmp_path):
    # Long enough to be interrupted: at 8 kHz 40 minutes.
    soundfile.write(tmp_path / "long.wav", np.zeros(20_000_000, "int16"), 8000)
    process = start(
        HERE / "separate.py", tmp_path / "long.wav", "-m", checkpoint, "-o", tmp_path / "out",
        stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: list(tmp_path.rglob(".partial-*vocals.wav")), process)
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()

    assert (process.returncode, err) == (code, "")
    assert not list((tmp_path / "out").iterdir())

# ---- BSS Eval v4 --------------------------------------------------------------------------------

def two_sources(length, channels=2):
    """Random (references, estimates), both (2, length, channels)."""
    references = noise(2, length, channels, seed=0)
    estimates = noise(2, length, channels, seed=1)
    return references.numpy(), estimates.numpy()

def ratio(signal, error):
    """Two energies' ratio in dB, by numpy in float64."""
    signal = np.asarray(signal, "float64")
    error = np.asarray(error, "float64")
    return 10 * np.log10((signal ** 2).sum() / (error ** 2).sum())

def test_sdr_of_each_second_is_the_formula():
    s, y = two_sources(5 * RATE // 2)

    frames = evaluate.bss_eval(s, y, RATE, filters=False)["SDR"]

    # The last half second is dropped.
    assert frames.shape == (2, 2)
    s, y = s.astype("float64"), y.astype("float64")
    for j in range(2):
        for t in range(2):
            second = slice(t * RATE, (t + 1) * RATE)
            expected = ratio(s[j, second], y[j, second] - s[j, second])
            assert abs(frames[j, t] - expected) < 1e-9

def test_sdr_of_a_whole_song_is_the_formula():
    s, y = two_sources(5000)

    assert abs(mss.sdr(s, y) - ratio(s, y.astype("float64") - s)) < 1e-9
    assert mss.sdr(s, s) == np.inf

def test_a_shorter_estimate_is_continued_by_zeros():
    s, y = two_sources(2000)
    padded = y.copy()
    padded[:, 1500:] = 0

    scores = evaluate.bss_eval(s, y[:, :1500], 1000, filters=False)["SDR"]

    assert scores.shape == (2, 2) and np.isfinite(scores).all()
    np.testing.assert_array_equal(scores, evaluate.bss_eval(s, padded, 1000, False)["SDR"])

def test_a_longer_estimate_is_cut():
    s, y = two_sources(2000)
    longer = np.concatenate([y, y[:, ::-1]], axis=1)

    scores = evaluate.bss_eval(s, longer, 1000, filters=False)["SDR"]

    assert scores.shape == (2, 2) and np.isfinite(scores).all()
    np.testing.assert_array_equal(scores, evaluate.bss_eval(s, y, 1000, False)["SDR"])

@pytest.mark.parametrize("length", [0, 1, 700])
def test_less_than_a_second_is_one_frame(length):
    s, y = two_sources(length)

    scores = evaluate.bss_eval(s, y, RATE)

    assert list(scores) == ["SDR", "ISR", "SIR", "SAR"]
    for values in scores.values():
        assert values.shape == (2, 1)

def frames_that_count(references, estimates):
    """Which frames of 1000 samples have scores, which must be the same for all sources."""
    counted = set()
    for values in evaluate.bss_eval(references, estimates, 1000).values():
        for source in np.isfinite(values).tolist():
            counted.add(tuple(source))
    assert len(counted) == 1
    return counted.pop()

def test_a_frame_that_is_silent_in_one_reference_counts_for_none():
    s, y = two_sources(4000)
    s[1, 1000:2000] = 0

    assert frames_that_count(s, y) == (True, False, True, True)

def test_a_frame_that_is_silent_in_one_estimate_counts_for_none():
    s, y = two_sources(4000)
    y[1, 1000:2000] = 0

    assert frames_that_count(s, y) == (True, False, True, True)

def test_a_frame_of_opposite_channels_is_silent():
    """museval looks at the sum of the channels."""
    s, y = two_sources(4000)
    s[1, 1000:2000, 1] = -s[1, 1000:2000, 0]

    assert frames_that_count(s, y) == (True, False, True, True)

def test_no_frame_counts_beside_a_reference_without_a_sound():
    s, y = two_sources(4000)
    s[1] = 0

    assert frames_that_count(s, y) == (False, False, False, False)

@pytest.mark.parametrize("estimates", [
    np.ones((1, 100, 2)), np.ones((2, 100, 1)), np.ones((100, 2)), np.full((2, 100, 2), np.nan),
], ids=["one source", "one channel", "two axes", "NaN"])
def test_bss_eval_refuses(estimates):
    with pytest.raises(mss.UserError, match="expected, found"):
        evaluate.bss_eval(np.ones((2, 100, 2)), estimates, RATE)

def span_of_delays(x):
    """(L,) -> an orthonormal basis (L + 511, 512) of what x and its delayed copies span."""
    copies = np.stack([np.pad(x, (delay, 511 - delay)) for delay in range(512)], axis=1)
    return np.linalg.qr(copies)[0]

@pytest.mark.parametrize("channels", [1, 2])
def test_filters_against_least_squares(channels):
    """By orthogonal projections. Two equal channels leave bss_eval's equations singular."""
    length = 1100
    mono = noise(2, length, 1).numpy().astype("float64")
    s = mono.repeat(channels, axis=2)                                 # (S, L, C)
    y = 0.5 * np.roll(s, 3, axis=1) + 0.2 * s[::-1]
    y = y + noise(2, length, channels, seed=1).numpy()

    ours = evaluate.bss_eval(s, y, RATE)

    spans = [span_of_delays(x) for x in mono[..., 0]]
    span_of_all = np.linalg.qr(np.concatenate(spans, axis=1))[0]
    for j in range(2):
        reference = np.pad(s[j], [(0, 511), (0, 0)])
        estimate = np.pad(y[j], [(0, 511), (0, 0)])
        own = spans[j] @ (spans[j].T @ estimate)
        everything = span_of_all @ (span_of_all.T @ estimate)

        assert abs(ours["ISR"][j, 0] - ratio(reference, own - reference)) < 1e-6
        assert abs(ours["SIR"][j, 0] - ratio(own, everything - own)) < 1e-6
        assert abs(ours["SAR"][j, 0] - ratio(everything, estimate - everything)) < 1e-6

def test_a_song_in_pieces_scores_as_in_one(monkeypatch):
    s, y = two_sources(4700)
    s[1, 1000:2000] = 0
    whole = evaluate.bss_eval(s, y, 1000)

    monkeypatch.setattr(evaluate, "PIECE", 1000)
    pieces = evaluate.bss_eval(s, y, 1000)

    assert pieces.keys() == whole.keys()
    for metric in whole:
        np.testing.assert_allclose(pieces[metric], whole[metric], rtol=0, atol=1e-9)

@pytest.mark.parametrize("length", [evaluate.BLOCK, 16 * evaluate.BLOCK + 5])
def test_correlations_against_numpy(length):
    """Of pieces that end anywhere, of a song longer than what is transformed at once."""
    s = noise(1, 2, length)
    y = noise(1, 2, length, seed=1)
    pieces = zip(s.split(9999, dim=-1), y.split(9999, dim=-1))

    r = evaluate.correlations(pieces)

    assert r.shape == (4, 2, 1023)
    x = torch.cat([s, y]).flatten(0, 1).double()
    for delay in (-511, -3, 0, 511):
        early = x[:, max(delay, 0):length + min(delay, 0)]
        late = s[0, :, max(-delay, 0):length - max(delay, 0)].double()
        np.testing.assert_allclose(r[:, :, 511 + delay], early @ late.T, rtol=0, atol=1e-9)

class Ridges:
    """Stands in for Cholesky's decomposition: it fails a number of times before it succeeds."""

    def __init__(self, failures):
        self.failures = failures
        self.calls = 0
        self.real = torch.linalg.cholesky_ex

    def __call__(self, G):
        self.calls += 1
        assert self.calls < 100, "ridges without end"
        return self.real(G)[0], torch.tensor(int(self.calls <= self.failures))

def white_correlations():
    """Of a white signal s with itself, and with s half as loud and 3 samples later."""
    r_ss = torch.zeros(1, 1, 1023, dtype=torch.double)
    r_ss[..., 511] = 7
    return r_ss, r_ss.roll(3, dims=-1) / 2

def test_one_step_of_refinement_makes_good_for_the_ridge(monkeypatch):
    """A ridge of 1e-5 of the diagonal makes filters 1e-5 smaller, and after the step 1e-10."""
    monkeypatch.setattr(torch.linalg, "cholesky_ex", Ridges(failures=10))

    response = evaluate.projection_filters(*white_correlations(), 1024).flatten()

    delayed = np.exp(-2j * np.pi * 3 * np.arange(513) / 1024)
    assert abs(response.numpy() - delayed / 2).max() < 1e-9

def test_what_no_ridge_helps_is_refused(monkeypatch):
    monkeypatch.setattr(torch.linalg, "cholesky_ex", Ridges(failures=1000))

    with pytest.raises(mss.UserError, match="no ridge"):
        evaluate.projection_filters(*white_correlations(), 1024)

def mono_files(folder):
    """(S, L, 1)"""
    files = [soundfile.read(path, always_2d=True)[0] for path in sorted(folder.iterdir())]
    return np.stack([audio.mean(axis=1, keepdims=True) for audio in files])

@pytest.mark.parametrize("number", ["01", "02", "03", "05", "06", "07", "08", "09"])
def test_mir_evals_expectations(number):
    folder = data("mir_eval_separation")
    expected = json.loads((folder / f"output{number}.json").read_text())["Images"]
    references = mono_files(folder / f"ref{number}")
    estimates = mono_files(folder / f"est{number}")

    # The files have one channel. The others are copies of it, in the estimates with a gain.
    channels = expected["nchan"]
    gains = np.full(channels, expected["gain"])
    gains[0] = 1
    if expected["reverse"]:
        gains = gains[::-1]
    references = references.repeat(channels, axis=2)
    estimates = (estimates * gains)[expected["Source permutation"]]

    scores = evaluate.bss_eval(references, estimates, references.shape[1])

    def meets(metric, title, tolerance):
        return scores[metric][:, 0] == pytest.approx(expected[title], rel=0, abs=tolerance)

    assert meets("SDR", "Source to Distortion", 1e-9)
    assert meets("ISR", "Image to Spatial", 1e-3)
    assert meets("SIR", "Source to Interference", 1e-3)
    assert meets("SAR", "Source to Artifact", 1e-3)

@pytest.fixture(scope="session")
def musevals_song(tmp_path_factory):
    """museval's own test: random estimates of a song -> (our scores, the folder of our JSON)."""
    root = data("musdb_samples")
    folder = tmp_path_factory.mktemp("museval")
    (track,) = mss.musdb_tracks(root, "train", folder / "cache")
    np.random.seed(0)
    estimates = {name: torch.from_numpy(np.random.random((track.frames, 2))).T
                 for name in ("vocals", "accompaniment")}

    scores, _, _ = evaluate.compare(track, track.load("mixture"), estimates, filters=True)
    scores = scores["estimate"]
    evaluate.write_json(folder / "json" / "test" / "Song.json", scores)
    return scores, folder / "json"

@needs_ffmpeg
def test_musevals_expectations(musevals_song):
    _, folder = musevals_song
    ours = json.loads((folder / "test" / "Song.json").read_text())["targets"]
    theirs = data("musdb_samples") / "Music Delta - 80s Rock.expected.json"
    theirs = json.loads(theirs.read_text())["targets"]

    for targets in (ours, theirs):
        assert [target["name"] for target in targets] == ["vocals", "accompaniment"]
        assert [len(target["frames"]) for target in targets] == [6, 6]

    for our_target, their_target in zip(ours, theirs):
        for a, b in zip(our_target["frames"], their_target["frames"]):
            assert (a["time"], a["duration"]) == (b["time"], b["duration"])
            assert a["metrics"] == pytest.approx(b["metrics"], rel=0, abs=1e-3)

@needs_ffmpeg
def test_museval_reads_our_json(musevals_song):
    museval = pytest.importorskip("museval", reason="museval is not installed; only this needs it")
    scores, folder = musevals_song
    store = museval.EvalStore()

    store.add_eval_dir(folder)

    medians = store.agg_frames_tracks_scores()
    expected = evaluate.finite(np.median, scores["vocals"]["SIR"])
    assert medians["vocals"]["SIR"] == pytest.approx(expected)

# ---- Scores of one song -------------------------------------------------------------------------

@pytest.fixture(scope="session")
def with_silent_bass():
    """(references, estimates) of 3 s at 1000 Hz, {target: (2, 3000)}; bass from 1 s on."""
    references = {name: noise(2, 3000, seed=k) for k, name in enumerate(mss.SOURCES)}
    references["bass"][:, :1000] = 0
    references["accompaniment"] = sum(references[name] for name in mss.SOURCES[1:])
    estimates = {name: audio + noise(2, 3000, seed=9) for name, audio in references.items()}
    return references, estimates

def score(references, estimates):
    """Of one system, at 1000 Hz -> {target: scores}."""
    return evaluate.score(references, {"system": estimates}, 1000)["system"]

def test_groups_are_musevals(with_silent_bass):
    """Where one stem is silent none counts; vocals and accompaniment are a group of their own."""
    scores = score(*with_silent_bass)

    counted = {name: np.isfinite(values["SDR"]).sum() for name, values in scores.items()}
    assert counted == {"vocals": 3, "accompaniment": 3, "bass": 2, "drums": 2, "other": 2}

def test_vocals_are_scored_beside_the_accompaniment_and_stems_beside_stems(with_silent_bass):
    """With filters, too, and all in one go."""
    references, estimates = ({name: audio[:1] for name, audio in of.items()}
                             for of in with_silent_bass)

    def scored(*names):
        systems = {"system": {name: estimates[name] for name in names}}
        return evaluate.score(references, systems, 1000, filters=True)["system"]

    together = scored(*evaluate.TARGETS)

    for group, names in ((PAIR, PAIR), (mss.SOURCES, mss.SOURCES[1:])):
        alone = scored(*group)
        for name in names:
            for metric in evaluate.METRICS:
                assert together[name][metric] == pytest.approx(alone[name][metric], nan_ok=True)

def test_an_accompaniment_without_vocals_is_scored_by_itself(with_silent_bass):
    references, estimates = with_silent_bass
    estimates = {name: estimates[name] for name in ("accompaniment", "drums")}

    scores = score(references, estimates)

    assert list(scores) == ["drums", "accompaniment"]
    assert np.isfinite(scores["drums"]["SDR"]).all()

def test_usdr_is_the_formula():
    s = noise(2, 3700, scale=1e-5)                                    # so quiet that 1e-7 counts
    y = s + noise(2, 3700, seed=1, scale=3e-6)

    usdr = score({"drums": s}, {"drums": y})["drums"]["uSDR"]

    signal = s.double().square().sum() + 1e-7
    error = (y.double() - s.double()).square().sum() + 1e-7
    assert abs(usdr - 10 * math.log10(signal / error)) < 1e-9

def test_a_silent_reference_has_no_score():
    scores = score({"bass": torch.zeros(2, 1000)}, {"bass": noise(2, 1000)})

    assert np.isnan(scores["bass"]["uSDR"])
    assert np.isnan(evaluate.finite(np.median, scores["bass"]["SDR"]))

# ---- evaluate.py: scores of a model -------------------------------------------------------------

def scores_in(path):
    """A CSV's rows by (track, system, target)."""
    return {(row["track"], row["system"], row["target"]): row for row in read_csv(path)}

@pytest.fixture(scope="session")
def evaluated(songs, tmp_path_factory):
    """A run of evaluate.py that writes all that it can, on a song of 3 s."""
    folder = tmp_path_factory.mktemp("evaluated")
    mss.save_checkpoint(folder / "small.pt", *small())
    command = [
        "-m", folder / "small.pt", "--musdb", songs, "--results", folder / "kept",
        "-o", folder / "out", "--csv", folder / "scores.csv", "--json", folder / "json",
        "--report", folder]
    code, stdout, err = call(evaluate.main, *command)
    assert (code, err) == (0, "")
    (track,) = mss.musdb_tracks(songs, "test")
    return types.SimpleNamespace(
        folder=folder, command=command, stdout=stdout, track=track,
        estimates=folder / "out" / "test" / track.name, rows=scores_in(folder / "scores.csv"))

def test_the_table_says_which_sdr_it_holds(evaluated):
    assert evaluate.SDR in evaluated.stdout
    assert evaluate.USDR in evaluated.stdout

def test_the_table_shows_the_scores(evaluated):
    track = evaluated.track.name
    (line,) = re.findall(rf"^vocals +{track}(.*)", evaluated.stdout, re.MULTILINE)

    figures = []
    for metric in ("SDR", "uSDR"):
        for system in ("estimate", "mixture"):
            figures.append(evaluated.rows[track, system, "vocals"][metric])
    assert line.split()[:4] == [f"{float(figure):.2f}" for figure in figures]
    assert line.split()[-1] == "3/3"

def check_scores(evaluated, system, estimates):
    """The CSV must hold the medians of the SDR of vocals and accompaniment: the two estimates."""
    targets = "vocals", "accompaniment"
    references = [evaluated.track.load(name).T for name in targets]
    frames = evaluate.bss_eval(np.stack(references), np.stack(estimates), RATE, False)["SDR"]
    for target, values in zip(targets, frames):
        row = evaluated.rows[evaluated.track.name, system, target]
        assert float(row["SDR"]) == pytest.approx(np.median(values), abs=1e-9)
        assert (row["frames"], row["frames_total"]) == ("3", "3")

def test_scores_are_those_of_the_estimates_written(evaluated):
    estimates = [audio.T for audio in stems(evaluated.estimates)]

    check_scores(evaluated, "estimate", estimates)
    for target in ("vocals", "accompaniment"):
        assert evaluated.rows[evaluated.track.name, "estimate", target]["SIR"]

def test_the_mixture_as_estimate_stands_beside(evaluated):
    mixture = evaluated.track.load("mixture").T

    check_scores(evaluated, "mixture", [mixture, mixture])
    for target in ("vocals", "accompaniment"):
        assert evaluated.rows[evaluated.track.name, "mixture", target]["SIR"] == ""

def test_the_json_has_a_frame_for_each_second(evaluated):
    path = evaluated.folder / "json" / "test" / f"{evaluated.track.name}.json"

    targets = json.loads(path.read_text())["targets"]

    assert [target["name"] for target in targets] == ["vocals", "accompaniment"]
    for target in targets:
        assert [frame["time"] for frame in target["frames"]] == [0, 1, 2]

def test_the_json_is_rounded_and_knows_no_infinity(tmp_path):
    values = {"SDR": [1.234567], "ISR": [-2.000004], "SIR": [np.inf], "SAR": [np.nan]}

    evaluate.write_json(tmp_path / "song.json", {"vocals": values})

    (target,) = json.loads((tmp_path / "song.json").read_text())["targets"]
    metrics = target["frames"][0]["metrics"]
    assert (metrics["SDR"], metrics["ISR"]) == (1.23457, -2.0)
    assert np.isnan(metrics["SIR"]) and np.isnan(metrics["SAR"])

def test_the_report_needs_no_other_file(evaluated):
    page = (evaluated.folder / "index.html").read_text(encoding="utf-8")

    assert "<script" not in page
    assert not re.search(r"(src|href)=.?(?!data:)\w", page)

def test_the_report_shows_and_plays_the_song(evaluated):
    page = (evaluated.folder / "index.html").read_text(encoding="utf-8")

    # The mixture, two references, two estimates.
    assert page.count("<audio") == page.count("<img") == 5
    first = re.search(r"data:audio/mpeg;base64,([^\"]+)", page)[1]
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(first)))
    assert rate == RATE
    assert mss.sdr(evaluated.track.load("mixture").T, heard) > 20

@pytest.fixture(scope="session")
def strange(songs, tmp_path_factory):
    """A run on a song whose name is HTML -> (the folder of all output, the name)."""
    if os.name == "nt":
        pytest.skip("Windows has no such names")
    folder = tmp_path_factory.mktemp("strange")
    name = '<img src=x>&amp;"%2e%2e'
    shutil.copytree(songs / "test" / "Synthetic - Song 4", folder / "songs" / "test" / name)
    mss.save_checkpoint(folder / "small.pt", *small())
    code, _, err = call(
        evaluate.main, "-m", folder / "small.pt", "--musdb", folder / "songs",
        "--results", folder / "kept", "-o", folder / "out", "--json", folder / "json",
        "--report", folder / "report", "--csv", folder / "scores.csv")
    assert (code, err) == (0, "")
    return folder, name

def test_a_name_is_no_html(strange):
    folder, name = strange

    page = (folder / "report" / "index.html").read_text(encoding="utf-8")

    assert "<img src=x>" not in page
    assert "<h2>&lt;img src=x&gt;&amp;amp;&quot;%2e%2e</h2>" in page

def test_a_names_files_lie_in_the_folders_given(strange):
    folder, name = strange

    assert names_in(folder) == {
        "songs", "small.pt", "kept", "out", "json", "report", "scores.csv"}
    assert names_in(folder / "out" / "test") == {name}
    assert names_in(folder / "json" / "test") == {f"{name}.json"}
    assert names_in(folder / "report") == {"index.html"}

def test_targets_and_errors_are_no_html(tmp_path):
    scores = {"estimate": {"<i>": {"SDR": [1.0]}}}
    results = [{"track": "song", "scores": scores}, {"track": "other", "error": "<b> is absent"}]

    evaluate.write_report(tmp_path / "page.html", "<u>", [["<s>"], ["<q>"]], results, ())

    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for tag in ("<i>", "<b>", "<u>", "<s>", "<q>"):
        assert tag not in page
        assert html.escape(tag) in page
    assert "<em>" not in evaluate.player("<em>", noise(2, 4410), RATE)

def test_what_is_done_is_read_back(evaluated, monkeypatch):
    """It looks as if it were computed, too."""
    monkeypatch.setattr(evaluate, "separated_on_disk", None)

    assert call(evaluate.main, *evaluated.command) == (0, evaluated.stdout, "")

def test_what_is_gone_is_written_again(evaluated):
    vocals = evaluated.estimates / "vocals.wav"
    before, _ = mss.read_audio(vocals)
    vocals.unlink()

    assert call(evaluate.main, *evaluated.command) == (0, evaluated.stdout, "")

    assert torch.equal(mss.read_audio(vocals)[0], before)

def check_same_scores(evaluated, path, decibels=0):
    """A CSV must hold the SDRs of the run that wrote the estimates, but for so many dB."""
    rows = scores_in(path)
    assert rows.keys() == evaluated.rows.keys()
    for key, row in evaluated.rows.items():
        for metric in ("SDR", "uSDR"):
            assert float(rows[key][metric]) == pytest.approx(float(row[metric]), abs=decibels)

def test_files_score_as_the_model_that_wrote_them(evaluated, songs, tmp_path):
    code, _, err = call(
        evaluate.main, "--estimates", evaluated.folder / "out", "--musdb", songs, "--full",
        "--results", tmp_path / "kept", "--csv", tmp_path / "scores.csv")

    assert (code, err) == (0, "")
    check_same_scores(evaluated, tmp_path / "scores.csv")

def test_another_process_scores_the_same(evaluated, device, songs, tmp_path, monkeypatch):
    """On the same GPU."""
    monkeypatch.setattr(evaluate, "work", lambda *arguments: None)    # but not in that process

    code, stdout, err = call(
        evaluate.main, "-m", evaluated.folder / "small.pt", "--musdb", songs, "-d", device,
        "--workers", 2, "--results", tmp_path / "kept", "--csv", tmp_path / "scores.csv")

    assert (code, err) == (0, "")
    assert f"on {device}" in stdout
    check_same_scores(evaluated, tmp_path / "scores.csv", {"cpu": 1e-9, "cuda": 0.1}[device])

def test_a_dead_process_is_noticed(songs):
    tracks = mss.musdb_tracks(songs, "train")[:2]
    store = torch.distributed.HashStore()
    store.set("track 0", '{"track": "Synthetic - Song 0"}')

    results = evaluate.collect(store, tracks)

    assert results == [
        {"track": "Synthetic - Song 0"},
        {"track": "Synthetic - Song 1", "error": "its process died"}]

def test_a_dataset_that_is_not_there_is_named(checkpoint, tmp_path):
    fails(evaluate.main, "-m", checkpoint, "--musdb", tmp_path / "absent", saying=("absent",))

def test_two_things_to_score_are_refused(songs, tmp_path):
    fails(evaluate.main, "--oracle", "--estimates", tmp_path, "--musdb", songs,
          saying=("one of -m, --estimates, --oracle",))

@pytest.mark.parametrize("module", [mss, baselines, separate, evaluate])
def test_results_are_kept_for_the_code_that_computed_them(
        module, songs, checkpoint, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    command = "-m", checkpoint, "--musdb", songs, "--results", kept

    for _ in range(2):
        assert call(evaluate.main, *command)[0] == 0
        assert len(names_in(kept)) == 1

    other_code = tmp_path / "other.py"
    other_code.write_text("other code")
    monkeypatch.setattr(module, "__file__", str(other_code))
    for _ in range(2):
        assert call(evaluate.main, *command)[0] == 0
        assert len(names_in(kept)) == 2

# ---- evaluate.py: estimates of any kind ---------------------------------------------------------

def estimate_of(track):
    """The vocals with some noise."""
    return track.load("vocals") + noise(2, track.frames, scale=0.01)

def write_estimate(folder, track, audio, name="vocals.wav", rate=RATE):
    mss.write_audio(folder / track.name / name, audio, rate)

def score_files(folder, songs, subset="test", *words):
    """Run evaluate.py on estimates -> (exit code, stderr, {track: SDR of the vocals})."""
    table = folder.parent / "scores.csv"
    code, _, err = call(
        evaluate.main, "--estimates", folder, "--musdb", songs, "--subset", subset,
        "--results", folder.parent / "kept", "--csv", table, *words)
    scores = {}
    for (track, system, target), row in scores_in(table).items():
        if (system, target) == ("estimate", "vocals"):
            scores[track] = float(row["SDR"])
    return code, err, scores

@pytest.fixture(scope="session")
def track(songs):
    (track,) = mss.musdb_tracks(songs, "test")
    return track

def test_good_estimates_score_high_without_a_notice(songs, track, tmp_path):
    write_estimate(tmp_path / "est", track, estimate_of(track))

    code, err, scores = score_files(tmp_path / "est", songs)

    assert (code, err) == (0, "")
    assert scores[track.name] > 15

def test_a_mono_estimate_is_scored_with_a_notice(songs, track, tmp_path):
    write_estimate(tmp_path / "est", track, estimate_of(track).mean(0, keepdim=True))

    code, err, scores = score_files(tmp_path / "est", songs)

    assert code == 0 and err.count("notice: ") == 1
    assert scores[track.name] > 5

def test_an_estimate_without_its_end_is_scored_with_a_notice(songs, track, tmp_path):
    write_estimate(tmp_path / "est", track, estimate_of(track)[:, :-RATE])

    code, err, scores = score_files(tmp_path / "est", songs)

    assert code == 0 and err.count("notice: ") == 1
    assert scores[track.name] > 10

def test_what_comes_after_the_songs_end_is_not_scored(songs, track, tmp_path):
    estimate = estimate_of(track)
    write_estimate(tmp_path / "est", track, estimate)
    _, _, expected = score_files(tmp_path / "est", songs)

    write_estimate(tmp_path / "est", track, torch.cat([estimate, estimate.flip(1)], dim=1))
    code, err, scores = score_files(tmp_path / "est", songs)

    assert code == 0 and err.count("notice: ") == 1
    assert scores == expected

def test_a_silent_estimate_has_no_score(songs, track, tmp_path):
    write_estimate(tmp_path / "est", track, torch.zeros(2, track.frames))

    code, _, scores = score_files(tmp_path / "est", songs)

    assert code == 0
    assert np.isnan(scores[track.name])

@pytest.mark.parametrize("other", ("vocals.flac", "vocals.mp3", "vocals.wma"))
def test_of_two_files_for_a_target_the_wav_counts(other, songs, track, tmp_path):
    write_estimate(tmp_path / "est", track, estimate_of(track))
    _, _, expected = score_files(tmp_path / "est", songs)
    folder = tmp_path / "est" / track.name
    mss.write_audio(tmp_path / "noise.flac", noise(2, track.frames), RATE)
    shutil.move(tmp_path / "noise.flac", folder / other)

    code, err, scores = score_files(tmp_path / "est", songs)

    assert (code, err) == (0, "")
    assert scores == expected and scores[track.name] > 15

def test_a_file_in_the_subsets_folder_counts(songs, track, tmp_path):
    write_estimate(tmp_path / "est" / "test", track, estimate_of(track), name="vocals.flac")
    write_estimate(tmp_path / "est", track, noise(2, track.frames))

    code, err, scores = score_files(tmp_path / "est", songs)

    assert (code, err) == (0, "")
    assert scores[track.name] > 15

def test_excerpts_of_estimates_are_those_of_the_song(songs, track, tmp_path):
    write_estimate(tmp_path / "est", track, estimate_of(track))

    code, err, scores = score_files(tmp_path / "est", songs, "test", "--chunks", 1, "--seconds", 1)

    assert (code, err) == (0, "")
    assert scores[track.name] > 10

def test_an_mp3_is_scored(songs, track, tmp_path):
    write_estimate(tmp_path / "est", track, estimate_of(track), name="vocals.mp3")

    code, _, scores = score_files(tmp_path / "est", songs)

    assert code == 0
    assert scores[track.name] > 8

def test_bad_estimates_and_missing_ones_are_named_and_the_others_scored(songs, tmp_path):
    good, bad, missing = mss.musdb_tracks(songs, "train")
    write_estimate(tmp_path / "est", good, estimate_of(good))
    wav = tmp_path / "est" / bad.name / "vocals.wav"
    wav.parent.mkdir()
    soundfile.write(wav, np.full((bad.frames, 2), np.inf, "float32"), RATE, "FLOAT")

    code, err, scores = score_files(tmp_path / "est", songs, "train")

    assert code == 1
    assert f"{wav}: finite samples expected, found NaN or infinity at sample 0" in err
    assert f"{missing.name}: some of vocals" in err
    assert f"2 of 3 tracks failed: {bad.name} (" in err
    assert list(scores) == [good.name] and scores[good.name] > 15

def test_estimates_of_another_rate_are_refused(songs, track, tmp_path):
    write_estimate(tmp_path / "est", track, estimate_of(track), rate=48000)

    code, err, scores = score_files(tmp_path / "est", songs)

    assert (code, scores) == (2, {})
    assert "44100 Hz expected, found 48000 Hz" in err

def test_a_json_file_that_cannot_be_written_costs_its_song_alone(songs, tmp_path):
    first, second, third = mss.musdb_tracks(songs, "train")
    for track in (first, second, third):
        write_estimate(tmp_path / "est", track, estimate_of(track))
    (tmp_path / "json" / "train" / f"{second.name}.json").mkdir(parents=True)

    code, err, scores = score_files(
        tmp_path / "est", songs, "train", "--json", tmp_path / "json")

    assert code == 1
    assert f"1 of 3 tracks failed: {second.name} (" in err
    assert list(scores) == [first.name, third.name]
    assert (tmp_path / "json" / "train" / f"{third.name}.json").is_file()

def test_a_table_that_cannot_be_written_leaves_the_report(songs, track, tmp_path):
    write_estimate(tmp_path / "est", track, estimate_of(track))
    (tmp_path / "table").mkdir()

    code, out, err = call(
        evaluate.main, "--estimates", tmp_path / "est", "--musdb", songs, "--results",
        tmp_path / "kept", "--csv", tmp_path / "table", "--report", tmp_path / "report")

    assert code == 1
    assert err.startswith(f"evaluate.py: error: {tmp_path / 'table'}: not written: ")
    assert str(tmp_path / "report" / "index.html") in out
    assert (tmp_path / "report" / "index.html").is_file()

# ---- evaluate.py: memory ------------------------------------------------------------------------

@pytest.fixture
def longest(monkeypatch):
    """The most samples that were read at once, in a list, where a piece has 1 s."""
    found = [0]
    real = mss.read_samples

    def read_samples(file, frames, *words):
        found[0] = max(found[0], frames)
        return real(file, frames, *words)

    monkeypatch.setattr(mss, "read_samples", read_samples)
    monkeypatch.setattr(evaluate, "PIECE", RATE)
    return found

@pytest.mark.parametrize("words", (("--full",), ("--oracle",), ("--estimates", "est", "--full")),
                         ids=("a model", "oracles", "files"))
def test_only_pieces_of_a_song_are_read(words, songs, track, checkpoint, tmp_path, longest,
                                        monkeypatch):
    write_estimate(tmp_path / "est", track, estimate_of(track))
    monkeypatch.chdir(tmp_path)
    model = ("-m", checkpoint) if words == ("--full",) else ()
    longest[0] = 0

    code, _, err = call(evaluate.main, *words, *model, "--musdb", songs, "--results", "kept")

    assert (code, err) == (0, "")
    assert RATE <= longest[0] < 1.2 * RATE
    assert track.frames == 3 * RATE

def test_a_song_whose_name_is_not_utf_8_is_scored(songs, tmp_path):
    shutil.copytree(songs / "test", tmp_path / "test")
    (song,) = (tmp_path / "test").iterdir()
    try:
        song.rename(song.with_name(os.fsdecode(b"caf\xe9")))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    mss.save_checkpoint(tmp_path / "small.pt", *small())

    code, out, _ = call(
        evaluate.main, "-m", tmp_path / "small.pt", "--musdb", tmp_path, "--results",
        tmp_path / "results", "--report", tmp_path / "report", "--csv", tmp_path / "scores.csv")

    assert code == 0
    for text in (out, (tmp_path / "report" / "index.html").read_text(encoding="utf-8"),
                 (tmp_path / "scores.csv").read_text(encoding="utf-8")):
        assert "caf\\udce9" in text

# ---- evaluate.py: excerpts ----------------------------------------------------------------------

def test_excerpts_follow_from_the_seed(songs):
    tracks = mss.musdb_tracks(songs, "train")

    first = evaluate.excerpts(tracks, 3, 1.0, seed=0)

    assert first == evaluate.excerpts(tracks, 3, 1.0, seed=0)
    assert first != evaluate.excerpts(tracks, 3, 1.0, seed=1)

def test_excerpts_are_of_random_songs(songs):
    tracks = mss.musdb_tracks(songs, "train")

    chosen = set()
    for seed in range(9):
        (part,) = evaluate.excerpts(tracks, 1, 1.0, seed)
        chosen.add(part.name)

    assert len(chosen) > 1

def test_excerpts_are_parts_of_their_songs(songs):
    tracks = mss.musdb_tracks(songs, "train")
    whole = {track.name: track.load("bass") for track in tracks}

    parts = evaluate.excerpts(tracks, 2, 1.0, seed=0)

    assert len(parts) == 2
    for part in parts:
        expected = whole[part.name][:, part.first:part.first + RATE]
        assert torch.equal(part.load("bass"), expected)

def test_songs_shorter_than_an_excerpt_come_whole(songs):
    tracks = mss.musdb_tracks(songs, "train")

    parts = evaluate.excerpts(tracks, 9, 99, seed=0)

    assert [part.frames for part in parts] == [3 * RATE] * 3

# ---- evaluate.py: oracles -----------------------------------------------------------------------

@pytest.fixture(scope="session")
def oracles(songs, tmp_path_factory):
    """A run on a second of a song -> (its folder, rows of its CSV, the song's name)."""
    folder = tmp_path_factory.mktemp("oracles")
    code, _, err = call(
        evaluate.main, "--oracle", "--musdb", songs, "--chunks", 1, "--seconds", 1,
        "--results", folder, "--csv", folder / "table_1.csv")
    assert (code, err) == (0, "")
    (track,) = mss.musdb_tracks(songs, "test")
    return folder, scores_in(folder / "table_1.csv"), track.name

def test_oracles_have_the_rows_of_table_1(oracles):
    _, rows, track = oracles

    assert len(rows) == len(evaluate.ORACLES) * len(evaluate.TARGETS) == 9 * 5
    for target in evaluate.TARGETS:
        assert (track, "cIRM(inf)", target) in rows

@pytest.mark.parametrize("target", evaluate.TARGETS)
def test_oracles_rank_as_in_table_1(target, oracles):
    """IBM and IRM(inf) aren't always better than their neighbours."""
    _, rows, track = oracles
    systems = "mixture", "IRM(1)", "cIRM(1)", "cIRM(2)", "cIRM(5)", "cIRM(10)", "cIRM(inf)"

    scores = [float(rows[track, system, target]["SDR"]) for system in systems]

    assert scores == sorted(scores)
    assert scores[-1] > 50

def read_png(path):
    """Of a PNG without filters -> (H, W, 3) uint8."""
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    compressed = content[content.index(b"IDAT") + 4:]
    pixels = np.frombuffer(zlib.decompressobj().decompress(compressed), "uint8")
    return pixels.reshape(height, 1 + 3 * width)[:, 1:].reshape(height, width, 3)

def test_figure_2_is_a_panel_for_each_target_and_one_for_all(oracles):
    folder, _, _ = oracles
    side = 2 * evaluate.SIDE

    image = read_png(folder / "figure2.png")

    # Two rows of three, with white margins of 10 pixels.
    assert image.shape == (2 * (side + 20), 3 * (side + 20), 3)
    for top in (0, side + 20):
        for left in (0, side + 20, 2 * (side + 20)):
            panel = image[top:top + side + 20, left:left + side + 20]
            assert (panel[:10] == 255).all() and (panel[:, -10:] == 255).all()
            assert panel[10:-10, 10:-10].min() < 255

            # M = -1 lies on the unit circle, which is red.
            assert panel[10 + side // 2, 10 + side // 4].tolist() == [255, 0, 0]

def test_oracles_take_songs_of_two_stems(tmp_path):
    for i, name in enumerate(PAIR):
        mss.write_audio(tmp_path / f"songs/test/a/{name}.wav", noise(2, RATE, seed=i), RATE)

    code, _, err = call(
        evaluate.main, "--oracle", "--musdb", tmp_path / "songs", "--results", tmp_path / "found",
        "--csv", tmp_path / "found.csv")

    assert (code, err) == (0, "")
    assert {target for _, _, target in scores_in(tmp_path / "found.csv")} == set(PAIR)
    side = 2 * evaluate.SIDE + 20
    assert read_png(tmp_path / "found/figure2.png").shape == (side, 3 * side, 3)

def test_figure_2_has_the_imaginary_axis_upwards():
    side = evaluate.SIDE
    histogram = np.zeros((side, side), int)
    row, column = int(0.125 * side), int(0.75 * side)                 # M = 1 + 1.5j
    histogram[row, column] = 9

    image = evaluate.figure_2({"vocals": [9, 9, *histogram.ravel()]})

    red = (image == (255, 0, 0)).all(axis=2)
    black = np.argwhere((image < 255).all(axis=2) & ~red)
    cell = {(10 + 2 * row + i, 10 + 2 * column + j) for i in range(2) for j in range(2)}
    assert {tuple(pixel) for pixel in black.tolist()} == cell

@pytest.fixture(scope="session")
def ratios():
    """Random spectrograms S and X and, by numpy, M = S / X: 0 where X is silent."""
    parts = [noise(1, 30, 40, seed=seed, scale=1) for seed in range(4)]
    S = torch.complex(parts[0], parts[1])
    X = torch.complex(parts[2], parts[3])
    X[0, 0, :3] = 0
    M = np.divide(S, X, out=np.zeros(S.shape, "complex64"), where=X.numpy() != 0)
    return S, X, M

def check_oracle(name, ratios, expected):
    S, X, _ = ratios
    mask = evaluate.ORACLES[name](S, X)
    np.testing.assert_allclose(np.broadcast_to(mask, expected.shape), expected, atol=1e-4)

def test_the_mixture_is_masked_by_nothing(ratios):
    check_oracle("mixture", ratios, np.ones((1, 30, 40)))

def test_ideal_binary_mask_against_numpy(ratios):
    S, X, _ = ratios
    S = S.numpy()
    X = X.numpy()

    check_oracle("IBM", ratios, abs(S) > abs(X - S))

@pytest.mark.parametrize("name, limit", [("IRM(1)", 1), ("IRM(inf)", np.inf)])
def test_ideal_ratio_masks_against_numpy(name, limit, ratios):
    _, _, M = ratios

    check_oracle(name, ratios, np.minimum(abs(M), limit))

@pytest.mark.parametrize("name, limit", [
    ("cIRM(1)", 1), ("cIRM(2)", 2), ("cIRM(5)", 5), ("cIRM(10)", 10), ("cIRM(inf)", np.inf)])
def test_complex_ideal_ratio_masks_against_numpy(name, limit, ratios):
    _, _, M = ratios

    check_oracle(name, ratios, np.minimum(abs(M), limit) * np.exp(1j * np.angle(M)))

@pytest.mark.parametrize("name", evaluate.ORACLES)
def test_masks_of_pieces_are_those_of_the_whole(name, monkeypatch):
    mixture = noise(2, 50000, seed=1)
    source = noise(2, 50000, seed=2)
    S, X = mss.stft(source), mss.stft(mixture)
    expected = mss.istft(evaluate.ORACLES[name](S, X) * X, 50000)

    estimate = evaluate.oracle_estimates(mixture, {"vocals": source})[name]["vocals"]
    pieces = [estimate[:, start:start + 9000] for start in range(0, 50000, 9000)]

    assert mss.sdr(expected, torch.cat(pieces, dim=1)) > 80

@pytest.mark.parametrize("piece", (evaluate.PIECE, 2000), ids=("at once", "in pieces"))
def test_mask_statistics_against_numpy(piece, monkeypatch):
    monkeypatch.setattr(evaluate, "PIECE", piece)
    mixture = noise(2, 9000, seed=1)
    source = noise(2, 9000, seed=2)

    statistics = evaluate.mask_statistics(mixture, {"vocals": source})["vocals"]

    count, above, *histogram = statistics
    M = (mss.stft(source) / mss.stft(mixture)).numpy().ravel()
    expected, _, _ = np.histogram2d(
        -M.imag, M.real, bins=evaluate.SIDE, range=[(-2, 2), (-2, 2)])
    assert count == M.size
    assert above == (abs(M) > 1).sum()
    assert abs(np.array(histogram) - expected.ravel()).sum() < 20     # on the edges of the cells

# ---- CUDA ---------------------------------------------------------------------------------------

# What is tested on a GPU is tested on the CPU, too, so that a wrong test is found where there is no
# GPU. Above, too, tests have the `device`: of rows, the published network, several processes, and
# evaluate.py's.

# TF32 rounds to 2^-11, bfloat16 to 2^-9, what layers give, too. On a CPU bfloat16 came to 49 dB;
# rounding what convolutions get as TF32 does, to 70 dB.
@pytest.mark.parametrize("device, bf16, decibels", [
    pytest.param("cpu", True, 40, id="cpu-bf16"),
    pytest.param("cuda", False, 55, id="cuda-TF32"),
    pytest.param("cuda", True, 40, id="cuda-bf16"),
], indirect=["device"])
def test_a_coarser_precision_changes_little(device, bf16, decibels, published, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    _, model, _ = mss.load_checkpoint(published, device)

    theirs, ours = theirs_and_ours(model, device, bf16)

    assert decibels < mss.sdr(theirs, ours) < 110                     # float32: 124

@pytest.mark.parametrize("script", (separate, evaluate))
def test_scripts_separate_in_float32_unless_told_otherwise(
        script, checkpoint, songs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    song = next(Path(songs).glob("test/*/mixture.flac"))
    words = {separate: [song, "-o", tmp_path], evaluate: ["--musdb", songs]}

    code, _, err = call(script.main, "-m", checkpoint, "-d", "cpu", *words[script])

    assert code == 0, err
    assert not torch.backends.cudnn.allow_tf32

def test_steps_of_training_may_round(songs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)

    train_well(*quick(songs, tmp_path, steps=1))

    assert torch.backends.cudnn.allow_tf32

@pytest.mark.parametrize("loss", train.LOSSES)
def test_a_loss_and_its_gradient_are_as_on_the_cpu(loss, device):
    targets = noise(1, 2, 2, 9000, seed=1)
    found = []
    for place in ("cpu", device):
        estimates = noise(1, 2, 2, 9000).to(place).requires_grad_()
        value = train.LOSSES[loss](estimates, targets.to(place))
        value.backward()
        found.append((value.item(), estimates.grad.cpu()))

    (expected, expected_gradient), (value, gradient) = found
    assert value == pytest.approx(expected, rel=1e-4)
    assert mss.sdr(expected_gradient, gradient) > 60

@pytest.mark.parametrize("device", ("cpu", "cuda", "cuda:0"), indirect=True)
def test_a_song_is_separated_as_on_the_cpu(device, checkpoint, tmp_path):
    song = tmp_path / "song.wav"
    mss.write_audio(song, noise(2, 3 * RATE), RATE)
    sizes = "--segment", 0.3, "--overlap", 0.1

    folder, _ = separate_song(checkpoint, song, *sizes)
    expected = check_stems(folder, song)
    folder, stdout = separate_song(
        checkpoint, song, *sizes, "--device", device, "--batch-size", 8)
    found = check_stems(folder, song)

    assert f"on {'cpu' if device == 'cpu' else 'cuda:0'}" in stdout
    assert mss.sdr(expected, found) > 60

@contextlib.contextmanager
def little_memory(device, model, windows):
    """So little memory meanwhile that one of the windows fits, but not all at once."""
    if device == "cpu":
        forward = model.forward

        def limited(x):
            if len(x) > len(windows) // 2:
                raise OUT_OF_MEMORY
            return forward(x)

        model.forward = limited
        yield
        return

    def needed(count):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        assert mss.separate_windows(model, windows[:count], False) is not None
        return torch.cuda.max_memory_reserved()

    limit = (needed(1) + needed(len(windows))) / 2                    # bytes
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

def test_memory_that_runs_out_is_survived_by_halving(device, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    _, model = small("UNet")
    model.eval().to(device)
    segment = {"cpu": 1 << 12, "cuda": 1 << 20}[device]               # samples: MB, or GB
    x = noise(2, 9 * segment)
    windows = x[:, :8 * segment].unflatten(1, (8, segment)).transpose(0, 1)

    alone = mss.separate_track(model, x, segment, overlap=0)
    with little_memory(device, model, windows):
        together = mss.separate_track(model, x, segment, overlap=0, batch_size=8)

    tried = re.findall(r"going on with (\d) x (\d+) samples", capsys.readouterr().err)
    assert tried and {int(samples) for _, samples in tried} == {segment}
    assert mss.sdr(alone, together) > 80                              # float32's rounding: 110

# ---- CUDA: training -----------------------------------------------------------------------------

def learn(songs, out, *words, **changes):
    """Train, at a rate at which each step counts, and log each -> the losses."""
    rates = dict(lr=0.01, warmup=1, log_every=1, validate_every=99, save_every=99)
    train_well(*quick(songs, out, **{**rates, **changes}), *words)
    return column(out, "loss")

def test_validation_leaves_it_to_others_how_cudnn_computes(device):
    cudnn = torch.backends.cudnn
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = True, True, False

    with train.eagerly():
        assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (False, True, False)

    assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (True, True, False)

@pytest.fixture(scope="session")
def plain_losses_of_three(songs, tmp_path_factory):
    """Three steps on the CPU."""
    return learn(songs, tmp_path_factory.mktemp("runs") / "three", steps=3)

@pytest.fixture
def repeatable():
    """The same bits again and again, on a GPU, too."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

def test_a_run_that_a_signal_stops_goes_on_as_if_it_had_not(
        device, repeatable, songs, tmp_path, monkeypatch):
    """With workers, which fork where CUDA is at work already."""
    step = train.train_step
    steps = []

    def interrupted(*words):
        steps.append(1)
        if len(steps) == 4:
            signal.raise_signal(signal.SIGTERM)
        return step(*words)

    words = quick(songs, tmp_path / "stopped", device=device, workers=2, lr=0.01, warmup=1,
                  validate_every=99)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)            # may be ignored here
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        code, stdout, _ = call(train.main, *words)
    signal.signal(signal.SIGTERM, before)
    resumed = train_well(*words)
    learn(songs, tmp_path / "straight", device=device)

    assert code == 143 and "stopped at step" in stdout and "resuming" in resumed
    assert 4 <= int(re.search(r"at step (\d)", resumed)[1]) < 8
    stopped, straight = (content(tmp_path / name / "last.pt") for name in ("stopped", "straight"))
    assert stopped["step"] == straight["step"] == 8
    assert equal(stopped["model"], straight["model"])

@pytest.mark.parametrize("words", (
    ["--bf16"], ["--checkpoint-blocks"], ["--accumulate", "2"], ["--ema", "0.9"],
    ["--bf16", "--checkpoint-blocks", "--accumulate", "2", "--ema", "0.9"],
), ids=" ".join)
def test_two_steps_are_as_on_the_cpu(words, device, plain_losses_of_three, songs, tmp_path):
    losses = learn(songs, tmp_path, *words, steps=2, device=device)

    # Accumulated parts are normalised by themselves.
    most = 0.2 if "--accumulate" in words else 0.02
    assert losses == pytest.approx(plain_losses_of_three[:2], rel=most)
    assert content(tmp_path / "last.pt")["step"] == 2
    assert math.isfinite(column(tmp_path, "valid_sdr_vocals")[0])

@pytest.mark.filterwarnings("error:RNN module weights")               # in pieces: cuDNN is slow
def test_an_lstm_and_its_average_learn_in_bf16(device, songs, tmp_path):
    losses = learn(
        songs, tmp_path, "--bf16", "--ema", "0.9", model="DPRNN", steps=2, device=device)

    assert np.isfinite(losses).all() and len(losses) == 2

def test_a_run_moves_to_the_cpu_and_back(device, plain_losses_of_three, songs, tmp_path):
    for place in (device, "cpu", device):
        losses = learn(songs, tmp_path, device=place, hours=1e-9)     # a step

    assert losses == pytest.approx(plain_losses_of_three, rel=0.05)
    states = content(tmp_path / "last.pt")["optimizer"]["state"].values()
    assert {float(state["step"]) for state in states} == {3}

def test_a_single_process_of_torchruns_learns_as_without(
        device, plain_losses_of_three, songs, tmp_path, monkeypatch):
    """With NCCL on a GPU."""
    launched = dict(RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=0)
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(train, "LAUNCHED", True)
    network_of = train.network_of
    networks = []

    def kept(*words):
        networks.append(network_of(*words))
        return networks[-1]

    monkeypatch.setattr(train, "network_of", kept)
    try:
        losses = learn(songs, tmp_path, steps=2, device=device)
    finally:
        if train.dist.is_initialized():
            train.dist.destroy_process_group()

    network, = networks
    kind = {"cpu": train.SyncBatchNorm, "cuda": nn.SyncBatchNorm}[device]
    assert isinstance(network, nn.parallel.DistributedDataParallel)
    assert {type(norm) for norm in batch_norms(network).values()} == {kind}
    assert losses == pytest.approx(plain_losses_of_three[:2], rel=0.02)

# The last test, for compiling takes longest on a GPU. On the CPU it is only traced.
def test_two_compiled_steps_are_as_others(device, songs, tmp_path, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    name = "Wave-U-Net-12"

    compiled = learn(
        songs, tmp_path / "compiled", "--compile", model=name, steps=2, device=device)

    plain = learn(songs, tmp_path / "plain", model=name, steps=2, device=device)
    assert compiled == pytest.approx(plain, rel=0.02)

# ---- docs/benchmark.py --------------------------------------------------------------------------

@pytest.fixture(scope="session")
def bench():
    """The script, as a module. pytest-benchmark has a fixture of the script's name."""
    place = HERE / "docs" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@pytest.fixture
def benchmark_args(songs, checkpoint):
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, cublas.allow_tf32
    yield types.SimpleNamespace(
        model=str(checkpoint), device="cpu", bf16=False, song=1.0, seconds=1.0, musdb=str(songs),
        workers=0, end=math.inf,
        train="--model UNetDecouple+ --width 2 --batch-size 1 --segment 0.2")
    cudnn.benchmark, cudnn.allow_tf32, cublas.allow_tf32 = before

@pytest.fixture
def ticking(bench, monkeypatch):
    """However fast the machine is, each look at the clock takes 1/8 s; convolutions, 1 TFLOP/s."""
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) / 8)
    monkeypatch.setattr(bench, "convolution_rate", lambda device, dtype: 1e12)

@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("backward", (False, True), ids=("forward", "backward"))
def test_lstms_are_counted(bench, backward):
    """Against what torch counts where it computes LSTMs by matrix products."""
    block = baselines.RecurrentBlock(features=12, hidden=10)
    x = noise(3, 50, 12).requires_grad_(backward)

    def work():
        with torch.set_grad_enabled(backward):
            y = block(x)
            if backward:
                y.sum().backward()

    with torch.backends.mkldnn.flags(enabled=True):
        ours = bench.count_flops(work)
    with torch.backends.mkldnn.flags(enabled=False):
        with bench.FlopCounterMode(display=False) as counter:
            work()

    # Going backward, products that nobody needs are left out there.
    theirs = counter.get_total_flops()
    assert theirs > 0
    assert ours == pytest.approx(theirs, rel=0.01)

def test_a_convolution_has_a_rate(bench):
    assert bench.convolution_rate(torch.device("cpu"), torch.float32) > 0

def test_a_row_of_separation_adds_up(bench, benchmark_args, ticking, monkeypatch):
    benchmark_args.song = 2.0                                         # one block
    monkeypatch.setattr(bench, "count_flops", lambda work: 50e9)

    row = bench.measure_separation(benchmark_args, "float32")

    # The clock is looked at four times: around the block, and around what comes after the last.
    assert row[:-1] == ("float32", "0.2", "0.125", "200", "1000: 20%")

def test_the_most_memory_is_counted_in_gib():
    peak = mss.peak_memory(torch.device("cpu"))

    if math.isnan(peak):
        pytest.skip("Windows does not tell")
    assert 0.05 < peak < 1000

@pytest.mark.parametrize("real", (False, True), ids=("noise", "songs"))
def test_a_row_of_training_is_measured(bench, benchmark_args, real, ticking):
    what = {**bench.BF16, "real": real}

    name, steps, _, _, wait, _, hours = bench.measure_training(benchmark_args, "bf16", what)

    assert float(steps) > 0
    assert wait.endswith("%") == real
    per_hour = 3600 * float(steps)
    expected = 300_000 * 16 / per_hour
    assert float(hours.split()[0].replace(",", "")) == pytest.approx(expected, rel=0.05)

def test_evaluation_is_timed(bench, ticking):
    seconds, _ = bench.measure_evaluation("here: SDR, ISR, SIR, SAR", 1)

    assert seconds == 1 / 8

def test_sections_print_tables(bench, benchmark_args, monkeypatch, capsys):
    monkeypatch.setattr(bench, "in_new_process", lambda function, *arguments: ("cell",) * 2)

    for section in (bench.separation, bench.training, bench.models):
        section(benchmark_args)

    printed = capsys.readouterr().out
    assert printed.count("### ") == 3
    assert printed.count("| cell | cell |") == 2 + 4 + len(mss.MODELS)

def test_networks_that_have_names_are_measured(bench, benchmark_args):
    seconds, cells = bench.measure_named(benchmark_args, "paper-small")

    assert seconds > 0
    assert cells[2] == "306,418"
    assert float(cells[3]) == pytest.approx(0.94, rel=0.05)           # the authors' figure
    assert all(float(cell) > 0 for cell in cells[4:])

def test_names_of_one_family_are_measured_once(bench):
    names = {name.removesuffix("-accompaniment") for name in mss.PUBLISHED}

    assert set(bench.NAMED) == names | {"bundled"}
    config, _, _ = mss.load_checkpoint(HERE / "weights" / "vocals.pt")
    assert bench.NAMED["bundled"] == config

def test_the_loader_is_measured(bench, benchmark_args, capsys, ticking):
    bench.loader(benchmark_args)

    cells = capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]
    assert len(cells) == 3
    assert all(float(cell) > 0 for cell in cells)

def test_overlaps_are_compared_with_the_whole(bench, benchmark_args, tmp_path, capsys):
    benchmark_args.musdb = train.synthetic_musdb(tmp_path, songs=(("valid", 1),), seconds=9)

    bench.overlap(benchmark_args)

    rows = capsys.readouterr().out.splitlines()[-len(bench.OVERLAPS):]
    cells = [row.split("|")[1:-1] for row in rows]
    assert [float(shared) for shared, *_ in cells] == list(bench.OVERLAPS)
    assert all(0 < float(ratio) < 200 for _, *ratios, _ in cells for ratio in ratios)
    work = [float(more.strip(" %")) for *_, more in cells]
    assert work == sorted(work)

# Its tables for a GPU, on the CPU.

@pytest.fixture
def known_rates(bench, monkeypatch):
    """Matrix products are twice as fast as the convolutions of `ticking`."""
    monkeypatch.setattr(bench, "matmul_rate", lambda device, dtype: 2e12)

def test_each_rate_is_measured_once_for_each_precision(
        bench, benchmark_args, monkeypatch, capsys):
    measured = []

    def what(device, dtype):
        measured.append(dtype)
        return 3e12

    monkeypatch.setattr(bench, "RATES", {"of all": (what, 1e12)})
    for _ in range(2):
        bench.rates(benchmark_args)

    assert capsys.readouterr().out.count("| of all | 3.0 | 3.0 | 3.0 |") == 2
    assert measured == [torch.float32, torch.float32, torch.bfloat16]

def test_products_and_copies_have_rates(bench, benchmark_args):
    device = torch.device("cpu")

    assert bench.matmul_rate(device, torch.float32) > 0
    assert bench.copy_rate(device, torch.bfloat16) > 0

@pytest.mark.parametrize("name", ("bfloat16", "bfloat16, songs", "TF32", "float32",
                                  "bfloat16, --checkpoint-blocks"))
def test_steps_are_measured(bench, benchmark_args, known_rates, ticking, name):
    benchmark_args.train += " --batch-size 2"

    cells = bench.measure_steps(benchmark_args, bench.STEPS[name])

    per_second, segments, tera, of_a_convolution, of_a_product, wait, _, hours = cells
    assert float(segments) == pytest.approx(2 * float(per_second), abs=0.1)
    assert float(hours.split()[0].replace(",", "")) == pytest.approx(
        300_000 * 8 / 3600 / float(per_second), rel=0.05)
    assert float(tera) > 0
    assert wait.endswith("%") == ("songs" in name)

def test_the_flop_of_a_step_are_those_of_its_batch(bench, benchmark_args):
    one = bench.TimedTraining(benchmark_args, bench.BASE).flops
    benchmark_args.train += " --batch-size 4 --accumulate 2"
    four = bench.TimedTraining(benchmark_args, bench.BASE).flops

    assert four == 4 * one

def test_what_was_read_ahead_is_not_counted_as_speed(bench, benchmark_args, ticking):
    steps = bench.TimedTraining(benchmark_args, bench.BASE)
    steps.options.workers = 3
    steps.real = True
    taken = []
    steps.step = lambda: taken.append("step")
    steps.batches = train.Timed(taken.append("ahead") for _ in itertools.count())

    seconds, _ = steps.time(at_least=0.5)

    # A step for each worker to begin with. Each step, and all that are timed, take 1/8 s by that
    # clock: 4 of them are meant to.
    assert taken == ["step"] + 6 * ["ahead"] + (3 + 4) * ["step"]
    assert seconds == 1 / 8 / 4

def test_windows_at_once_are_measured(
        bench, benchmark_args, known_rates, ticking, monkeypatch):
    config, model = small()
    model.blocks = 20 * model.stride, 4 * model.stride                # starts 16 apart
    monkeypatch.setattr(bench, "network", lambda name, device: model)
    monkeypatch.setattr(bench, "SIZES", (1, 2))
    monkeypatch.setattr(bench, "count_flops", lambda work: 50e9)

    cells = bench.measure_windows(benchmark_args, "small", "bfloat16", (1, 2))

    # Two windows and the last one, 150 GFLOP in all, in 1/8 s.
    seconds = (2 * 16 + 20) * model.stride / config.sample_rate
    one, two, factor, tera, of_a_convolution, of_a_product = cells
    assert int(one.split(";")[0]) == int(two.split(";")[0]) == round(125 * 60 / seconds)
    assert float(factor) == pytest.approx(0.125 / seconds, abs=1e-5)
    assert float(tera) == 1.2
    assert (of_a_convolution, of_a_product) == ("120%", "60%")

def test_parts_of_the_devices_time(bench):
    x = noise(1, 8, 200, 200)
    convolution = torch.nn.Conv2d(8, 32, 5)

    _, busy, convolutions, norms, stft, copies = bench.profiled(
        lambda: convolution(x), torch.device("cpu"))

    assert float(busy) > 0
    assert 50 < float(convolutions.strip("%")) <= 100
    assert norms == stft == copies == "0.0%"

def test_the_time_of_networks_and_steps_is_divided_up(bench, benchmark_args, capsys):
    bench.profiles(benchmark_args)

    rows = [line.split("|")[2:-1] for line in capsys.readouterr().out.splitlines()[-2:]]
    for _, _, *parts in rows:
        shares = [float(part.strip(" %")) for part in parts]
        assert all(share > 0 for share in shares[:-1]) and sum(shares) < 100

def test_a_row_that_fails_says_why(bench, benchmark_args):
    def measure(args, number):
        raise torch.OutOfMemoryError(f"CUDA out of memory.\nTried | {number} GiB")

    cells = bench.attempt(benchmark_args, 0, measure, 7)

    assert cells == ("failed: OutOfMemoryError: CUDA out of memory. Tried / 7 GiB",)

def test_a_row_that_would_end_too_late_is_not_begun(bench, benchmark_args, capsys):
    benchmark_args.end = time.monotonic() + 10

    assert bench.attempt(benchmark_args, 60, pytest.fail) == (
        "not measured: out of --limit",)
    assert bench.attempt(benchmark_args, 1, lambda args: ("fast",)) == ("fast",)

def test_tables_for_a_gpu_are_printed(bench, benchmark_args, monkeypatch, capsys):
    monkeypatch.setattr(bench, "attempt", lambda *arguments: ("cell",))
    benchmark_args.model = None

    for section in bench.ON_CUDA:
        section(benchmark_args)

    printed = capsys.readouterr().out
    assert printed.count("### ") == 6
    rows = 3 + len(bench.STEPS) + 4 * 3 + 5 + 3
    assert len(re.findall(r"^\| \S.* \| cell ", printed, re.MULTILINE)) == rows

@pytest.mark.parametrize("device, tables", (("cpu", "ON_CPU"), ("cuda:0", "ON_CUDA")))
def test_a_gpu_has_tables_of_its_own(bench, songs, monkeypatch, capsys, device, tables):
    measured = []
    for name in ("ON_CPU", "ON_CUDA"):
        def section(args, name=name):
            measured.append((name, args))

        monkeypatch.setattr(bench, name, (section,))
    monkeypatch.setattr(mss, "pick_device", lambda name: torch.device(device))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    bench.main(["--musdb", str(songs)])

    (name, args), = measured
    assert name == tables
    assert (args.train == "") == (args.limit < 300) == (device == "cuda:0")

# ---- What the project promises its readers ------------------------------------------------------

def test_equations_stand_at_their_lines():
    found = set()
    for line in (HERE / "mss.py").read_text(encoding="utf-8").splitlines():
        code, _, comment = line.partition("#")
        if code.strip():
            found.update(re.findall(r"eq\. (\d)", comment))

    assert found >= set("23456789")

PAGES = ("README.md", "docs/manual.md", "docs/results.md", "weights/README.md")

def code_blocks(page, language):
    text = (HERE / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)

def commands(page):
    """(script, arguments) of each command of a page that runs a script of ours."""
    found = []
    for block in code_blocks(page, "sh"):
        for command in block.replace("\\\n", " ").splitlines():
            command = command.split(" #")[0]
            found += re.findall(r"(?:python3?|torchrun)\b[^;&]*?(\S+\.py)([^;&]*)", command)
    return found

def script_help(script, bench):
    mains = {"train.py": train.main, "separate.py": separate.main, "evaluate.py": evaluate.main,
             "docs/benchmark.py": bench.main}
    if script in mains:
        return call(mains[script], "--help")[1]
    return (HERE / script).read_text(encoding="utf-8")                # some import foreign packages

@pytest.mark.parametrize("page", PAGES)
def test_commands_are_of_scripts_and_flags_that_exist(page, bench):
    found = commands(page)

    assert found
    for script, arguments in found:
        assert (HERE / script).is_file(), script
        help_text = script_help(script, bench)
        for flag in re.findall(r"(?<=\s)(--?[a-z][\w-]*)", arguments):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", help_text), f"{script} has no {flag}"

def test_the_readme_runs_all_scripts():
    scripts = {script for script, _ in commands("README.md")}

    assert scripts >= {"train.py", "separate.py", "evaluate.py"}

@pytest.mark.parametrize("script", ("train.py", "separate.py", "evaluate.py"))
def test_the_manual_explains_every_flag(script, bench):
    manual = (HERE / "docs" / "manual.md").read_text(encoding="utf-8")
    help_text = script_help(script, bench)
    flags = set(re.findall(r"^\s+(?:-\w[ ,].*)?(--[a-z][\w-]*)", help_text, re.MULTILINE))

    missing = {flag for flag in flags - {"--help"} if f"`{flag}" not in manual}

    assert len(flags) > 10 and not missing

def test_the_readmes_lines_of_python_run(songs, tmp_path, monkeypatch):
    block, = code_blocks("README.md", "python")
    monkeypatch.chdir(tmp_path)
    track, = mss.musdb_tracks(songs, "test")
    mss.write_audio("song.wav", track.load("mixture"), RATE)

    exec(block.replace('"paper"', '"default"'), {})

    assert mss.read_audio("vocals.wav")[0].shape == (2, track.frames)

@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (HERE / page).read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)

    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (HERE / page).parent / path if path else HERE / page
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, target
