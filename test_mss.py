"""Fast tests: no downloads, no GPU. python -m pytest -q test_mss.py

Real data and the published network's fixture are used where the environment variable MSS_TEST_DATA names their folder.
"""
import ast
import base64
import contextlib
import csv
import dataclasses
import hashlib
import http.server
import io
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn as nn

import evaluate
import mss
import separate
import train

mss.keep_memory()
HERE = Path(__file__).parent
RATE = 44100
TABLE_3 = ("UNetPhase", "UNet", "UNetDecouple", "UNetDecouple+", "ResUNet", "ResUNetDecouple", "ResUNetDecouple+")
RELATIVES = ("Wave-U-Net", "Wave-U-Net-12", "DPRNN", "PM-Unet", "PM-Unet-conv")
SMALL = dict(window=256, hop=64, width=2)       # the same code on 129 bins: milliseconds
needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="the program ffmpeg is not on PATH")

def data(name):
    """A folder of real data, or skip."""
    root = os.environ.get("MSS_TEST_DATA")
    if not root or not Path(root, name).exists():
        pytest.skip(f"MSS_TEST_DATA holds no {name}")
    return Path(root, name)

def small(name="UNetDecouple+", **changes):
    torch.manual_seed(0)
    window = 512 if name.startswith("PM") else 256                    # whose bins are pooled by 4 to the 4
    config = mss.Config(model=name, **{**SMALL, "window": window, **changes})
    return config, mss.MODELS[name](config)

def noise(*shape, seed=0, scale=0.1):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

@pytest.fixture(scope="session")
def songs(tmp_path_factory):
    """The built-in data, small: 3 + 1 + 1 songs of 3 s."""
    return train.synthetic_musdb(tmp_path_factory.mktemp("data") / "songs",
                                 songs=(("train", 3), ("valid", 1), ("test", 1)), seconds=3)

@pytest.fixture
def checkpoint(tmp_path):
    config, model = small()
    mss.save_checkpoint(tmp_path / "small.pt", config, model, step=7)
    return tmp_path / "small.pt"

def call(main, *argv):
    """Run a script's main as its command line would -> (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in train.SIGNALS}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        mss.run(lambda: main([str(word) for word in argv]))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return stop.value.code, out.getvalue(), err.getvalue()

def fails(main, *argv, saying):
    """The call must exit with code 2 and one line on stderr that holds every word of `saying`."""
    code, out, err = call(main, *argv)
    lines = [line for line in err.splitlines() if not line.startswith("notice: ")]
    assert code == 2 and len(lines) == 1, (code, err)
    assert all(word in err for word in saying), err

# ---- The network -----------------------------------------------------------------------------------------------------

def test_table_3_is_the_papers():
    assert tuple(mss.MODELS)[:7] == TABLE_3
    parameters = {"UNet": 18_127_812, "UNetDecouple+": 18_128_010, "ResUNet": 102_571_080,
                  "ResUNetDecouple": 102_571_212, "ResUNetDecouple+": 102_571_278}
    maps = dict(zip(TABLE_3, (4, 2, 6, 8, 2, 6, 8)))
    for name in TABLE_3:
        with torch.device("meta"):
            model = mss.MODELS[name](mss.Config(model=name))
        convolutions = sum(isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and "shortcut" not in path
                           for path, module in model.backbone.named_modules())
        assert convolutions + 1 == (143 if "Res" in name else 33)     # the heads are the last one
        assert sum(head.out_channels for head in model.heads.values()) == maps[name]
        assert name not in parameters or sum(p.numel() for p in model.parameters()) == parameters[name]

def test_relatives_are_as_large_as_published():
    """Of Wave-U-Net-12 the stereo M4; of DPRNN its body as in asteroid, on stereo spectrograms of 1025 bins."""
    two, four = ("vocals", "accompaniment"), mss.SOURCES
    for name, targets, parameters in (
            ("Wave-U-Net", four, 21_599_811), ("Wave-U-Net-12", two, 10_263_390), ("DPRNN", two, 4_692_105),
            ("DPRNN", ("vocals",), 4_675_593), ("PM-Unet", four, 53_674_992), ("PM-Unet-conv", four, 41_605_872)):
        with torch.device("meta"):
            model = mss.MODELS[name](mss.Config(model=name, targets=targets))
        assert sum(p.numel() for p in model.parameters()) == parameters, name
    assert tuple(mss.MODELS)[7:] == RELATIVES and set(train.RECIPES) == set(mss.MODELS)

@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A file with the published weights' keys and shapes, and made-up values."""
    script = data("published_resunet143") / "make_checkpoint.py"
    path = tmp_path_factory.mktemp("published") / "resunet143_ismir2021_accompaniment_16.8dB_350k_steps.pth"
    subprocess.run([sys.executable, script, path], check=True)
    yield path
    path.unlink()

def test_published_network(published):
    config, model, state = mss.load_checkpoint(published)
    assert config.targets == ("accompaniment",) and state["step"] == 350_000
    fixture = np.load(data("published_resunet143") / "fixture.npz")
    assert np.abs(fixture["y"]).max() > 0.1
    for network in (model, mss.fold_batch_norms(model)):
        with torch.inference_mode():
            y = network(torch.from_numpy(fixture["x"]))[:, 0].numpy()
        assert np.abs(y - fixture["y"]).max() < 2e-6

@pytest.mark.parametrize("name", TABLE_3 + RELATIVES)
def test_every_row(name, tmp_path):
    config, model = small(name, targets=("vocals", "accompaniment" if name in RELATIVES else "drums"))
    with torch.inference_mode():
        for length in (0, 1, 2, 127, 128, 129, 4000, 4097):
            assert model.eval()(noise(1, 2, length)).shape == (1, 2, 2, length)
    for mixture in (noise(2, 2, 3000), torch.zeros(2, 2, 3000)):
        model.train().zero_grad()
        (model(mixture) - torch.tensor([0.3, -0.3]).view(2, 1, 1)).abs().mean().backward()
        for path, parameter in model.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), path
            assert parameter.grad.any() or not mixture.any(), path
    batch_norm = nn.modules.batchnorm._BatchNorm
    norms = [(path, module) for path, module in model.named_modules() if isinstance(module, batch_norm)]
    for _, norm in norms:                                             # as if trained
        for values in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            values.uniform_(0.5, 1.5)
    mss.save_checkpoint(tmp_path / "model.pt", config, model, step=3)
    config_read, read, state = mss.load_checkpoint(tmp_path / "model.pt")
    assert config_read == config and state == {"step": 3} and not read.training
    assert equal(model.state_dict(), read.state_dict())
    with torch.inference_mode():
        plain, folded = model.eval()(x := noise(2, 2, 3000)), mss.fold_batch_norms(read)(x)
    assert plain.abs().max() > 0.005 and mss.sdr(plain, folded) > 80
    left = [path for path, module in read.named_modules() if isinstance(module, batch_norm)]
    expected = 0 if name in RELATIVES else 1 + 17 * 4 + 6 if "Res" in name else 1
    assert len(left) == expected and not any(path.endswith("bn2") for path in left)

def test_only_the_backbone_runs_in_bf16():
    config, model = small("ResUNetDecouple+")
    seen, x = {}, noise(1, 2, 3000)
    for name, module in {**model.heads, "backbone": model.backbone.encoders[0][0].conv1}.items():
        module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: o.dtype}))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        y = model.eval()(x)
    assert seen.pop("backbone") == torch.bfloat16 and set(seen.values()) == {torch.float32} and y.dtype == torch.float32
    with torch.inference_mode():
        assert mss.sdr(model(x), y) > 20

# ---- Spectrograms and heads, against angles computed by numpy --------------------------------------------------------

def spectrogram(seed, *shape):
    return torch.complex(noise(*shape, seed=seed, scale=1), noise(*shape, seed=seed + 1, scale=1))

def test_stft_is_the_textbooks_and_istft_inverts_it():
    x = noise(2, 44101, scale=1)
    X = mss.stft(x).numpy()
    padded = np.pad(x.numpy().astype("float64"), [(0, 0), (1024, 1024)], mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(2048) / 2048)
    frames = np.stack([padded[:, t:t + 2048] for t in range(0, padded.shape[1] - 2047, 441)], axis=1)
    assert X.shape == (2, 101, 1025)
    np.testing.assert_allclose(X, np.fft.rfft(frames * hann), atol=2e-4)
    for length in (0, 1, 2, 3, 441, 1023, 1024, 1025, 1027, 44101):
        x = noise(1, 2, length)
        y = mss.istft(mss.stft(x), length)
        assert y.shape == x.shape and torch.allclose(x, y, rtol=0, atol=1e-6)

def test_rules_against_angles():
    X = spectrogram(0, 1, 1, 2, 30, 40)
    mask, q, p_r, p_i = (noise(1, 1, 2, 30, 40, seed=k, scale=2) for k in range(5, 9))
    X[..., :3] = 0                                                    # silent bins
    p_r[..., 5], p_i[..., 5] = 0, 0                                   # no direction at all: nothing comes out
    x = X.numpy().astype("complex128")
    sigmoid = 1 / (1 + np.exp(-mask.numpy().astype("float64")))
    angle = np.arctan2(p_i.numpy(), p_r.numpy())
    turn = np.exp(1j * (np.angle(x) + angle)) * ((p_r != 0) | (p_i != 0)).numpy()
    magnitude = np.maximum(sigmoid * np.abs(x) + q.numpy(), 0) * (x != 0)
    length = np.hypot(p_r.numpy(), p_i.numpy())
    for ours, expected in (
            (mss.magnitude_mask(X, mask), sigmoid * np.abs(x) * np.exp(1j * np.angle(x))),
            (mss.complex_mask(X, p_r, p_i), np.tanh(length) * np.abs(x) * turn),
            (mss.decouple(X, mask, p_r, p_i), sigmoid * np.abs(x) * turn),
            (mss.decouple_plus(X, mask, q, p_r, p_i), magnitude * turn)):
        np.testing.assert_allclose(ours.numpy(), expected, atol=2e-5)

def test_only_decouple_plus_exceeds_the_mixture_and_so_can_be_ideal():
    X, S = spectrogram(0, 1, 1, 2, 30, 40), spectrogram(3, 1, 1, 2, 30, 40)
    heads = [noise(*X.shape, seed=k, scale=30) for k in range(5, 9)]
    for rule, names in ((mss.magnitude_mask, 1), (mss.complex_mask, 2), (mss.decouple, 3)):
        assert (rule(X, *heads[:names]).abs() <= X.abs() * (1 + 1e-5)).all()
    M, mask = S / X, noise(*X.shape, seed=5)
    q = S.abs() - torch.sigmoid(mask) * X.abs()
    torch.testing.assert_close(mss.decouple_plus(X, mask, q, M.real, M.imag), S, atol=1e-5, rtol=0)
    assert (S.abs() > 2 * X.abs()).any()

# ---- Audio files and resampling --------------------------------------------------------------------------------------

def test_resample_lengths_and_streaming():
    for rate_in, rate_out in ((48000, 44100), (44100, 48000), (8000, 44100), (96000, 44100), (100, 83)):
        for n in (0, 1, 2, 159, 160, 161, 5000):
            assert mss.resample(noise(2, n), rate_in, rate_out).shape == (2, -(-n * rate_out // rate_in))
    x = noise(2, 300_000)
    blocks = torch.cat(list(mss.resample_blocks(x.split(7777, dim=-1), 48000, 44100)), dim=-1)
    assert torch.equal(blocks, mss.resample(x, 48000, 44100))

@pytest.mark.parametrize("rate_in, rate_out", [(48000, 44100), (44100, 48000)])
def test_resample_rejects_100_dB(rate_in, rate_out):
    """Tones up to 20 kHz pass, without delay and without images; those from the lower Nyquist frequency on do not."""
    t, time_out = np.arange(rate_in) / rate_in, np.arange(rate_out) / rate_out
    for frequency in (100, 9000, 20_000, 22_050, 23_000, 23_999):
        tone = mss.resample(torch.from_numpy(np.sin(2 * np.pi * frequency * t)).float()[None], rate_in, rate_out)[0]
        wanted = np.sin(2 * np.pi * frequency * time_out) if frequency <= 20_000 else 1
        error = (tone.numpy() - wanted if frequency <= 20_000 else tone.numpy())[5000:-5000]
        assert frequency > 20_000 and rate_in < rate_out or 10 * np.log10((error ** 2).mean()) < -100, frequency

def test_audio_files(tmp_path):
    audio = noise(2, 1000)
    for name, tolerance in (("a b (1) ü.wav", 0), ("x.flac", 2e-5)):
        mss.write_audio(tmp_path / name, audio, RATE)
        read, rate = mss.read_audio(tmp_path / name)
        assert rate == RATE and read.dtype == torch.float32 and (read - audio).abs().max() <= tolerance
        part, _ = mss.read_audio(tmp_path / name, 300, 50)
        assert torch.equal(part, read[:, 300:350])
        assert mss.read_audio(tmp_path / name, 990, 50)[0].shape == (2, 10)
    mss.write_audio(tmp_path / "empty.wav", audio[:, :0], RATE)
    assert mss.read_audio(tmp_path / "empty.wav")[0].shape == (2, 0)
    with pytest.raises(mss.UserError, match="NaN"):
        mss.write_audio(tmp_path / "nan.wav", audio / 0 * 0, RATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b (1) ü.wav", "empty.wav", "x.flac"]

@needs_ffmpeg
def test_ffmpeg_reads_the_rest(tmp_path):
    mss.write_audio(tmp_path / "tone.wav", noise(2, RATE), RATE)
    subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "tone.wav", tmp_path / "tone.m4a"], check=True)
    audio, rate = mss.read_audio(tmp_path / "tone.m4a")
    assert rate == RATE and abs(audio.shape[1] - RATE) < 2100
    (tmp_path / "broken.m4a").touch()
    with pytest.raises(mss.UserError, match="neither by soundfile nor by ffmpeg"):
        mss.read_audio(tmp_path / "broken.m4a")

# ---- Data ------------------------------------------------------------------------------------------------------------

def test_musdb_tracks(songs, tmp_path, monkeypatch):
    tracks = mss.musdb_tracks(songs, "train")
    assert [track.name for track in tracks] == [f"Synthetic - Song {i}" for i in range(3)]
    assert (tracks[0].frames, tracks[0].sample_rate, tracks[0].channels) == (3 * RATE, RATE, 2)
    stems = {name: tracks[0].load(name, 1000, 500) for name in mss.SOURCES}
    accompaniment = stems["bass"] + stems["drums"] + stems["other"]
    assert torch.equal(tracks[0].load("accompaniment", 1000, 500), accompaniment)
    assert (tracks[0].load("mixture", 1000, 500) - accompaniment - stems["vocals"]).abs().max() < 1e-4
    root = tmp_path / "musdb"                                         # no valid/: official titles, no mixture: a sum
    for name in ("A - B", mss.VALID[0]):
        shutil.copytree(songs / "train" / tracks[0].name, root / "train" / name)
        (root / "train" / name / "mixture.flac").unlink()
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "__MACOSX").mkdir()
    assert [track.name for track in mss.musdb_tracks(root, "train")] == ["A - B"]
    (track,) = mss.musdb_tracks(root, "valid")
    assert track.name == mss.VALID[0] and len(mss.VALID) == len(set(mss.VALID)) == 14
    assert (track.load("mixture") - sum(track.load(name) for name in mss.SOURCES)).abs().max() < 1e-6

def test_wrong_roots_are_named(songs, tmp_path, capsys):
    assert len(mss.musdb_tracks(songs / "train", "train")) == 3 and "notice: " in capsys.readouterr().err
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for root, subset, words in ((tmp_path / "absent", "train", ("absent", "no folder")),
                                (tmp_path / "empty", "train", ("Artist - Title", "empty folder")),
                                (tmp_path / "empty", "test", ("test/Artist", "found train")),
                                (tmp_path / "empty", "valid", ("valid/", "14 validation songs"))):
        with pytest.raises(mss.UserError) as error:
            mss.musdb_tracks(root, subset)
        assert all(word in str(error.value) for word in words), error.value

def test_bad_songs_are_named(songs, tmp_path):
    song = tmp_path / "root" / "train" / "Bad - Song"
    for harm, words in ((lambda drums: drums.unlink(), ("drums.wav expected", "bass.flac")),
                        (lambda drums: mss.write_audio(drums, noise(2, 500), RATE), ("one length", "drums.flac 500 ")),
                        (lambda drums: mss.write_audio(drums, noise(2, 3 * RATE), 48000), ("48000 Hz",)),
                        (lambda drums: drums.write_bytes(b"not audio"), ("drums.flac",)),
                        (lambda drums: mss.write_audio(drums, noise(3, 500), RATE), ("1 or 2 channels", "found 3"))):
        shutil.rmtree(song, ignore_errors=True)
        harm(shutil.copytree(songs / "train" / "Synthetic - Song 0", song) / "drums.flac")
        fails(train.main, "--musdb", tmp_path / "root", "--out", tmp_path / "out", saying=("Bad - Song", *words))
        assert not (tmp_path / "out").exists()

@needs_ffmpeg
def test_stem_mp4(tmp_path):
    root, song = data("musdb_samples"), tmp_path / "cache" / "train" / "Music Delta - 80s Rock"
    mss.musdb_tracks(root, "train", cache=tmp_path / "cache")
    assert {soundfile.info(path).subtype for path in song.iterdir()} == {"PCM_16"} and len(list(song.iterdir())) == 5
    before = os.stat(song / "bass.wav").st_mtime_ns
    mss.musdb_tracks(root, "train", cache=tmp_path / "cache")
    assert os.stat(song / "bass.wav").st_mtime_ns == before           # decoded once

def test_stem_mp4_without_ffmpeg(tmp_path, monkeypatch):
    (song := tmp_path / "root" / "test" / "A - B.stem.mp4").parent.mkdir(parents=True)
    song.touch()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(mss.UserError, match="A - B.stem.mp4.*ffmpeg"):
        mss.musdb_tracks(tmp_path / "root", "test")
    assert not (tmp_path / "root-wav" / "test" / "A - B").exists()

def test_segments_are_a_pure_function_of_seed_and_index(songs):
    tracks, config = mss.musdb_tracks(songs, "train"), mss.Config(targets=("vocals",))
    segments, again = (mss.Segments(tracks, config, 0.5, augment=tuple(mss.AUGMENTATIONS), seed=1) for _ in range(2))
    first = [segments[i] for i in range(8)]
    assert all(torch.equal(a, b) for i in (3, 1, 0, 2, 7, 6, 5, 4) for a, b in zip(again[i], first[i]))
    assert first[0][0].shape == (2, RATE // 2) and first[0][1].shape == (1, 2, RATE // 2)
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], mss.Segments(tracks, config, seconds=0.5, seed=2)[0][0])
    with pytest.raises(mss.UserError, match="22050 Hz expected, found 44100 Hz"):
        mss.Segments(tracks, mss.Config(sample_rate=22050))

@pytest.mark.parametrize("name", mss.AUGMENTATIONS)
def test_augmentations(name):
    """What each must keep and what it must change, in 200 draws; rows of x are told apart by their numbers."""
    _, function = mss.AUGMENTATIONS[name]
    x = torch.arange(1.0, 20_001).repeat(2, 1)
    x[1] += 0.5
    if name in ("pitch", "speed"):                                    # a sine in each channel
        t = torch.arange(RATE) / RATE
        x = torch.stack([torch.sin(2 * torch.pi * f * t) for f in (441.0, 882.0)])
    before = x.clone()
    outputs = [function(x, np.random.default_rng(seed)) for seed in range(200 if len(x[0]) < RATE else 20)]
    again = function(x, np.random.default_rng(7))
    assert torch.equal(outputs[7], again) and all(y.shape[0] == 2 and torch.isfinite(y).all() for y in outputs)
    assert torch.equal(x, before)
    for length in (0, 1, 100):                                        # of a very short song
        assert function(x[:, :length], np.random.default_rng(0)).shape[1] <= length * 1.25 + 1
    if name in ("pitch", "speed"):
        assert all(y.shape == x.shape for y in outputs) or name == "speed"
        peaks = [torch.fft.rfft(y[:, 4096:24576] * torch.hann_window(20480)).abs().argmax(1) * RATE / 20480
                 for y in outputs]
        factors = [RATE / y.shape[1] if name == "speed" else peak[0].item() / 441 for y, peak in zip(outputs, peaks)]
        low, high = (0.8, 1.3) if name == "speed" else (0.75, 1.34)
        assert low - 0.01 < min(factors) < low + 0.1 and high - 0.1 < max(factors) < high + 0.01
        for factor, y, peak in zip(factors, outputs, peaks):          # both channels' pitch, and the level
            assert (peak - factor * torch.tensor([441, 882])).abs().max() < 3
            assert 0.6 < y[:, 4096:24576].square().mean().sqrt() < 0.8
        left, right = function(torch.stack([-0.5 * x[0], x[0]]), np.random.default_rng(7))    # a panned source stays
        assert (left + 0.5 * right).abs().max() < 1e-3 and right.abs().max() > 0.8
    elif name == "shift":                                             # a later excerpt
        starts = [int(y[0, 0]) - 1 for y in outputs]
        assert all(torch.equal(y, x[:, start:]) for y, start in zip(outputs, starts))
        assert 0 <= min(starts) < 500 and 7700 < max(starts) <= 8192
    elif name in ("swap", "flip"):
        assert all(torch.equal(y, {"swap": x.flip(0), "flip": -x}[name]) for y in outputs)
    elif name == "gain":
        gains = [(y / x).unique() for y in outputs]
        assert all(gain.max() - gain.min() < 1e-6 for gain in gains)
        assert 0.25 <= min(gain.min() for gain in gains) < 0.3 and 1.2 < max(gain.max() for gain in gains) < 1.2501
    elif name == "mono":
        assert {float(y[0, 0]) for y in outputs} == {1.0, 1.5} and all(torch.equal(y[0], y[1]) for y in outputs)
    else:                                                             # "mask", "reverse": one part, in both channels
        lengths, starts = [], []
        for y in outputs:
            changed = (y != x).nonzero()[:, 1]
            lengths.append(len(changed) and int(changed.max() - changed.min()) + 1)
            starts.append(int(changed.min()))
            part = slice(int(changed.min()), int(changed.max()) + 1) if lengths[-1] else slice(0)
            assert torch.equal(y[:, part], torch.zeros_like(x)[:, part] if name == "mask" else x[:, part].flip(1))
        low, high = (0, 20_000) if name == "mask" else (4000, 8000)   # a reversed part of odd length has a middle
        assert low <= min(lengths) < low + 300 and high - 300 < max(lengths) <= high
        assert min(starts) < 2000 and max(starts) > 12_000
        long = [int(function(torch.ones(2, 200_000), np.random.default_rng(k)).eq(0).sum()) // 2 for k in range(20)]
        assert name == "reverse" or 80_000 < max(long) <= 88_200      # 2 s

def test_how_often_and_on_what_augmentations_work(monkeypatch):
    expected = dict(shift=0.5, pitch=0.2, speed=0.2, swap=0.5, flip=0.5, gain=1, mask=0.1, mono=0.1, reverse=0.2)
    lengths = {name: [] for name in expected}
    def counting(name):
        def function(x, rng):
            lengths[name].append(x.shape[1])
            return x
        return mss.AUGMENTATIONS[name][0], function
    for name in expected:
        monkeypatch.setitem(mss.AUGMENTATIONS, name, counting(name))
    track = Constant(1)
    track.frames = 20_000
    segments = mss.Segments([track], mss.Config(), seconds=10 / RATE, mix_audio=1, augment=[*expected][::-1])
    for i in range(500):
        segments[i]
    for name, often in expected.items():                              # of vocals; of both sources; before and after
        assert abs(len(lengths[name]) / (500 if name in ("pitch", "reverse") else 1000) - often) < 0.06, name
        assert set(lengths[name]) == {13 + 8192 if name in ("shift", "pitch", "speed") else 10}, name     # the cut

def test_stretch_at_every_length():
    for frames in (1, 101, 301):
        for percent in range(75, 134):
            length = 512 * (frames - 1)
            y = mss.baselines.stretch(torch.zeros(1, length), percent)
            assert length * percent // 100 <= y.shape[1] <= length * percent / 100 + 3072, (frames, percent)

class Constant:
    """A track whose every source is one number per (track, source), so that sums tell what was drawn."""
    name, frames, sample_rate, channels = "constant", 20, 44100, 2
    def __init__(self, value):
        self.value, self.drawn = value, []
    def load(self, source, start, frames):
        self.drawn.append((source, start))
        return torch.full((2, min(frames, self.frames - start)), float(self.value))

PAIR, FOUR = {"vocals": 2, "accompaniment": 2}, {"vocals": 2, "bass": 1, "drums": 2, "other": 2}

@pytest.mark.parametrize("target, per_source",
                         [("vocals", PAIR), ("accompaniment", PAIR), ("bass", FOUR), ("other", FOUR)])
def test_random_remix_and_mix_audio(target, per_source):
    tracks = [Constant(1), Constant(100)]
    segments = mss.Segments(tracks, mss.Config(targets=(target,)), seconds=10 / RATE)
    mixture, targets = segments[0]
    drawn = [source for track in tracks for source, _ in track.drawn]
    assert {name: drawn.count(name) for name in drawn} == per_source
    assert mixture[0, 0] == sum(track.value * len(track.drawn) for track in tracks)
    assert targets[0, 0, 0] == sum(track.value * [s for s, _ in track.drawn].count(target) for track in tracks)
    for i in range(200):
        segments[i]
    assert {start for track in tracks for _, start in track.drawn} == set(range(11))      # every position to the last
    assert 0.45 < len(tracks[0].drawn) / sum(len(track.drawn) for track in tracks) < 0.55     # both songs equally
    mixture, _ = mss.Segments([Constant(1)], mss.Config(), seconds=30 / RATE, mix_audio=1)[0]
    assert mixture.shape == (2, 30) and (mixture[:, :20] == 2).all() and not mixture[:, 20:].any()      # short songs

# ---- Whole tracks ----------------------------------------------------------------------------------------------------

class Identity(nn.Module):
    config = mss.Config()
    def forward(self, x):
        return x[:, None]

class Alternating(Identity):
    """Another answer for every block: shows where blocks are joined and with which weights."""
    calls = 0
    def forward(self, x):
        self.calls += 1
        return torch.full_like(x[:, None], self.calls % 2)

@pytest.mark.parametrize("segment, overlap", [(4000, 800), (4001, 801), (400, 1), (400, 0), (400, 266)])
def test_identity_through_separate_track(segment, overlap):
    for length in (0, 1, segment - 1, segment, segment + 1, 2 * segment - overlap, 2 * segment - overlap + 1,
                   int(3.7 * segment)):
        x = noise(2, length)
        y = mss.separate_track(Identity(), x, segment, overlap)
        assert y.shape == (1, 2, length) and torch.allclose(y[0], x, rtol=0, atol=1e-6)
        streamed = mss.separate_blocks(Identity(), iter(x.split(333, dim=-1)), segment, overlap)
        assert torch.equal(torch.cat(list(streamed), dim=-1), y)

def test_cross_fade_has_real_context_on_both_sides():
    y = mss.separate_track(Alternating(), torch.zeros(2, 1800), segment=1000, overlap=200)[0, 0]
    assert (y[:850] == 1).all() and (y[950:] == 0).all()              # of 800..1000, shared, the outer 50s are context
    assert torch.allclose(y[850:950], 1 - (torch.arange(100) + 0.5) / 100)

def test_windows_at_once_change_nothing_and_short_ones_little():
    config, model = small("ResUNetDecouple+")
    x = noise(2, 20_000)
    alone, together = (mss.separate_track(model.eval(), x, 3000, 400, batch_size) for batch_size in (1, 3))
    assert torch.allclose(alone, together, rtol=0, atol=1e-6)
    model = small()[1].eval()
    whole, blocks = (mss.separate_track(model, x[:, :6000], *sizes) for sizes in ((10_000, 0), (3000, 2000)))
    assert mss.sdr(whole, blocks) > 15                                # the network's field of view exceeds the overlap
    with pytest.raises(mss.UserError, match="1.5 overlaps"):
        mss.separate_track(model, x, segment=400, overlap=268)

@pytest.mark.parametrize("name, decibels", (("Wave-U-Net", 100), ("Wave-U-Net-12", 100), ("DPRNN", 8), ("PM-Unet", 18),
                                            ("PM-Unet-conv", 18), ("UNet", 28)))
def test_blocks_equal_the_whole(name, decibels):
    """DPRNN's and PM-Unet's norms make their receptive field endless; and blocks off the grid."""
    _, model = small(name, window=0, hop=0, width=2 if "PM" in name else 4)
    x = noise(2, 10 * RATE)
    for norm in (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)):
        norm.momentum = 1.0                                           # statistics that make the output alive
    with torch.inference_mode():
        model.train()(x[None])
        whole = model.eval()(x[None])[0]
        whole -= (constant := whole.mean())
        streamed = mss.separate_track(model, x, overlap=mss.OVERLAP - 64) - constant
        model.stride = 1
        astray = mss.separate_track(model, x, overlap=mss.OVERLAP - 64) - constant
    assert whole.std() > 1e-3 * constant.abs() and mss.sdr(whole, streamed) > decibels
    assert mss.sdr(whole, astray) < mss.sdr(whole, streamed) - (name != "DPRNN")

def test_rounding_errors_stay_small_in_pm_unet():
    """A frame in the middle of a reflection is real but for rounding errors, and its phases are 0 or pi at random."""
    _, model = small("PM-Unet", window=0, hop=0)
    x = noise(1, 2, 20 * 1024)
    with torch.inference_mode():
        y, z = (model.eval()(audio) for audio in (x, x * (1 + 1e-7 * noise(1, 2, 20 * 1024, seed=1, scale=1.0))))
    assert mss.sdr(y, z) > 70

@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")])
def test_out_of_memory_is_survived(error, capsys):
    class Large(Identity):
        def forward(self, x):
            if x.shape[0] * x.shape[-1] > limit:
                raise error
            return super().forward(x)
    x, limit = noise(2, 20_000), 1100
    y = mss.separate_track(Large(), x, segment=4000, overlap=400, batch_size=4)
    assert torch.allclose(y[0], x, rtol=0, atol=1e-6)
    said = [line.split("on with ")[1].split(" samples")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == ["2 x 4000", "1 x 4000", "1 x 2200", "1 x 1300", "1 x 850"]
    limit = 300
    with pytest.raises(mss.UserError, match="--overlap"):
        mss.separate_track(Large(), x, segment=4000, overlap=400)
    with pytest.raises(RuntimeError, match="another"):
        error = RuntimeError("another")
        mss.separate_track(Large(), x)

# ---- BSS Eval v4 -----------------------------------------------------------------------------------------------------

def test_sdr_is_the_formula():
    s, y = (noise(2, 5 * RATE // 2, 2, seed=k).numpy() for k in (0, 1))                       # (S, L, C)
    frames = evaluate.bss_eval(s, y, RATE, filters=False)["SDR"]
    a, b = s.astype("float64"), y.astype("float64")
    expected = [[10 * np.log10((a[j, t] ** 2).sum() / ((b - a)[j, t] ** 2).sum())
                 for t in (slice(RATE), slice(RATE, 2 * RATE))] for j in range(2)]            # the last half: dropped
    np.testing.assert_allclose(frames, expected, rtol=0, atol=1e-9)
    assert abs(mss.sdr(s, y) - 10 * np.log10((a ** 2).sum() / ((b - a) ** 2).sum())) < 1e-9 and mss.sdr(s, s) == np.inf
    padded = np.pad(y[:, :RATE], [(0, 0), (0, len(s[0]) - RATE), (0, 0)])
    for estimate in (y[:, :RATE], np.concatenate([padded, y], axis=1)):                       # shorter, longer
        np.testing.assert_array_equal(*(evaluate.bss_eval(s, z, RATE, False)["SDR"] for z in (estimate, padded)))
    for length in (0, 1, 700):
        assert evaluate.bss_eval(s[:, :length], y[:, :length], RATE)["SAR"].shape == (2, 1)

@pytest.mark.parametrize("side", ["reference", "estimate", "opposite channels", "whole reference"])
def test_silent_for_one_is_silent_for_all(side):
    s, y = (noise(2, 4 * RATE, 2, seed=k).numpy() for k in (0, 1))
    frame = np.s_[1, RATE:2 * RATE]
    if side == "opposite channels":                                   # museval looks at the sum of the channels
        s[frame] = s[frame][:, :1] * (1, -1)
    else:
        (y if side == "estimate" else s)[1 if "whole" in side else frame] = 0
    for values in evaluate.bss_eval(s, y, RATE).values():
        assert np.isfinite(values).tolist() == [[side != "whole reference" and t != 1 for t in range(4)]] * 2
    for broken in (y[:1], y[..., :1], y[0], y * np.nan):
        with pytest.raises(mss.UserError, match="expected, found"):
            evaluate.bss_eval(s, broken, RATE)

@pytest.mark.parametrize("channels", [1, 2])
def test_filters_against_least_squares(channels):
    """ISR, SIR, SAR by numpy's lstsq on a matrix of delayed references; equal channels are deficient in rank."""
    s = np.repeat(noise(2, 3000, 1).numpy().astype("float64"), channels, axis=2)              # (S, L, C)
    y = 0.5 * np.roll(s, 3, axis=1) + 0.2 * s[::-1] + noise(2, 3000, channels, seed=1).numpy()
    delayed = np.stack([np.pad(x, (p, 511 - p)) for x in s[:, :, 0] for p in range(512)], axis=1)
    ours = evaluate.bss_eval(s, y, RATE)
    for j in range(2):
        target, estimate = (np.pad(x[j], [(0, 511), (0, 0)]) for x in (s, y))
        own, all_ = (A @ np.linalg.lstsq(A, estimate, rcond=None)[0] for A in (delayed[:, 512 * j:][:, :512], delayed))
        ratios = {"ISR": (target, own - target), "SIR": (own, all_ - own), "SAR": (all_, estimate - all_)}
        for name, (a, b) in ratios.items():
            assert abs(ours[name][j, 0] - 10 * np.log10((a ** 2).sum() / (b ** 2).sum())) < 1e-6

@pytest.mark.parametrize("number", ["01", "02", "03", "05", "06", "07", "08", "09"])
def test_mir_evals_expectations(number):
    folder = data("mir_eval_separation")
    images = json.loads((folder / f"output{number}.json").read_text())["Images"]
    s, y = (np.stack([soundfile.read(path, always_2d=True)[0].mean(1, keepdims=True) for path in sorted(
        (folder / name).iterdir())]) for name in (f"ref{number}", f"est{number}"))            # (S, L, 1)
    gains = np.array([1] + [images["gain"]] * (images["nchan"] - 1))[::-1 if images["reverse"] else 1]
    s, y = s.repeat(images["nchan"], axis=2), (y * gains)[images["Source permutation"]]
    for key, values in evaluate.bss_eval(s, y, s.shape[1]).items():
        name = {"SDR": "Distortion", "ISR": "Spatial", "SIR": "Interference", "SAR": "Artifact"}[key]
        expected = next(values for title, values in images.items() if title.endswith("to " + name))
        np.testing.assert_allclose(values[:, 0], expected, rtol=0, atol=1e-9 if key == "SDR" else 1e-3)

@needs_ffmpeg
def test_musevals_expectations(tmp_path):
    root = data("musdb_samples")
    (track,) = mss.musdb_tracks(root, "train", tmp_path / "cache")
    np.random.seed(0)
    estimates = {name: torch.from_numpy(np.random.random((track.frames, 2))).T for name in ("vocals", "accompaniment")}
    scores = evaluate.compare(track, track.load("mixture"), estimates, filters=True)[0]["estimate"]
    evaluate.write_json(tmp_path / "test" / "Song.json", scores)
    ours, expected = (json.loads(path.read_text())["targets"] for path in (
        tmp_path / "test" / "Song.json", root / "Music Delta - 80s Rock.expected.json"))
    assert [target["name"] for target in ours] == [target["name"] for target in expected] == ["vocals", "accompaniment"]
    for target, theirs in zip(ours, expected):
        assert len(target["frames"]) == len(theirs["frames"]) == 6
        for a, b in zip(target["frames"], theirs["frames"]):
            assert (a["time"], a["duration"], set(a["metrics"])) == (b["time"], b["duration"], set(b["metrics"]))
            assert max(abs(a["metrics"][key] - b["metrics"][key]) for key in evaluate.METRICS) < 1e-3
    museval = pytest.importorskip("museval", reason="museval is not installed; nothing but this check needs it")
    store = museval.EvalStore()
    store.add_eval_dir(tmp_path)
    assert store.agg_frames_tracks_scores()["vocals"]["SIR"] == pytest.approx(evaluate.median(scores["vocals"]["SIR"]))

def test_groups_are_musevals():
    stems = {name: noise(2, 3 * RATE, seed=k) for k, name in enumerate(mss.SOURCES)}
    stems["bass"][:, :RATE] = 0                                       # silent bass: the 4-source group loses a frame
    references = {**stems, "accompaniment": stems["bass"] + stems["drums"] + stems["other"]}
    estimates = {name: audio + noise(2, 3 * RATE, seed=9) for name, audio in references.items()}
    scores = evaluate.score(references, estimates, RATE)
    counted = {name: int(np.isfinite(values["SDR"]).sum()) for name, values in scores.items()}
    assert counted == {"vocals": 3, "accompaniment": 3, "bass": 2, "drums": 2, "other": 2}
    a, b = stems["drums"].double(), estimates["drums"].double()
    expected = 10 * torch.log10((a.square().sum() + 1e-7) / ((b - a).square().sum() + 1e-7))
    assert abs(scores["drums"]["uSDR"] - float(expected)) < 1e-9
    alone = evaluate.score(references, {name: estimates[name] for name in ("accompaniment", "drums")}, RATE)
    assert list(alone) == ["drums", "accompaniment"] and np.isfinite(alone["drums"]["SDR"]).all()
    silent = evaluate.score({"bass": torch.zeros(2, RATE)}, {"bass": noise(2, RATE)}, RATE)["bass"]
    assert np.isnan(silent["uSDR"]) and np.isnan(evaluate.median(silent["SDR"]))

# ---- Checkpoints -----------------------------------------------------------------------------------------------------

def test_bad_checkpoints_are_named(checkpoint, tmp_path):
    song = tmp_path / "song.wav"
    mss.write_audio(song, noise(2, 1000), RATE)
    content = checkpoint.read_bytes()
    bad = tmp_path / "bad.pt"
    for name, harm in (("truncated", lambda: bad.write_bytes(content[:len(content) // 2])),
                       ("empty", lambda: bad.write_bytes(b"")),
                       ("pickle", lambda: torch.save({"config": Path("x"), "model": print}, bad)),
                       ("tensor", lambda: torch.save(torch.zeros(3), bad)),
                       ("other", lambda: torch.save({"config": {"model": "Demucs"}, "model": {}}, bad)),
                       ("weights", lambda: torch.save({"model": {"conv.weight": torch.zeros(1)}, "step": 1}, bad))):
        harm()
        fails(separate.main, song, "-m", bad, "-o", tmp_path / name, saying=("bad.pt", "checkpoint"))
        assert not (tmp_path / name).exists()
    fails(separate.main, song, "-m", tmp_path / "absent.pt", saying=("absent.pt", "found no file"))

def test_a_full_disk_keeps_the_old_checkpoint(checkpoint, tmp_path):
    before, (config, model) = checkpoint.read_bytes(), small(width=4)
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(mss.UserError, match="small.pt: not saved"):
            mss.save_checkpoint(checkpoint, config, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["small.pt"]

# ---- train.py --------------------------------------------------------------------------------------------------------

def flags(songs, out, **changes):
    values = dict(musdb=songs, out=out, model="UNetDecouple+", width=2, steps=8, batch_size=2, segment=0.5, workers=0,
                  validate_every=3, save_every=3, log_every=2, device="cpu")
    return [str(word) for name, value in {**values, **changes}.items() if value is not None
            for word in ("--" + name.replace("_", "-"), value)]

def read_csv(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))

def weights(path):
    return torch.load(path, weights_only=True)["model"]

def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)

@pytest.fixture(scope="session")
def trained(songs, tmp_path_factory):
    """A run of 8 steps."""
    out = tmp_path_factory.mktemp("runs") / "eight"
    code, stdout, _ = call(train.main, *flags(songs, out))
    assert code == 0 and "step 8/8" in stdout and "ms/step" in stdout and "data wait" in stdout
    return out

def test_resumed_equals_uninterrupted(songs, trained, tmp_path):
    out = tmp_path / "run"
    assert call(train.main, *flags(songs, out, steps=4))[0] == 0
    assert call(train.main, *flags(songs, out, workers=2))[0] == 0
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 8
    assert equal(weights(out / "last.pt"), weights(trained / "last.pt"))
    assert "done at step 8" in call(train.main, *flags(songs, out))[1]            # nothing left to do

def test_killed_at_any_moment(songs, tmp_path):
    """kill -9, again and again; what comes of it equals an undisturbed run, averaged weights and optimizer too."""
    settings = dict(steps=30, ema=0.9, workers=1, save_every=2, segment=0.25, validate_every=15)
    runs = [flags(songs, tmp_path / name, **settings) for name in ("killed", "whole")]
    last, steps = tmp_path / "killed" / "last.pt", []
    for seconds in (0, 0.1, 0.3):                                     # after the first save of that process
        before, deadline = last.stat().st_mtime_ns if last.exists() else 0, time.time() + 60
        process = subprocess.Popen([sys.executable, HERE / "train.py", *runs[0]], stdout=subprocess.DEVNULL)
        while time.time() < deadline and not (last.exists() and last.stat().st_mtime_ns > before):
            time.sleep(0.01)
        time.sleep(seconds)
        process.kill()
        process.wait()
        steps.append(torch.load(last, weights_only=True)["step"])
    assert 0 < steps[0] <= steps[-1]
    (tmp_path / "killed" / ".partial-1-last.pt").touch()
    assert all(call(train.main, *run)[0] == 0 for run in runs)
    killed, whole = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("killed", "whole"))
    assert equal(killed["model"], whole["model"]) and equal(killed["raw"], whole["raw"])
    assert all(equal(killed["optimizer"]["state"][i], state) for i, state in whole["optimizer"]["state"].items())
    logs = [[(row["step"], row["valid_sdr_vocals"]) for row in read_csv(tmp_path / name / "log.csv")]
            for name in ("killed", "whole")]
    assert logs[0] == logs[1] and not list(tmp_path.glob("killed/.partial*"))

def test_the_loop_against_a_plain_one(songs, tmp_path):
    settings = dict(steps=50, segment=0.25, lr=2e-3, warmup=5, log_every=1, validate_every=50)
    assert call(train.main, *flags(songs, tmp_path, **settings))[0] == 0
    config = mss.Config(model="UNetDecouple+", width=2)
    segments = mss.Segments(mss.musdb_tracks(songs, "train"), config, 0.25)
    torch.manual_seed(0)
    model = mss.MODELS["UNetDecouple+"](config).to(memory_format=torch.channels_last)
    optimizer, losses = torch.optim.Adam(model.parameters(), amsgrad=True), []
    for step in range(50):
        mixture, targets = (torch.stack(x) for x in zip(segments[2 * step], segments[2 * step + 1]))
        optimizer.param_groups[0]["lr"] = 2e-3 * min((step + 1) / 5, 1)
        optimizer.zero_grad()
        loss = (model(mixture) - targets).abs().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    logged = [float(row["loss"]) for row in read_csv(tmp_path / "log.csv") if row["loss"]]
    assert np.allclose(logged, losses, rtol=1e-6, atol=0) and losses[-1] < losses[0]

def gradients(root, model, out):
    """Two steps in float64 of the processes that the environment tells of -> out: losses, gradients and statistics."""
    args = train.parse(flags(root, "-", batch_size=4, accumulate=2, model=model))
    config = mss.Config(model=model, width=2)
    segments = mss.Segments(mss.musdb_tracks(root, "train"), config, 0.5)
    data = ([x.double() for x in batch] for batch in train.batches(segments, args, 0))
    torch.manual_seed(0)
    model = mss.MODELS[model](config).double().train()
    if train.WORLD > 1 and not train.dist.is_initialized():
        train.dist.init_process_group()
    network, optimizer = train.network_of(model, args), train.optimizer_of(model, args)
    losses = [train.learn(network, optimizer, data, args)[0] for _ in range(2)]
    if train.RANK == 0:
        statistics = {name: value for name, value in model.named_buffers() if value.is_floating_point()}
        torch.save({"losses": torch.tensor(losses), **statistics,
                    "gradients": torch.cat([parameter.grad.flatten() for parameter in model.parameters()])}, out)

def torchrun(*command):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, command)]
    return subprocess.run(run, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})

def test_two_processes_learn_what_one_does(songs, tmp_path):
    """In float64: of float32's rounding alone this network's gradients, of an L1 norm and of angles, change by 1e-3."""
    models, calls = ("ResUNetDecouple+", "Wave-U-Net", "PM-Unet"), ""
    for model in models:
        gradients(songs, model, tmp_path / f"{model} 1.pt")
        calls += f"test_mss.gradients({str(songs)!r}, {model!r}, {str(tmp_path / model)!r} + ' 2.pt');"
    (tmp_path / "two.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_mss; {calls}")
    done = torchrun(tmp_path / "two.py")
    assert done.returncode == 0, done.stderr
    for model in models:
        one, two = (torch.load(tmp_path / f"{model} {number}.pt") for number in (1, 2))
        for name in one:
            assert (one[name] - two[name]).norm() < 1e-8 * one[name].norm(), (model, name)

def test_two_processes_train_and_one_resumes(songs, trained, tmp_path):
    root, out = shutil.copytree(songs, tmp_path / "root"), tmp_path / "run"
    shutil.copytree(songs / "test" / "Synthetic - Song 4", root / "valid" / "Synthetic - Song 4")
    done = torchrun(HERE / "train.py", *flags(root, tmp_path / "bf16", steps=1), "--bf16", "--checkpoint-blocks")
    assert done.returncode == 0, done.stderr
    done = torchrun(HERE / "train.py", *flags(root, out, steps=4, ema=0.5))
    assert done.returncode == 0 and done.stdout.count("done at step 4") == 1, done.stderr
    _, average, state = mss.load_checkpoint(out / "last.pt")
    assert state["step"] == state["validated"] == 4
    scores = train.validate(average, mss.musdb_tracks(root, "valid"), False, [])
    logged = float(read_csv(out / "log.csv")[-1]["valid_sdr_vocals"])
    assert scores["valid_sdr_vocals"] == pytest.approx(logged, abs=1e-3)
    code, stdout, _ = call(train.main, *flags(root, out, ema=0.5))
    assert code == 0 and "at step 4" in stdout
    ours, theirs = (np.array([float(row["loss"]) for row in read_csv(folder / "log.csv") if row["loss"]])
                    for folder in (out, trained))
    assert abs(ours[0] / theirs[0] - 1) < 1e-3 and np.abs(ours / theirs - 1).max() < 0.05      # the same examples
    fails(train.main, *flags(root, out, accumulate=3), saying=("--batch-size", "multiples of 3"))

@pytest.mark.parametrize("name", ("UNet", "ResUNetDecouple+", "Wave-U-Net", "DPRNN", "PM-Unet"))
def test_blocks_computed_again_change_nothing(name):
    results = []
    for again in ([], ["--checkpoint-blocks"]):
        (_, model), calls = small(name), []
        block = [module for module in model.modules() if isinstance(module, train.BLOCKS)][-1]
        next(leaf for leaf in block.modules() if not list(leaf.children())).register_forward_hook(
            lambda *_: calls.append(1))
        args = train.parse(["--musdb", "-", "--model", name, "--batch-size", "2", "--accumulate", "2", *again])
        network, optimizer = train.network_of(model, args), train.optimizer_of(model, args)
        batches = iter([(noise(1, 2, 5000, seed=i), noise(1, 1, 2, 5000, seed=9 + i)) for i in range(6)])
        results.append([train.learn(network, optimizer, batches, args)[0] for _ in range(3)] + [model.state_dict()])
        assert len(calls) == 3 * 2 * (2 if again else 1)              # 3 steps of 2 parts
    assert results[0][:3] == results[1][:3] and equal(results[0][3], results[1][3])

def test_several_targets_fine_tuned_and_timed(songs, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert call(train.main, *flags(songs, first, source="vocals,drums,bass,other", ema=0.5))[0] == 0
    config, model, state = mss.load_checkpoint(first / "best.pt")
    assert config.targets == ("vocals", "drums", "bass", "other")
    assert all(math.isfinite(state[f"valid_sdr_{target}"]) for target in config.targets)
    changes = dict(model=None, width=None, init=first / "best.pt", hours=1e-9, seed=1)
    code, stdout, _ = call(train.main, *flags(songs, second, **changes))
    assert code == 0 and "out of --hours at step 1" in stdout
    tuned = mss.load_checkpoint(second / "last.pt")[1]
    assert all((a - b).abs().max() < 1e-2 for a, b in zip(tuned.parameters(), model.parameters()))
    assert tuned.config.targets == config.targets and (first / "curve.png").read_bytes()[:4] == b"\x89PNG"
    fails(train.main, *flags(songs, tmp_path, init=first / "best.pt", source="vocals"), saying=("--init", "number"))
    fails(train.main, *flags(songs, second, source="vocals,vocals"), saying=("--source", "vocals,vocals"))

def test_a_cache_holds_what_the_files_hold(songs, tmp_path):
    for song, cached in zip(mss.musdb_tracks(songs, "train"), mss.musdb_tracks(songs, "train", tmp_path)):
        assert cached.files["bass"] == tmp_path / "train" / song.name / "bass.wav"
        assert all(torch.equal(song.load(source), cached.load(source)) for source in song.files)

def test_benchmarks_rows(songs, tmp_path):
    code, stdout, _ = call(train.main, *flags(songs, tmp_path, benchmark=0.1, workers=1))
    assert code == 0 and re.search(r"(?m)^bfloat16( +[\d.]+%?){7}$", stdout) and "segments/s" in stdout, stdout

def test_checkpoint_log_and_true_best(songs, trained):
    last = torch.load(trained / "last.pt", weights_only=True)
    assert last["step"] == 8 and last["config"]["model"] == "UNetDecouple+" and "optimizer" in last
    rows = read_csv(trained / "log.csv")
    assert [int(row["step"]) for row in rows if row["loss"]] == [2, 4, 6, 8]
    scores = {int(row["step"]): float(row["valid_sdr_vocals"]) for row in rows if row["valid_sdr_vocals"]}
    assert list(scores) == [3, 6, 8]
    config, model, state = mss.load_checkpoint(trained / "best.pt")
    assert state["valid_sdr_vocals"] == max(scores.values()) and state["step"] == max(scores, key=scores.get)
    (track,) = mss.musdb_tracks(songs, "valid")
    scores, _, _ = evaluate.compare(track, *evaluate.separated(model, track))
    assert evaluate.median(scores["estimate"]["vocals"]["SDR"]) == pytest.approx(state["valid_sdr_vocals"], abs=1e-4)

def test_learning_rate_is_the_papers():
    for step, rate in ((1, 1e-6), (500, 5e-4), (14_999, 1e-3), (45_000, 1e-3 * 0.9 ** 3)):
        assert train.learning_rate(step, 1e-3, 1000) == pytest.approx(rate)
    args = train.parse(["--source", "drums", "--musdb", "x"])
    assert (args.lr, args.batch_size, args.segment, args.steps, args.warmup) == (2e-4, 16, 3.0, 300_000, 1000)
    assert (args.model, args.width, args.mix_audio, args.augment) == ("ResUNetDecouple+", 32, 2, [])
    assert (args.loss, args.optimizer, args.schedule, args.clip, args.weight_decay) == ("l1", "amsgrad", "steps", 0, 0)

def test_recipes_are_the_seeds():
    """loss, optimizer, learning rate, batch, segment, clip, weight decay"""
    for name, *expected in (("Wave-U-Net", "mse", torch.optim.Adam, 1e-3, 32, 1.0, 0, 0),
                            ("Wave-U-Net-12", "mse", torch.optim.Adam, 1e-4, 16, 3.0, 0, 0),
                            ("DPRNN", "phase", torch.optim.Adam, 1e-3, 16, 3.0, 5.0, 1e-5),
                            ("PM-Unet", "l1+spec", torch.optim.RAdam, 1.5e-3, 6, 5.0, 0.5, 0)):
        args = train.parse(["--musdb", "x", "--model", name])
        optimizer = train.optimizer_of(nn.Linear(1, 1), args)
        group, = optimizer.param_groups
        assert [args.loss, type(optimizer), group["lr"], args.batch_size, args.segment, args.clip,
                group["weight_decay"]] == expected and not group.get("amsgrad"), name
    assert args.augment == [*mss.AUGMENTATIONS] and args.source == ("vocals", "bass", "drums", "other")
    assert train.parse(["--musdb", "x", "--model", "PM-Unet", "--loss", "l1", "--clip", "0", "--augment"]).augment == []
    rates = [train.learning_rate(step, 1.0, 1, "cosine") for step in (1, 65_000, 129_999, 130_000)]
    assert rates == pytest.approx([1, 0.5, 0, 1], abs=1e-3)

@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_by_name(name, songs, tmp_path):
    """--model alone decides on recipe, targets and sizes; the other scripts take the checkpoint as any other."""
    out = tmp_path / "run"
    assert vars(train.parse(["--musdb", "-", "--model", name])).items() >= {
        **dict(zip(train.RECIPE, train.RECIPES[name])), "width": mss.Config(model=name).width,
        "source": tuple(train.RECIPES[name][train.RECIPE.index("source")].split(","))}.items()
    code, stdout, stderr = call(train.main, *flags(songs, out, model=name, steps=2, segment=0.3))
    assert code == 0 and "done at step 2" in stdout, stderr
    config = mss.load_checkpoint(out / "best.pt")[0]
    assert (config.window, config.hop) == ((4096, 1024) if "PM" in name else (2048, 441))
    track, = mss.musdb_tracks(songs, "test")
    assert call(separate.main, track.files["mixture"], "-m", out / "best.pt", "-o", tmp_path / "stems")[0] == 0
    stems = {path.stem: mss.read_audio(path)[0] for path in (tmp_path / "stems" / "mixture").iterdir()}
    assert set(stems) == set(config.targets) and all(x.shape == (2, track.frames) for x in stems.values())
    mss.write_audio(tmp_path / "48.wav", noise(2, 30_000), 48_000)
    assert call(separate.main, tmp_path / "48.wav", "-m", out / "best.pt", "-o", tmp_path / "stems")[0] == 0
    more = [mss.read_audio(path)[0] for path in (tmp_path / "stems" / "48").iterdir()]
    if "PM" not in name:                                              # the others' estimates sum to the mixture
        assert (sum(stems.values()) - track.load("mixture")).abs().max() < 1e-5
        assert (sum(more) - noise(2, 30_000)).abs().max() < 1e-6
    code, stdout, stderr = call(evaluate.main, "-m", out / "best.pt", "--musdb", songs, "--results", tmp_path / "kept")
    assert code == 0 and all(target in stdout for target in config.targets), stderr

@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("name", ("DPRNN", "PM-Unet"))
def test_lstms_are_counted(name):
    """Against what torch counts where it computes LSTMs by matrix products."""
    _, model = small(name)
    counts = []
    for fused in (True, False):
        with torch.backends.mkldnn.flags(enabled=fused):
            for mode in (torch.inference_mode, torch.enable_grad):
                with mode(), train.FlopCounterMode(
                        display=False, custom_mapping=mss.baselines.LSTM_FLOPS if fused else {}) as counter:
                    y = model(noise(2, 2, 20_000))
                    y.requires_grad and y.sum().backward()
                counts.append(counter.get_total_flops())
    assert counts[0] == counts[2] > 0 and counts[1] == pytest.approx(counts[3], rel=0.05)      # the first one's inputs

def spectrum(audio, window, hop):
    """numpy's own STFT of (..., L) -> (..., T, F): centred, reflected, periodic Hann, normalised."""
    x = np.pad(audio, [(0, 0)] * (audio.ndim - 1) + [(window // 2, window // 2)], mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(x, window, axis=-1)[..., ::hop, :]
    return np.fft.rfft(frames * np.hanning(window + 1)[:-1]) / math.sqrt(window)

@pytest.mark.parametrize("name", train.LOSSES)
def test_losses_against_numpy(name):
    y, s = (noise(2, 2, 2, 9000, seed=seed, scale=0.3).double() for seed in (0, 1))
    s[1, 1] = 0                                                       # a silent source
    a, b = y.numpy(), s.numpy()
    def spectral(window, hop):
        Y, S = (spectrum(x, window, hop) for x in (a, b))
        compressed = [np.maximum(abs(X), 1e-5) ** 0.3 for X in (Y, S)]
        error = np.subtract(*(x * X / np.maximum(abs(X), 1e-5) for x, X in zip(compressed, (Y, S))))
        return np.mean((compressed[0] - compressed[1]) ** 2) + np.mean([error.real ** 2, error.imag ** 2])
    def si_sdr(y, s):
        tiny = 2.0 ** -23
        part = (y @ s + tiny) / (s @ s + tiny) * s
        return 10 * np.log10((part @ part + tiny) / ((part - y) @ (part - y) + tiny))
    ratios = [si_sdr(*pair) for pair in zip(a.reshape(-1, 9000), b.reshape(-1, 9000))]
    expected = {"l1": lambda: abs(a - b).mean(), "mse": lambda: ((a - b) ** 2).mean(),
                "phase": lambda: spectral(2048, 441),
                "l1+spec": lambda: (abs(a - b).mean() + spectral(4096, 1024) - np.mean(ratios)) / 3}[name]()
    assert train.LOSSES[name](y, s).item() == pytest.approx(expected, rel=1e-9)
    for estimate, target in ((y, s), (s, s), (0 * y, s), (0 * y, 0 * y)):         # and where all is silent or right
        estimate = estimate.float().requires_grad_()
        loss = train.LOSSES[name](estimate, target.float())
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(estimate.grad).all()

def test_sdr_rises_on_the_built_in_songs(songs, tmp_path):
    out = tmp_path / "run"
    settings = dict(steps=40, width=4, lr=5e-3, warmup=3, validate_every=20, batch_size=4)
    assert call(train.main, *flags(songs, out, **settings))[0] == 0
    losses, scores = ([float(row[name]) for row in read_csv(out / "log.csv") if row[name]]
                      for name in ("loss", "valid_sdr_vocals"))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5]) and scores[-1] > scores[0]

@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_exit(songs, trained, tmp_path, number, code):
    """To the whole process group, as a terminal or a scheduler sends them: the loader's workers get them too."""
    out = tmp_path / "run"
    long = flags(songs, out, steps=100_000, workers=2, save_every=100_000, validate_every=100_000)
    process = subprocess.Popen([sys.executable, HERE / "train.py", *long], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)
    log, deadline = out / "log.csv", time.time() + 120
    while time.time() < deadline and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.05)
    os.killpg(process.pid, number)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in stdout, stdout
    step = torch.load(out / "last.pt", weights_only=True)["step"]
    assert step >= 4
    for folder in (out, tmp_path / "straight"):
        assert call(train.main, *flags(songs, folder, steps=step + 2))[0] == 0
    assert equal(weights(out / "last.pt"), weights(tmp_path / "straight" / "last.pt"))

def test_an_mp3_is_as_long_as_it_plays(checkpoint, tmp_path):
    """Without a length in its header libsndfile estimates one, which may be too high."""
    song = tmp_path / "song.mp3"
    soundfile.write(song, noise(8 * RATE, 2).numpy(), RATE, bitrate_mode="CONSTANT", compression_level=0.0)
    os.truncate(song, song.stat().st_size * 2 // 3)                   # a player would just stop there
    assert soundfile.info(song).frames > len(soundfile.read(song)[0])
    mixture, _ = mss.read_audio(song)
    assert call(separate.main, song, "-m", checkpoint, "-o", tmp_path)[0] == 0
    vocals, accompaniment = stems(tmp_path / "song")
    assert vocals.shape == mixture.shape and torch.allclose(vocals + accompaniment, mixture, rtol=0, atol=1e-6)

def test_a_broken_song_is_named_counted_and_left_out(songs, tmp_path):
    root = shutil.copytree(songs, tmp_path / "root")
    shutil.copytree(songs / "valid" / "Synthetic - Song 3", root / "valid" / "Synthetic - Song 5")
    for stem in ("train/Synthetic - Song 0/vocals.flac", "valid/Synthetic - Song 3/bass.flac"):
        os.truncate(root / stem, 9000)                                # its header is whole: found out while training
    code, _, stderr = call(train.main, *flags(root, tmp_path / "run", steps=10))
    assert code == 0 and stderr.count("vocals.flac") == 1 and "not validated: Synthetic - Song 3" in stderr, stderr
    rows = read_csv(tmp_path / "run" / "log.csv")
    assert int(rows[-2]["unreadable"]) > 3 and math.isfinite(float(rows[-1]["valid_sdr_vocals"]))
    track, other = mss.musdb_tracks(songs, "train")[:2]
    files = {**track.files, "bass": tmp_path / "bass.wav"}
    mss.write_audio(files["bass"], noise(2, 5000), RATE)              # shorter than it was
    segments = mss.Segments([dataclasses.replace(track, files=files), other], mss.Config(targets=("bass",)), 0.5)
    assert all(segments[i][1].shape == (1, 2, RATE // 2) for i in range(8))
    assert segments.unreadable[0] > 0 == segments.unreadable[1]
    for stem in root.glob("train/*/vocals.flac"):
        os.truncate(stem, 9000)
    command = [sys.executable, HERE / "train.py", *flags(root, tmp_path / "all", steps=500, workers=2)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "train.py: error" in done.stderr, done.stderr

@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_dead_worker_is_replaced(songs, tmp_path, capfd, at):
    segments = mss.Segments(mss.musdb_tracks(songs, "train"), mss.Config(), 0.5)
    data = train.batches(segments, train.parse(flags(songs, tmp_path, workers=2, steps=20)), 0)
    for step in range(20):
        mixture, _ = next(data)
        assert torch.equal(mixture, torch.stack([segments[2 * step][0], segments[2 * step + 1][0]]))
        if step == at:
            multiprocessing.active_children()[at % 2].kill()
    assert "starting the loader anew" in capfd.readouterr().err
    train.end_workers()

def test_an_interrupted_validation_is_made_up_for(songs, tmp_path, monkeypatch):
    out, compare = tmp_path / "run", evaluate.compare
    monkeypatch.setattr(evaluate, "compare", lambda *words: (signal.raise_signal(signal.SIGINT), compare(*words))[1])
    assert call(train.main, *flags(songs, out, steps=3))[0] == 130 and not (out / "best.pt").exists()
    monkeypatch.undo()
    for _ in range(2):                                                # the second time there is nothing left to do
        assert call(train.main, *flags(songs, out, steps=3))[0] == 0
    (row,) = [row for row in read_csv(out / "log.csv") if row["valid_sdr_vocals"]]
    last, best = (torch.load(out / name, weights_only=True) for name in ("last.pt", "best.pt"))
    assert last["validated"] == best["step"] == int(row["step"]) == 3
    assert last["best"] == best["valid_sdr_vocals"] == float(row["valid_sdr_vocals"])
    monkeypatch.setattr(evaluate, "separated", lambda model, track, bf16: (
        track.load("mixture"), {"vocals": 99 * track.load("mixture")}))                       # a worse one
    assert call(train.main, *flags(songs, out, steps=4))[0] == 0
    assert torch.load(out / "best.pt", weights_only=True)["step"] == 3

def test_what_is_not_finite_is_skipped_and_20_in_a_row_the_end(songs, tmp_path, monkeypatch):
    real = train.gradient
    def spoil(network, data, args):                                   # as an overflow in the network would
        loss, waited = real(network, data, args)
        spoil.step += 1
        if spoil.step in spoil.bad:
            value = next(network.parameters()).grad if spoil.step == 4 else loss
            for value in (value, next(network.buffers())):
                value.fill_(math.nan)
        return loss, waited
    spoil.step, spoil.bad = 0, {3, 4, *range(10, 99)}
    monkeypatch.setattr(train, "gradient", spoil)
    out = tmp_path / "run"
    assert call(train.main, *flags(songs, out, steps=8, ema=0.9))[0] == 0
    last, rows = torch.load(out / "last.pt", weights_only=True), read_csv(out / "log.csv")
    assert last["skipped"] == 2 and [row["skipped"] for row in rows if row["loss"]] == ["0", "2", "2", "2"]
    assert all(torch.isfinite(value).all() for name in ("model", "raw") for value in last[name].values())
    fails(train.main, *flags(songs, out, steps=50, ema=0.9), saying=("20 steps", "to step 29", "loss nan", "--lr"))
    assert torch.load(out / "last.pt", weights_only=True)["step"] > 8

def test_a_full_disk_ends_a_run_only_at_its_end(songs, trained, tmp_path, monkeypatch):
    real, out = mss.save_checkpoint, tmp_path / "run"
    def save(path, *words, **state):
        if state["step"] in full or path.name in full:
            raise mss.UserError(f"{path}: No space left on device")
        real(path, *words, **state)
    monkeypatch.setattr(mss, "save_checkpoint", save)
    full = {3, 8}                                                     # the first save, and the last one
    fails(train.main, *flags(songs, out), saying=("No space left",))
    full = {6}
    code, _, stderr = call(train.main, *flags(songs, out))
    assert code == 0 and "going on" in stderr and equal(weights(out / "last.pt"), weights(trained / "last.pt"))
    full = {9}
    fails(train.main, *flags(songs, out, steps=9), saying=("No space left",))
    assert equal(weights(out / "last.pt"), weights(trained / "last.pt"))
    monkeypatch.setattr(train.evaluate, "median", lambda values, how=None: 99.0)              # the best so far
    full = {"best.pt"}
    fails(train.main, *flags(songs, out, steps=9), saying=("best.pt", "No space left"))
    full = ()
    assert call(train.main, *flags(songs, out, steps=9))[0] == 0
    assert torch.load(out / "best.pt", weights_only=True)["step"] == 9

def test_silent_validation_songs_are_refused_at_the_start(songs, tmp_path):
    for stem in (root := shutil.copytree(songs, tmp_path / "root")).glob("valid/*/vocals.flac"):
        mss.write_audio(stem, torch.zeros(2, 3 * RATE), RATE)
    fails(train.main, *flags(root, tmp_path / "run"), saying=("a validation song with vocals", "silence"))
    assert not (tmp_path / "run").exists()

def test_train_refuses(songs, trained, tmp_path):
    before = (trained / "last.pt").read_bytes()
    fails(train.main, *flags(songs, trained, width=4), saying=("--width 2", "this command: 4"))
    fails(train.main, *flags(songs, trained, seed=4), saying=("--seed 0", "this command: 4"))
    assert (trained / "last.pt").read_bytes() == before
    for change, words in ((dict(model="ResUnet"), ("ResUnet", "ResUNetDecouple+")), (dict(hop=683), ("--hop 683",)),
                          (dict(device="cuda:99"), ("cuda:99",)), (dict(steps=0), ("--steps 0",)),
                          (dict(step=3), ("--step",)), (dict(lr="nan"), ("nan",)), (dict(workers=-1), ("--workers",)),
                          (dict(source="vocal"), ("vocal", "accompaniment")), (dict(musdb="x"), ("x: ", "no folder"))):
        fails(train.main, *flags(songs, tmp_path / "a", **change), saying=words)
    fails(train.main, *flags(None, trained), saying=("songs of your own", "--musdb"))
    assert not (tmp_path / "a").exists()

# ---- separate.py and evaluate.py -------------------------------------------------------------------------------------

def test_separate(checkpoint, tmp_path):
    for name, rate, channels, length in (
            ("a song (1) ü.wav", RATE, 2, 50_001), ("fast.wav", 48000, 2, 50_001), ("mono.flac", 22050, 1, 30_000),
            ("one.wav", RATE, 2, 1), ("none.wav", RATE, 2, 0)):
        path = tmp_path / name
        mss.write_audio(path, noise(channels, length), rate)
        code, out, err = call(separate.main, path, "-m", checkpoint, "-o", tmp_path / "out", "-d", "cpu")
        assert code == 0 and err == "" and "cpu" in out and "real-time factor" in out
        stems = [tmp_path / "out" / path.stem / f"{stem}.wav" for stem in ("vocals", "accompaniment")]
        assert all(str(stem) in out and soundfile.info(stem).subtype == "FLOAT" for stem in stems)
        (vocals, _), (accompaniment, found) = map(mss.read_audio, stems)
        mixture, _ = mss.read_audio(path)
        assert found == rate and vocals.shape == accompaniment.shape == mixture.shape
        assert torch.allclose(vocals + accompaniment, mixture, rtol=0, atol=1e-6)
        assert length < 2 or 0 < vocals.abs().max()
    config, model, _ = mss.load_checkpoint(checkpoint)
    mss.write_audio(tmp_path / "song.wav", mixture := noise(2, 25 * RATE), RATE)
    separate.separate_file(model, tmp_path / "song.wav", tmp_path)
    assert torch.equal(mss.read_audio(tmp_path / "vocals.wav")[0], mss.separate_track(model, mixture)[0])

def test_separate_bad_inputs(checkpoint, tmp_path):
    good, bad = tmp_path / "good.wav", tmp_path / "bad.wav"
    mss.write_audio(good, noise(2, 1000), RATE)
    for harm, word in ((lambda: bad.write_bytes(b"junk"), "soundfile"), (lambda: bad.unlink(), "found no file"),
                       (lambda: bad.write_bytes(good.read_bytes()[:4000]), "truncated"),
                       (lambda: soundfile.write(bad, np.full((9000, 2), np.nan, "float32"), RATE, "FLOAT"), "NaN"),
                       (lambda: mss.write_audio(bad, noise(6, 100), RATE), "found 6")):
        harm()
        fails(separate.main, bad, "-m", checkpoint, "-o", tmp_path / "out", saying=("bad", word))
        assert not list((tmp_path / "out").rglob("*.*"))
    code, out, err = call(separate.main, bad, good, "-m", checkpoint, "-o", tmp_path / "out")
    assert code == 1 and "bad.wav" in err and (tmp_path / "out" / "good" / "vocals.wav").exists()
    own = tmp_path / "vocals" / "vocals.wav"
    mss.write_audio(own, noise(2, 100), RATE)
    before = own.read_bytes()
    fails(separate.main, own, "-m", checkpoint, "-o", tmp_path, saying=("written over",))
    assert own.read_bytes() == before

def stems(folder, *names):
    return [mss.read_audio(folder / name)[0] for name in names or ("vocals.wav", "accompaniment.wav")]

def test_formats_and_levels(checkpoint, tmp_path):
    song, t = tmp_path / "loud.wav", torch.arange(2 * RATE) / RATE
    mss.write_audio(song, 0.9 * torch.stack([torch.sin(2 * np.pi * 18_000 * t), noise(2 * RATE, scale=0.3)]), RATE)
    mixture, _ = mss.read_audio(song)
    arguments = song, "-m", checkpoint, "-o", tmp_path
    for flags, subtype, tolerance in (([], "FLOAT", 1e-6), (["--int24"], "PCM_24", 2 / 2 ** 23),
                                      (["--int16"], "PCM_16", 2 / 2 ** 15)):
        assert call(separate.main, *arguments, *flags)[0] == 0
        assert soundfile.info(tmp_path / "loud" / "vocals.wav").subtype == subtype
        vocals, accompaniment = stems(tmp_path / "loud")
        inside = (accompaniment.abs() < 0.999) & (vocals.abs() < 0.999)
        assert (vocals + accompaniment - mixture)[inside].abs().max() <= tolerance and inside.float().mean() > 0.9
    for ext, subtype, limit in (("flac", "PCM_24", 1e-3), ("mp3", "MPEG_LAYER_III", 0.3), ("ogg", "VORBIS", 0.3)):
        assert call(separate.main, *arguments, "--ext", ext)[0] == 0
        assert soundfile.info(tmp_path / "loud" / f"vocals.{ext}").subtype == subtype
        (coded,) = stems(tmp_path / "loud", f"vocals.{ext}")
        assert coded.shape == mixture.shape and (coded - vocals).square().mean().sqrt() < limit * vocals.std()
    mss.write_audio(song, 5 * mixture, RATE)
    for mode, words in (("none", "clips above 1"), ("clamp", "clips above 1"), ("rescale", "all stems x")):
        code, out, err = call(separate.main, *arguments, "--int24", "--clip-mode", mode)
        vocals, accompaniment = stems(tmp_path / "loud")
        assert code == 0 and words in out + err
        assert max(vocals.abs().max(), accompaniment.abs().max()) == pytest.approx(1, abs=1e-6)
    gain = float(re.search(r"stems x ([\d.]+)", out)[1])
    assert gain < 0.25 and torch.allclose(vocals + accompaniment, gain * 5 * mixture, rtol=0, atol=1e-3)
    assert not list(tmp_path.rglob(".partial*"))
    fails(separate.main, *arguments, "--ext", "mp3", "--int16", saying=("--ext mp3", "--int16"))
    mss.write_audio(song, mixture, 96_000)
    fails(separate.main, *arguments, "--ext", "mp3", "-o", tmp_path / "new", saying=("loud", "mp3", "not written"))
    assert not (tmp_path / "new" / "loud").exists()

def test_excerpts_targets_and_several_checkpoints(checkpoint, tmp_path):
    song, both = tmp_path / "song.wav", tmp_path / "both.pt"
    mss.write_audio(song, noise(2, 3 * RATE), RATE)
    mixture, _ = mss.read_audio(song)
    mss.save_checkpoint(both, *small(targets=("bass", "drums")))
    arguments = "-o", tmp_path, "-m", checkpoint, song                # -m takes the song, too
    assert call(separate.main, *arguments, "--start", 1, "--duration", 0.5, "--segment", 0.2, "--overlap", 0.1)[0] == 0
    assert torch.allclose(sum(stems(tmp_path / "song")), mixture[:, RATE:RATE * 3 // 2], rtol=0, atol=1e-6)
    fails(separate.main, *arguments, "--start", 3, saying=("song.wav", "--start"))
    for names, flags, wanted in (([checkpoint, both], [], {"vocals", "bass", "drums"}),
                                 ([checkpoint], ["--no-two-stems"], {"vocals"}),
                                 ([both], ["--two-stems"], {"bass", "drums", "no_bass", "no_drums"})):
        out = tmp_path / "-".join(sorted(wanted))
        assert call(separate.main, song, "-o", out, "-m", *names, *flags)[0] == 0
        assert {path.stem for path in (out / "song").iterdir()} == wanted
    assert torch.allclose(sum(stems(out / "song", "bass.wav", "no_bass.wav")), mixture, rtol=0, atol=1e-6)
    one, several = (stems(tmp_path / folder / "song", "vocals.wav")[0] for folder in ("vocals", "bass-drums-vocals"))
    assert torch.equal(one, several)
    fails(separate.main, song, "-m", checkpoint, checkpoint, saying=("different targets", "vocals, vocals"))
    fails(separate.main, "-m", checkpoint, saying=("FILE",))
    for flag in ("--segment=0.9", "--batch-size=0", "--duration=0", "--start=nan", "--benchmark=nan"):
        fails(separate.main, song, "-m", checkpoint, flag, saying=(flag.split("=")[0],))

def test_folders_and_names(checkpoint, tmp_path, monkeypatch):
    music = tmp_path / "music"
    for name in ("a.wav", "a.flac", "cd 1/a.wav", "cd [2]/-b.wav", "cd [2]/.hidden.wav", "__MACOSX/c.wav"):
        mss.write_audio(music / name, noise(2, 500), RATE)
    (music / "cover.jpg").write_bytes(b"no audio")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(music)
    for _ in range(2):                                                # the second time stems are there, but no songs
        code, out, err = call(separate.main, ".", "a.wav", "../music/cd 1/a.wav", "-m", checkpoint, "-o", "out")
        assert code == 0 and err == ""
        assert {str(path.parent) for path in Path("out").rglob("vocals.wav")} == {
            "out/a (wav)", "out/a (flac)", "out/cd 1/a", "out/cd [2]/-b"}
    code, out, err = call(separate.main, "a.wav", "cd 1/a.wav", "../empty", "-m", checkpoint, "-o", "new")
    assert code == 1 and "../empty: an audio file expected" in err and "1 of 3 songs failed: ../empty" in err
    assert sorted(path.name for path in Path("new").iterdir()) == ["a (wav)", "a (wav)+"]

def test_default_weights_are_small_licensed_described_and_trained_by_the_readme(songs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, song = HERE / "weights" / "vocals.pt", mss.musdb_tracks(songs, "test")[0].files["mixture"]
    config, _, card = mss.load_checkpoint(path)
    assert path.stat().st_size <= 5_000_000 and card == {**card, **json.loads((path.parent / "card.json").read_text())}
    assert all(word in call(separate.main, "--list-models")[1] for word in ("CC BY 4.0", "vocadito", card["licence"]))
    for main, arguments in ((separate.main, [song]), (evaluate.main, ["--musdb", songs])):
        code, out, err = call(main, *arguments)
        assert code == 0 and card["about"] in err and "-m paper" in err and "default" in out
    assert card["recipe"] in (HERE / "README.md").read_text().replace("\\\n    ", "")
    assert call(train.main, *card["recipe"].split()[2:], "--musdb", songs, "--steps", 2, "--workers", 0)[0] == 0
    assert mss.load_checkpoint("runs/default/last.pt")[0] == config

def test_default_weights_lift_a_voice_out_of_a_song_held_out():
    track = mss.musdb_tracks(data("everything_is_free"), "valid")[0]
    vocals, mixture = (track.load(name, 200 * RATE, 20 * RATE) for name in ("vocals", "mixture"))
    (estimate,) = mss.separate_track(mss.load_checkpoint(HERE / "weights" / "vocals.pt")[1], mixture)
    assert mss.sdr(vocals, estimate) > max(1, mss.sdr(vocals, mixture) + 3)          # silence: 0 dB; 20 s of singing

class Quiet(http.server.SimpleHTTPRequestHandler):
    log_message = lambda *arguments: None

def test_published_weights_are_downloaded_once(checkpoint, tmp_path, monkeypatch):
    content, name = checkpoint.read_bytes(), "resunet143_ismir2021_vocals_8.9dB_350k_steps.pth"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(separate.PUBLISHED, "paper", ("vocals", 8.9, hashlib.sha256(content).hexdigest()))
    song, cached = tmp_path / "song.wav", tmp_path / "home" / "hub" / "checkpoints" / name
    mss.write_audio(song, noise(2, 500), RATE)
    handler = lambda *arguments: Quiet(*arguments, directory=tmp_path / "www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for place, sent, words in (("absent", None, "404"), ("cut", content[:9000], "hash"), ("whole", content, None)):
            (tmp_path / "www" / place).mkdir(parents=True)
            if sent:
                (tmp_path / "www" / place / name).write_bytes(sent)
            monkeypatch.setattr(separate, "URL", f"http://127.0.0.1:{server.server_port}/{place}/"
                                + separate.URL.rsplit("/", 1)[1])
            code, _, err = call(separate.main, song, "-m", "paper", "-o", tmp_path)
            if words:
                assert code == 2 and words in err and f"{place}/{name}" in err and str(cached) in err.splitlines()[-1]
                assert not list(cached.parent.iterdir())
        server.shutdown()
    assert code == 0 and cached.read_bytes() == content
    code, _, err = call(separate.main, song, "-m", "paper", "-o", tmp_path)       # nobody listens any more
    assert code == 0 and "downloading" not in err
    cached.unlink()
    code, _, err = call(separate.main, song, "-m", "paper", "-o", tmp_path)
    assert code == 2 and "refused" in err and "by hand" in err
    _, out, _ = call(separate.main, "--list-models")
    assert all(word in out for word in ("paper-accompaniment", "16.8 dB", "461 MB", "non-commercial"))

def test_torchrun_shares_the_songs_out(checkpoint, tmp_path):
    for i in range(5):
        mss.write_audio(tmp_path / "songs" / f"{i}.wav", noise(2, 5000), RATE)
    (tmp_path / "songs" / "bad.wav").write_bytes(b"junk")
    done = torchrun(HERE / "separate.py", tmp_path / "songs", "-m", checkpoint, "-o", tmp_path / "out")
    assert done.returncode == 1 and "1 of 6 songs failed" in done.stderr, done.stderr
    assert sorted(re.findall(r"^\[\d/6\] .*?(\d)\.wav", done.stdout, re.MULTILINE)) == list("01234")
    assert sorted(path.parent.name for path in (tmp_path / "out").rglob("vocals.wav")) == list("01234")

def test_ctrl_c_leaves_nothing_behind(checkpoint, tmp_path):
    soundfile.write(tmp_path / "long.wav", np.zeros((60_000_000, 1), dtype="int16"), 8000)
    command = [sys.executable, HERE / "separate.py", tmp_path / "long.wav", "-m", checkpoint, "-o", tmp_path / "out"]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True,   # ignored in the background
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        deadline = time.time() + 60
        while time.time() < deadline and not list(tmp_path.rglob(".partial-*vocals.wav")):
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code and err == "" and not list((tmp_path / "out").iterdir())

def test_benchmark(checkpoint):
    command = [sys.executable, HERE / "separate.py", "--benchmark", "2", "-m", checkpoint, "-d", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    rows = re.findall(r"^b?float.*", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and len(rows) == 2, done.stderr
    for _, wall, factor, rate, ceiling, share, peak in map(str.split, rows):
        assert abs(float(factor) - float(wall) / 2) < 0.05 and 0 < float(rate) < float(ceiling) and float(peak) < 4

def test_a_dead_process_is_noticed(songs):
    store, tracks = torch.distributed.HashStore(), mss.musdb_tracks(songs, "train")[:2]
    store.set("track 0", '{"track": "Synthetic - Song 0"}')
    assert evaluate.gather(store, tracks) == [
        {"track": "Synthetic - Song 0"}, {"track": "Synthetic - Song 1", "error": "its process died"}]

def scores_in(path):
    return {(row["track"], row["system"], row["target"]): row for row in read_csv(path)}

def test_evaluate(songs, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "-m", trained / "best.pt", "--musdb", songs, "-o", "out", "--csv", "a.csv", "--json", "j", "--report", "."
    code, stdout, err = call(evaluate.main, *command)
    assert code == 0 and err == "" and evaluate.SDR in stdout and evaluate.USDR in stdout
    rows, (track,) = scores_in("a.csv"), mss.musdb_tracks(songs, "test")
    files = {name: tmp_path / "out" / "test" / track.name / f"{name}.wav" for name in ("vocals", "accompaniment")}
    references, estimates = (np.stack([audio.T for audio in stems]) for stems in (
        map(track.load, files), (mss.read_audio(path)[0] for path in files.values())))
    for system, heard in (("estimate", estimates), ("mixture", np.stack([track.load("mixture").T] * 2))):
        for name, values in zip(files, evaluate.bss_eval(references, heard, RATE, False)["SDR"]):
            row = rows[track.name, system, name]
            assert float(row["SDR"]) == pytest.approx(np.median(values), abs=1e-9)
            assert (row["frames"], row["frames_total"]) == ("3", "3") and bool(row["SIR"]) == (system == "estimate")
    page = Path("index.html").read_text()
    assert not re.search(r"(src|href)=.?(?!data:)\w|<script", page) and page.count("<audio") == page.count("<img") == 5
    mp3 = base64.b64decode(re.findall(r"data:audio/mpeg;base64,([^\"]+)", page)[0])
    heard, rate = soundfile.read(io.BytesIO(mp3))
    assert rate == RATE and mss.sdr(track.load("mixture").T, heard) > 20                      # the whole song: 3 s
    monkeypatch.setattr(evaluate, "separated", None)                  # what is done is read back, and looks the same
    assert call(evaluate.main, *command) == (0, stdout, "")
    flags = "--musdb", songs, "--csv", "b.csv", "--full", "--workers", 2
    assert call(evaluate.main, "--estimates", "out", *flags)[::2] == (0, "")
    assert all(scores_in("b.csv")[key][name] == row[name] for key, row in rows.items() for name in ("SDR", "uSDR"))
    files["vocals"].unlink()                                          # done again where a file that it wrote is gone
    with pytest.raises(TypeError):
        evaluate.main([str(word) for word in command])
    fails(evaluate.main, "-m", trained / "best.pt", "--musdb", tmp_path / "absent", saying=("absent",))
    fails(evaluate.main, "--oracle", "--estimates", "out", *flags, saying=("one of -m, --estimates, --oracle",))

def test_estimates_of_any_kind(songs, tmp_path, monkeypatch):
    """Shorter, longer, mono, silent, lossy: scored with a notice. NaN, other rates, none: named; others are done."""
    monkeypatch.chdir(tmp_path)
    tracks, flags = mss.musdb_tracks(songs, "train"), ("--musdb", songs, "--subset", "train", "--csv", "c.csv")
    vocals = [track.load("vocals") + noise(2, track.frames, scale=0.01) for track in tracks]
    def score(*estimates, name="vocals.wav", rate=RATE):
        shutil.rmtree("est", ignore_errors=True)
        for track, audio in zip(tracks, estimates):
            Path("est", track.name).mkdir(parents=True)
            soundfile.write(Path("est", track.name, name), audio.T.numpy(), rate, "FLOAT" if name[-1] == "v" else None)
        code, _, err = call(evaluate.main, "--estimates", "est", *flags)
        return code, err, [float(row["SDR"]) for (_, *which), row in scores_in("c.csv").items()
                           if which == ["estimate", "vocals"]]
    code, err, (plain, mono, shorter) = score(vocals[0], vocals[1].mean(0, keepdim=True), vocals[2][:, :-RATE])
    assert code == 0 and err.count("notice: ") == 2 and plain > 15 and mono > 5 and shorter > 10
    code, err, (longer, silent, lossy) = score(
        torch.cat([vocals[0], vocals[0]], dim=1), vocals[1] * 0, vocals[2], name="vocals.mp3")
    assert code == 0 and err.count("notice: ") >= 1 and abs(longer - plain) < 3 and np.isnan(silent) and lossy > 8
    code, err, figures = score(vocals[0], vocals[1] / 0)
    assert code == 1 and "NaN or infinity at sample 0" in err and "some of vocals" in err and figures == [plain]
    assert "2 of 3 tracks failed: Synthetic - Song 1 (est/" in err
    assert score(vocals[0], vocals[1], vocals[2], rate=48000)[0] == 2

def test_other_code_other_results(songs, checkpoint, tmp_path, monkeypatch):
    """What a song scored is kept for the code that computed it: all of it."""
    for count, module in enumerate((None, mss, mss.baselines, separate, evaluate), 1):
        if module:
            (tmp_path / Path(module.__file__).name).write_text("other code")
            monkeypatch.setattr(module, "__file__", str(tmp_path / Path(module.__file__).name))
        for _ in range(2):
            assert call(evaluate.main, "-m", checkpoint, "--musdb", songs, "--results", tmp_path / "kept")[0] == 0
            assert len(list((tmp_path / "kept").iterdir())) == count

def test_excerpts(songs):
    tracks = mss.musdb_tracks(songs, "train")
    first, again, other = (list(evaluate.excerpts(tracks, 2, 1.0, seed)) for seed in (0, 0, 1))
    assert first == again != other and len(first) == 2
    for part in first:
        (whole,) = (track.load("bass") for track in tracks if track.name == part.name)
        assert torch.equal(part.load("bass"), whole[:, part.first:part.first + RATE])
    assert [part.frames for part in evaluate.excerpts(tracks, 9, 99, 0)] == [3 * RATE] * 3

def test_oracles(songs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(evaluate.main, "--oracle", "--musdb", songs, "--csv", "t.csv")
    rows, (track,) = scores_in("t.csv"), mss.musdb_tracks(songs, "test")
    assert code == 0 and err == "" and len(rows) == 9 * 5
    for target in evaluate.TARGETS:                                   # Table 1's order; IRM(inf) isn't always better
        figures = [float(rows[track.name, name, target]["SDR"]) for name in evaluate.ORACLES
                   if name not in ("IBM", "IRM(inf)")]
        assert figures == sorted(figures) and figures[-1] > 50
    png = Path("evaluated", "figure2.png").read_bytes()
    (width, height), at = struct.unpack(">II", png[16:24]), png.index(b"IDAT") + 4
    pixels = np.frombuffer(zlib.decompressobj().decompress(png[at:]), "uint8").reshape(height, 1 + 3 * width)[:, 1:]
    assert (height, width) == (2 * 298, 3 * 278) and pixels[159, 3 * 74:3 * 75].tolist() == [255, 0, 0]       # M = -1

def test_ideal_masks_against_numpy():
    S, X = spectrogram(0, 1, 30, 40), spectrogram(1, 1, 30, 40)
    X[0, 0, :3] = 0
    s, x = S.numpy(), X.numpy()
    M = np.divide(s, x, out=np.zeros_like(s), where=x != 0)
    for name, mask in evaluate.ORACLES.items():
        limit = float(name.split("(")[1][:-1]) if "(" in name else 1
        length = np.minimum(abs(M), limit)
        expected = {"m": np.ones(M.shape), "I": length, "c": length * np.exp(1j * np.angle(M))}[name[0]]
        expected = (abs(s) > abs(x - s)) if name == "IBM" else expected
        np.testing.assert_allclose(np.broadcast_to(mask(S, X), M.shape), expected, atol=1e-4)
    mixture, source = noise(2, 9000, seed=1), noise(2, 9000, seed=2)
    bins, above, *histogram = evaluate.mask_statistics(mixture, {"vocals": source})["vocals"]
    M = (mss.stft(source) / mss.stft(mixture)).numpy().ravel()
    expected, _, _ = np.histogram2d(-M.imag, M.real, bins=evaluate.SIDE, range=[(-2, 2), (-2, 2)])
    assert bins == M.size and above == (abs(M) > 1).sum() and abs(np.array(histogram) - expected.ravel()).sum() < 20

# ---- What the project promises its readers ---------------------------------------------------------------------------

def test_equations_stand_at_their_lines():
    code = [line for line in (HERE / "mss.py").read_text().splitlines() if re.search(r"\S.*# eq\. \d", line)]
    found = {int(number) for line in code for number in re.findall(r"eq\. (\d)", line)}
    assert {2, 4, 5, 6, 7, 8, 9} <= found

def test_files_keep_their_budgets():
    lengths = []
    for name, budget in {"mss.py": 816, "baselines.py": 260, "train.py": 733, "separate.py": 300, "evaluate.py": 505,
                         "test_mss.py": 1425}.items():
        source = (HERE / name).read_text()
        assert source.count("\n") <= budget, name
        functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
        sizes = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
        assert max(sizes.values()) <= 60, (name, max(sizes, key=sizes.get))
        lengths += sizes.values() if name != "test_mss.py" else []
        classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
        assert name != "baselines.py" or max(node.end_lineno - node.lineno + 1 for node in classes) < 60
    assert statistics.median(lengths) <= 10

def test_readme_commands_exist():
    readme = (HERE / "README.md").read_text()
    helps = {}
    for script, arguments in re.findall(r"^(?:\S+/)?python (\w+\.py)(.*)$", readme, re.MULTILINE):
        if script not in helps:
            done = subprocess.run([sys.executable, HERE / script, "--help"], capture_output=True, text=True, check=True)
            helps[script] = done.stdout
        for flag in re.findall(r"(?<=\s)(--?[a-z][\w-]*)", arguments.split("#")[0]):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", helps[script]), f"{script} has no {flag}"
    assert {"train.py", "separate.py", "evaluate.py"} <= set(helps)
    table = dict(re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", readme, re.MULTILINE))
    assert {name: int(lines) for name, lines in table.items()} == {
        name: (HERE / name).read_text().count("\n")
        for name in ("mss.py", "baselines.py", "train.py", "separate.py", "evaluate.py", "test_mss.py")}
