"""Music source separation with the deep ResUNet of Kong et al. 2021 ("the paper"): the library.

    mixture -> stft         -> |X|, normalised -> UNet         -> 1x1 heads       -> rule, Y         -> istft, estimates
    (B, C, L)  (B, C, T, F)    (B, C, T, F)       (B, D, T, F)    (B, S, C, T, F)    (B, S, C, T, F)    (B, S, C, L)

Letters: B batch, S sources, C audio channels, L samples, T frames, F bins, D features.
"The paper": Decoupling magnitude and phase estimation with deep ResUNet for music source separation, ISMIR 2021.
"The published code": github.com/bytedance/music_source_separation, which the weights on Zenodo belong to.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import functools
import inspect
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn as nn
import torch.nn.functional as F

import baselines

SOURCES = ("vocals", "bass", "drums", "other")  # "accompaniment" is the sum of the last three

class UserError(ValueError):
    """Something the user can mend; the scripts print it as one line and exit with code 2."""

def one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__

SIZES = dict.fromkeys(("PM-Unet", "PM-Unet-conv"), (28, 4096, 1024)) | {    # width, window, hop where not the paper's
    "Wave-U-Net": (64, 2048, 441), "Wave-U-Net-12": (24, 2048, 441), "DPRNN": (128, 2048, 441)}

@dataclasses.dataclass
class Config:
    """Everything needed to rebuild a model; saved as a dict inside every checkpoint. Sizes of 0 become SIZES'."""
    model: str = "ResUNetDecouple+"             # a key of MODELS
    targets: tuple = ("vocals",)                # what the model estimates, in this order: S of them
    sample_rate: int = 44100                    # Hz
    channels: int = 2                           # C
    width: int = 0                              # features of the first encoder; others are multiples of it; paper: 32
    window: int = 0                             # samples, the FFT's length, too; F = window / 2 + 1; paper: 2048, 1025
    hop: int = 0                                # samples; paper: 441, which are 10 ms

    def __post_init__(self):
        given, sizes = (self.width, self.window, self.hop), SIZES.get(self.model, (32, 2048, 441))
        self.width, self.window, self.hop = (size or published for size, published in zip(given, sizes))

# ---- Audio files. Arrays are (L, C) only inside read_samples and write_blocks ----------------------------------------

def run_ffmpeg(path, *output):
    """Run `ffmpeg -i path *output`. Raises UserError where the program is missing or fails."""
    program = shutil.which("ffmpeg")
    if program is None:
        raise UserError(f"{path}: not a wav, flac, ogg, mp3 or aiff file that soundfile reads, and the program ffmpeg, "
                        "which might, was not found on PATH")
    command = [program, "-nostdin", "-v", "error", "-y", "-i", f"file:{path}", *map(str, output)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise UserError(f"{path}: readable neither by soundfile nor by ffmpeg: {one_line(done.stderr)}")
    if done.stderr:                                                   # such as of a truncated file
        print(f"notice: {path}: ffmpeg: {one_line(done.stderr)}", file=sys.stderr)

@contextlib.contextmanager
def open_audio(path):
    """Open a mono or stereo audio file of any format for reading -> soundfile.SoundFile; UserError where that fails."""
    with contextlib.ExitStack() as stack:
        try:
            file = soundfile.SoundFile(path)
            stated = rb"(Xing|Info)\0\0\0|VBRI"                       # without these an MP3's length is a guess
            guessed = file.format == "MP3" and not re.search(stated, np.fromfile(path, "u1", 1 << 20).tobytes())
            foreign = guessed and shutil.which("ffmpeg") or not file.seekable() or file.frames > 1 << 48    # streamed
            if guessed and not foreign:
                print(f"notice: {path}: its length is a guess; the end may be missing without ffmpeg", file=sys.stderr)
        except (soundfile.LibsndfileError, TypeError):                # TypeError: headerless .raw
            foreign = True
        if foreign:
            if not Path(path).is_file():
                found = "a folder without any" if Path(path).is_dir() else "no file"
                raise UserError(f"{path}: an audio file expected, found {found}")
            decoded = Path(stack.enter_context(tempfile.TemporaryDirectory()), "decoded.wav")
            run_ffmpeg(path, "-map", "0:a:0", "-c:a", "pcm_f32le", "-rf64", "auto", decoded)
            file = soundfile.SoundFile(decoded)
        stack.enter_context(file)
        cut = re.search(r"^ *(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
        if cut and int(cut[2]) < int(cut[1]) < 0xFFFFF000:            # streamed WAVs say 2^32 - 1
            raise UserError(f"{path}: truncated: {cut[1]} bytes of samples expected, found {cut[2]}")
        if "does not match value from 'ds64'" in file.extra_info:     # RF64
            raise UserError(f"{path}: truncated: its header speaks of more samples than there are")
        if file.channels > 2:
            raise UserError(f"{path}: 1 or 2 channels expected, found {file.channels}")
        yield file

def read_samples(file, frames, start=None):
    """The next `frames` samples of an open soundfile, or those from `start` -> (C, frames) float32 tensor.

    UserError where there are fewer; only of an MP3, whose length is an estimate, fewer may come.
    """
    try:
        start = file.tell() if start is None else file.seek(start)
        audio = file.read(frames, dtype="int16" if file.subtype == "PCM_16" else "float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UserError(f"{file.name}: damaged, perhaps truncated, after sample {start}: {error}") from error
    if len(audio) < frames and file.format != "MP3":
        raise UserError(f"{file.name}: truncated: {file.frames} samples expected, found {start + len(audio)}")
    if audio.dtype == "int16":                                        # soundfile's own conversion is far slower
        return torch.from_numpy(audio.T.astype("float32", order="C")).mul_(1 / 32768)
    if not np.isfinite(audio).all():
        at = start + int(np.argmin(np.isfinite(audio).all(axis=1)))
        raise UserError(f"{file.name}: finite samples expected, found NaN or infinity at sample {at}")
    return torch.from_numpy(audio.T.copy())

def read_blocks(file, start=0, frames=None, block=1 << 18):
    """Yield `frames` samples from `start` (default: all) as (C, <= block) float32 tensors: one at least."""
    frames = file.frames - start if frames is None else frames
    file.seek(start)
    for done in range(0, max(frames, 1), block):
        yield read_samples(file, min(block, frames - done))

def read_audio(path, start=0, frames=-1):
    """Read a file, or `frames` samples of it from `start` on -> ((C, L) float32 tensor, sample rate in Hz).

    Past the end of the file there is nothing: fewer samples come back. Raises UserError for unreadable files.
    """
    with open_audio(path) as file:
        left = max(0, file.frames - start)
        return read_samples(file, left if frames < 0 else min(frames, left), file.frames - left), file.samplerate

@contextlib.contextmanager
def replacing(path):
    """Yield a temporary name that is renamed to `path` when all went well: nobody ever sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

@contextlib.contextmanager
def write_blocks(path, rate, channels, frames=0, subtype=None):
    """Yield a function that appends (C, n) float blocks to a new file, which gets its name at the end.

    `subtype` is soundfile's; by default WAV has float32, FLAC 24 bits, MP3 and OGG their best. `frames` to come pick
    RF64 past 4 GB. The function raises UserError for samples that aren't finite: as PCM they would be loud noise.
    """
    options = {".wav": dict(format="RF64" if frames * channels * 4 > 4e9 else "WAV", subtype=subtype or "FLOAT"),
               ".flac": dict(subtype=subtype or "PCM_24"), ".ogg": dict(compression_level=0.0),
               ".mp3": dict(compression_level=0.0, bitrate_mode="CONSTANT")}.get(Path(path).suffix.lower(), {})
    with replacing(path) as temporary:
        def write(block):
            if not torch.isfinite(block).all():
                raise UserError(f"{path}: not written: NaN or infinite samples")
            for part in block.split(1 << 18, dim=-1):                 # libsndfile crashes on long blocks of OGG
                file.write(part.T.numpy())
        try:
            with soundfile.SoundFile(temporary, "w", rate, channels, **options) as file:
                yield write
        except soundfile.LibsndfileError as error:                    # such as a full disk
            raise UserError(f"{path}: not written: {error}") from error

def write_audio(path, audio, rate):
    """Write a (C, L) tensor; see write_blocks."""
    with write_blocks(path, rate, *audio.shape) as write:
        write(audio)

def to_channels(audio, channels):
    """(..., 1 or 2, L) -> (..., channels, L): mono is doubled, stereo averaged; UserError for anything else."""
    found = audio.shape[-2]
    if found == channels:
        return audio
    if found == 1:
        return audio.repeat_interleave(channels, dim=-2)
    if channels == 1 and found == 2:
        return audio.mean(dim=-2, keepdim=True)
    raise UserError(f"{channels} channels expected, or 1; found {found}")

ZEROS = 96                                      # zero crossings of the sinc on each side: passband to 0.92 Nyquist
ATTENUATION = 120                               # dB, from the lower of both Nyquist frequencies on

@functools.lru_cache(maxsize=256)
def sinc_kernel(up, down):
    """The windowed sinc of each of the `up` output phases: ((up, 1, down + 2 * half) float32, half)."""
    scale = min(1.0, up / down)                                       # the lower rate, in units of the input's
    transition = (ATTENUATION - 7.95) / (14.36 * 2 * ZEROS)           # Kaiser's formula, in units of the lower rate
    beta = 0.1102 * (ATTENUATION - 8.7)
    half = math.ceil(ZEROS / scale)
    if up * (down + 2 * half) > 1 << 25:
        raise UserError(f"two sample rates in a simpler ratio than {up}:{down} expected")
    t = np.arange(up)[:, None] * down / up - (np.arange(down + 2 * half) - half)    # input samples
    taper = np.i0(beta * np.sqrt(np.clip(1 - (t * scale / ZEROS) ** 2, 0, None))) * (abs(t) * scale < ZEROS)
    kernel = np.sinc(t * scale * (1 - transition)) * taper
    kernel /= kernel.sum(axis=1, keepdims=True)                       # gain 1 at 0 Hz in every phase
    return torch.from_numpy(kernel[:, None].astype("float32")), half

def resample_blocks(blocks, rate_in, rate_out):
    """Resample a stream of (..., n) blocks; n samples in all become ceil(n * rate_out / rate_in)."""
    up, down = (rate // math.gcd(rate_in, rate_out) for rate in (rate_out, rate_in))
    if up == down:
        yield from blocks
        return
    kernel, half = sinc_kernel(up, down)
    step = max(1, (1 << 17) // down) * down                           # input samples at a time: whole phases
    blocks = iter(blocks)
    audio = next(blocks)
    margin = audio.new_zeros(*audio.shape[:-1], half)
    audio, blocks, last = torch.cat([margin, audio], dim=-1), itertools.chain(blocks, [margin]), False
    while not last:
        while audio.shape[-1] <= step + 2 * half and (block := next(blocks, None)) is not None:
            audio = torch.cat([audio, block], dim=-1)
        last = audio.shape[-1] <= step + 2 * half
        window, audio = audio[..., :step + 2 * half], audio[..., step:]
        n = window.shape[-1] - 2 * half
        x = F.pad(window, (0, down - n % down)).flatten(0, -2)[:, None]  # (..., n) -> (N, 1, n'): one per channel
        y = F.conv1d(x, kernel, stride=down).transpose(1, 2)          # (N, n / down, up): phases interleaved
        yield y.reshape(*window.shape[:-1], -1)[..., :-(-n * up // down)]

def resample(audio, rate_in, rate_out):
    """(..., L) at rate_in -> (..., ceil(L * rate_out / rate_in)) at rate_out: polyphase windowed sinc."""
    return torch.cat(list(resample_blocks([audio], rate_in, rate_out)), dim=-1)

# ---- MUSDB18, MUSDB18-HQ and any data in their layout ----------------------------------------------------------------

VALID = ("Actions - One Minute Smile", "Clara Berry And Wooldog - Waltz For My Victims",
         "Johnny Lokke - Promises & Lies", "Patrick Talbot - A Reason To Leave", "Triviul - Angelsaint",
         "Alexander Ross - Goodbye Bolero", "Fergessen - Nos Palpitants", "Leaf - Summerghost",
         "Skelpolu - Human Mistakes", "Young Griffo - Pennies", "ANiMAL - Rockshow", "James May - On The Line",
         "Meaxic - Take A Step", "Traffic Experiment - Sirens")

@dataclasses.dataclass(frozen=True)
class Track:
    """One song: its name, its files by source, and their common length (samples), sample rate (Hz) and channels."""
    name: str
    files: dict
    frames: int
    sample_rate: int
    channels: int

    def load(self, source, start=0, frames=-1):
        """(C, L) float32 samples of a stem, "accompaniment" or "mixture" (without a file: the sum of the stems)."""
        parts = {"accompaniment": SOURCES[1:], "mixture": SOURCES}
        names = [source] if source in self.files else parts[source]
        return functools.reduce(torch.Tensor.add_, (read_audio(self.files[name], start, frames)[0] for name in names))

def open_track(folder):
    """A folder of {vocals,bass,drums,other[,mixture]}.{wav,flac,ogg} -> Track. UserError where it is no such one."""
    files = {}
    for source in SOURCES + ("mixture",):
        found = [path for suffix in (".wav", ".flac", ".ogg") if (path := folder / (source + suffix)).is_file()]
        if not found and source != "mixture":
            raise UserError(f"{folder}: {source}.wav expected (or .flac, .ogg), found "
                            f"{', '.join(sorted(path.name for path in folder.iterdir())) or 'an empty folder'}")
        files.update({source: path for path in found[:1]})
    formats = {}
    for path in files.values():
        with open_audio(path) as file:
            formats[path.name] = (file.frames, file.samplerate, file.channels)
    if len(set(formats.values())) > 1:
        raise UserError(f"{folder}: files of one length, rate and number of channels expected, found "
                        + ", ".join(f"{name} {n} samples {rate} Hz {c} ch" for name, (n, rate, c) in formats.items()))
    return Track(folder.name, files, *formats[files["vocals"].name])

def decode_stems(path, folder):
    """Decode the streams of a .stem.mp4 or the stems of a song's folder to WAV in `folder`, whole or not at all."""
    streams = ("mixture", "drums", "bass", "other", "vocals")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as temporary:
        song = Path(temporary, "song")
        song.mkdir()
        for source, file in open_track(path).files.items() if path.is_dir() else ():
            with open_audio(file) as audio:                           # exact: 16 bits are read / 2^15, written x 32767
                kind, scale = ("PCM_16", 32768 / 32767) if audio.subtype == "PCM_16" else ("FLOAT", 1)
                wav = song / f"{source}.wav"
                with write_blocks(wav, audio.samplerate, audio.channels, audio.frames, kind) as write:
                    for block in read_blocks(audio):
                        write(block * scale)
        if path.is_file():
            run_ffmpeg(path, *itertools.chain.from_iterable(          # int16, as museval's own numbers were made
                ("-map", f"0:a:{i}", "-c:a", "pcm_s16le", song / f"{name}.wav") for i, name in enumerate(streams)))
        if not folder.is_dir():                                       # another process may have been faster
            song.rename(folder)

def musdb_root(root):
    """The dataset's folder: `root`, or its parent where the user gave ROOT/train. UserError where there is none."""
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise UserError(f"{root}: a folder that holds train/ and test/ expected, found no folder")
    subsets = ("train", "valid", "test")
    if root.name in subsets and not any((root / name).is_dir() for name in subsets):
        print(f"notice: {root} is a subset; using {root.parent} as the dataset", file=sys.stderr)
        return root.parent
    return root

def musdb_tracks(root, subset, cache=None):
    """The songs of `subset` ("train", "valid" or "test") below `root` -> list of Track, by name.

    ROOT/{train,test}/Artist - Title/vocals.wav ... or ROOT/{train,test}/Artist - Title.stem.mp4, which is decoded once
    to `cache` (ROOT-wav beside ROOT), as flac and ogg stems are where a cache is given, for they take ten times as long
    to read. Validation songs are those of ROOT/valid or else the 14 official ones of train.
    Raises UserError for a wrong layout, with what was expected and what was found.
    """
    root, every = musdb_root(root), bool(cache)
    cache = Path(cache or root.with_name(root.name + "-wav"))
    by_title = subset != "test" and not (root / "valid").is_dir()
    folder = root / ("train" if by_title else subset)
    place = folder if folder.is_dir() else root
    entries = sorted(place.iterdir())
    songs = {path.name.removesuffix(".stem.mp4"): path for path in entries if place == folder
             and not path.name.startswith((".", "__MACOSX")) and (path.is_dir() or path.name.endswith(".stem.mp4"))}
    if by_title:
        songs = {name: path for name, path in songs.items() if (name in VALID) == (subset == "valid")}
    if not songs:
        expected = (f"{subset}/Artist - Title/{{vocals,bass,drums,other}}.wav or {subset}/Artist - Title.stem.mp4"
                    + ", or some of MUSDB18's 14 validation songs in train/" * (subset == "valid"))
        found = ", ".join(path.name for path in entries[:5]) or "an empty folder"
        raise UserError(f"{place}: no songs for '{subset}': {expected} expected, found {found}")
    for i, (name, path) in enumerate(songs.items(), 1):
        if path.is_file() or every and not (path / "vocals.wav").is_file():
            songs[name] = cache / folder.name / name
            if not songs[name].is_dir():
                decode_stems(path, songs[name])
                print(f"decoded {i}/{len(songs)} {path.name} -> {songs[name]}", file=sys.stderr)
    return [open_track(path) for path in songs.values()]

# ---- Training examples -----------------------------------------------------------------------------------------------

def part(x, rng, low, high):
    """The places of a random part of x (C, L), `low` to `high` times as long."""
    length = int(x.shape[1] * rng.uniform(low, high))
    return torch.arange(length) + int(rng.integers(x.shape[1] - length + 1))

AUGMENTATIONS = {   # optional, in PM-Unet's order: probability, (C, L), rng -> (C, L'); pitch and reverse: vocals only
    "shift": (0.5, lambda x, rng: x[:, rng.integers(min(8192, x.shape[1]) + 1):]),
    "pitch": (0.2, lambda x, rng: resample(
        baselines.stretch(x, percent := int(rng.integers(75, 134))), percent, 100)[:, :x.shape[1]]),    # +-5 semitones
    "speed": (0.2, lambda x, rng: resample(x, int(rng.integers(80, 131)), 100)),      # 0.8 to 1.3 times, pitch too
    "swap": (0.5, lambda x, rng: x.flip(0)), "flip": (0.5, lambda x, rng: -x),
    "gain": (1.0, lambda x, rng: x * rng.uniform(0.25, 1.25)),
    "mask": (0.1, lambda x, rng: x.index_fill(1, part(x, rng, 0, min(1, 88200 / max(1, x.shape[1]))), 0)),
    "mono": (0.1, lambda x, rng: x[[int(rng.integers(len(x)))] * len(x)]),            # left or right
    "reverse": (0.2, lambda x, rng: x.index_copy(1, i := part(x, rng, 0.2, 0.4), x[:, i.flip(0)])),
}

class Segments(torch.utils.data.Dataset):
    """Training examples: [i] -> (mixture (C, L), targets (S, C, L)), a pure function of (seed, i) without an end.

    Each source comes from its own random songs (random remix), mix_audio segments of it are summed, except for bass
    (mix-audio, section 4.2), and the mixture is the sum of the sources. Where a song turns out to be unreadable it is
    named, `unreadable` counts that, for all workers, and the next draw stands in; UserError after ten in a row.
    """
    def __init__(self, tracks, config, seconds=3.0, mix_audio=2, augment=(), seed=0):
        for track in tracks:
            if track.sample_rate != config.sample_rate:
                raise UserError(f"{track.name}: {config.sample_rate} Hz expected, found {track.sample_rate} Hz")
        self.tracks, self.config, self.mix_audio, self.augment, self.seed = tracks, config, mix_audio, augment, seed
        self.length = round(seconds * config.sample_rate)
        self.read_length = math.ceil(self.length * (1.3 if "speed" in augment else 1)) + 8192 * ("shift" in augment)
        self.unreadable = torch.zeros(len(tracks), dtype=torch.int64).share_memory_()     # draws of each song
        self.ends = np.cumsum([max(1, track.frames - self.read_length + 1) for track in tracks])
        two = {"vocals", "accompaniment"}                             # as in the published code: these two are
        self.sources = ("vocals", "accompaniment") if two >= set(config.targets) else SOURCES    # learned as a pair

    def segment(self, source, rng, tries=10):
        """A random segment of `source`, every position of every song equally likely -> (C, L)."""
        position = int(rng.integers(self.ends[-1]))
        k = int(np.searchsorted(self.ends, position, side="right"))
        start = position - (int(self.ends[k - 1]) if k else 0)
        track = self.tracks[k]
        try:
            audio = to_channels(track.load(source, start, self.read_length), self.config.channels)
            if audio.shape[-1] < min(self.read_length, track.frames - start):
                raise UserError(f"{track.name}: {source} is shorter than it was")
        except (OSError, RuntimeError, UserError) as error:           # RuntimeError: stems of several lengths
            if tries == 1:
                raise UserError(f"{track.name}: {one_line(error)}") from error
            if not self.unreadable[k]:
                print(f"notice: another song instead of {track.name}: {one_line(error)}", file=sys.stderr, flush=True)
            self.unreadable[k] += 1
            return self.segment(source, rng, tries - 1)
        for name in filter(self.augment.__contains__, AUGMENTATIONS):
            probability, function = AUGMENTATIONS[name]
            if rng.random() < probability and (source == "vocals" or name not in ("pitch", "reverse")):
                audio = function(audio if name in ("shift", "pitch", "speed") else audio[:, :self.length], rng)
        return F.pad(audio, (0, max(0, self.length - audio.shape[-1])))[:, :self.length]     # of a short song: zeros

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, i))
        source = {name: functools.reduce(torch.Tensor.add_, (
            self.segment(name, rng) for _ in range(1 if name == "bass" else self.mix_audio))) for name in self.sources}
        mixture = sum(source.values())
        source.setdefault("accompaniment", mixture - source["vocals"])
        return mixture, torch.stack([source[name] for name in self.config.targets])

# ---- Spectrograms: (B, C, L) <-> (B, C, T, F) complex; any leading axes ----------------------------------------------

def stft(audio, window=2048, hop=441, padding="reflect"):
    """(..., L) float -> (..., T, F) complex: centred, periodic Hann. T = L // hop + 1. Reflected, frame 0 is real."""
    x = F.pad(audio, (0, max(0, window // 2 + 1 - audio.shape[-1]))).flatten(0, -2)   # reflection needs that many
    hann = torch.hann_window(window, dtype=x.dtype, device=x.device)
    X = torch.stft(x, window, hop, window=hann, pad_mode=padding, return_complex=True)
    return X.transpose(1, 2).unflatten(0, audio.shape[:-1])           # (N, F, T) -> (..., T, F)

def istft(X, length, window=2048, hop=441):
    """(..., T, F) complex -> (..., length) float: the inverse of stft."""
    hann = torch.hann_window(window, dtype=X.real.dtype, device=X.device)
    x = torch.istft(X.flatten(0, -3).transpose(1, 2), window, hop, window=hann, length=max(length, window // 2 + 1))
    return x[:, :length].unflatten(0, X.shape[:-2])

# ---- Heads: what the numbers that come out of the network mean -------------------------------------------------------
# A rule maps the mixture's X (..., T, F) and real heads of the same shape to the estimate's complex spectrogram.
# The names of its arguments name the heads.

def magnitude_of(X):
    """|X| with a floor that keeps the gradient finite at 0."""
    return (X.real ** 2 + X.imag ** 2).clamp(min=1e-10).sqrt()

def phase_of(X):
    """e^(j angle X), and 0 where X is 0."""
    return X / magnitude_of(X)

def rotation(p_r, p_i):
    """e^(j angle M), M's real part going with p_r and its imaginary part with p_i, and 0 where both are 0."""
    length = (p_r ** 2 + p_i ** 2).clamp(min=1e-20).sqrt()
    return torch.complex(p_r / length, p_i / length)                  # eq. 6: cos and sin of angle M

def magnitude_mask(X, mask):
    """A mask in [0, 1] on the magnitude, with the mixture's phase (eq. 1)."""
    return torch.sigmoid(mask) * X                                    # eq. 2

def complex_mask(X, o_r, o_i):
    """UNetPhase: the bounded complex mask of Choi et al. 2019, M = tanh(|O|) O / |O|."""
    length = (o_r ** 2 + o_i ** 2).clamp(min=1e-20).sqrt()
    return torch.tanh(length) * rotation(o_r, o_i) * X                # eq. 4

def decouple(X, mask, p_r, p_i):
    """A mask in [0, 1] on the magnitude and a rotation of the phase, estimated apart."""
    M = torch.sigmoid(mask) * rotation(p_r, p_i)                      # eq. 7
    return M * X                                                      # eq. 4

def decouple_plus(X, mask, q, p_r, p_i):
    """As decouple; a magnitude q that is added directly lets |M| exceed 1."""
    magnitude = F.relu(torch.sigmoid(mask) * magnitude_of(X) + q)     # eq. 8
    return magnitude * rotation(p_r, p_i) * phase_of(X)               # eq. 9

# ---- Backbones: (B, D_in, T, F) -> (B, D, T, F), T and F multiples of what the pooling divides them by ---------------

def batch_norm(features):
    return nn.BatchNorm2d(features, momentum=0.01)                    # momentum as in the published code

class ConvBlock(nn.Sequential):
    """Two 3x3 convolutions, normalised and rectified after each: those of the 33-layer UNet."""
    def __init__(self, features_in, features):
        super().__init__(
            nn.Conv2d(features_in, features, 3, padding=1, bias=False), batch_norm(features), nn.LeakyReLU(0.01, True),
            nn.Conv2d(features, features, 3, padding=1, bias=False), batch_norm(features), nn.LeakyReLU(0.01, True))

class ResBlock(nn.Module):
    """RCB (figure 4c): two 3x3 convolutions, normalised and rectified before each, around a shortcut."""
    def __init__(self, features_in, features):
        super().__init__()
        self.bn1 = batch_norm(features_in)
        self.conv1 = nn.Conv2d(features_in, features, 3, padding=1, bias=False)
        self.bn2 = batch_norm(features)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.shortcut = nn.Identity() if features_in == features else nn.Conv2d(features_in, features, 1)

    def forward(self, x):
        y = self.conv1(F.leaky_relu(self.bn1(x), 0.01, inplace=True))             # (B, D_in, T, F) -> (B, D, T, F)
        y = self.conv2(F.leaky_relu(self.bn2(y), 0.01, inplace=True))             # in place: batch norm keeps its input
        return y.add_(self.shortcut(x))                                           # a convolution needs no output

def res_blocks(features_in, features):
    """Four RCBs: the 8 convolutions of an REB, ICB or RDB (figure 4a, b)."""
    return nn.Sequential(ResBlock(features_in, features), *(ResBlock(features, features) for _ in range(3)))

class Decoder(nn.Module):
    """Up-sample by `stride`, join the encoder's output, convolve."""
    def __init__(self, features_in, features, stride, block, residual):
        super().__init__()
        up = nn.ConvTranspose2d(features_in, features, stride, stride, bias=False)
        self.up = (nn.Sequential(batch_norm(features_in), nn.ReLU(True), up) if residual else
                   nn.Sequential(up, batch_norm(features), nn.LeakyReLU(0.01, True)))
        self.block = block(2 * features, features)

    def forward(self, x, skips):
        return self.block(torch.cat([self.up(x), skips.pop()], dim=1))      # popped here: freed before the block runs

class UNet(nn.Module):
    """(B, D_in, T, F) -> (B, width, T, F): 32 or, residual, 142 convolutions; the heads are the 33rd and the 143rd.

    6 encoders, 6 decoders with skip connections, one more block; the residual one has 4 blocks in between (ICBs).
    """
    def __init__(self, features_in, width, residual):
        super().__init__()
        widths = [width * m for m in (1, 2, 4, 8, 12, 12)]            # 32, 64, 128, 256, 384, 384
        block = res_blocks if residual else ConvBlock
        self.strides = [(2, 2)] * 5 + [(1, 2) if residual else (2, 2)]    # (T, F), from the first encoder to the last
        self.encoders = nn.ModuleList(map(block, [features_in] + widths, widths))
        self.bottleneck = nn.Sequential(*(block(widths[-1], widths[-1]) for _ in range(4 if residual else 0)))
        self.decoders = nn.ModuleList(
            Decoder(i, o, stride, block, residual)
            for i, o, stride in zip([widths[-1]] + widths[:0:-1], widths[::-1], self.strides[::-1]))
        self.after = block(width, width)
        self.frame_multiple = math.prod(stride[0] for stride in self.strides)     # of T: 64, or 32 when residual

    def forward(self, x):
        skips = []
        for encoder, stride in zip(self.encoders, self.strides):
            skips.append(encoder(x))                                  # (B, D_i, T / 2^i, F / 2^i)
            x = F.avg_pool2d(skips[-1], stride)                       # T and F halved; the residual's last only F
        x = self.bottleneck(x)
        for decoder in self.decoders:
            x = decoder(x, skips)
        return self.after(x)                                          # (B, width, T, F)

unet = functools.partial(UNet, residual=False)
resunet = functools.partial(UNet, residual=True)

def fold_batch_norms(model):
    """Merge each batch norm that follows a convolution into it -> model: faster, equal up to rounding, not to train."""
    for module in model.modules():
        if isinstance(module, (ResBlock, nn.Sequential)):             # whose children are in the order of their use
            for (before, conv), (after, norm) in itertools.pairwise(module.named_children()):
                if isinstance(conv, nn.modules.conv._ConvNd) and isinstance(norm, nn.modules.batchnorm._BatchNorm):
                    setattr(module, before, torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm, conv.transposed))
                    setattr(module, after, nn.Identity())
    return model

# ---- The model: everything between two waveforms ---------------------------------------------------------------------

class Separator(nn.Module):
    """(B, C, L) -> (B, S, C, L) for any L. Under autocast only the backbone leaves float32."""
    def __init__(self, config, backbone, rule):
        super().__init__()
        self.config, self.rule, self.stride = config, rule, config.hop         # blocks of a song share the frames' grid
        maps = len(config.targets) * config.channels
        self.norm = batch_norm(config.window // 2 + 1)                # of |X|, per bin: not in the paper
        self.backbone = backbone(config.channels, config.width)
        names = list(inspect.signature(rule).parameters)[1:]
        self.heads = nn.ModuleDict({name: nn.Conv2d(config.width, maps, 1) for name in names})   # J = maps * len(names)
        for name, parameter in self.named_parameters():               # as in the published code
            if parameter.dim() == 4:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, mixture):
        config = self.config
        X = stft(mixture, config.window, config.hop)                              # (B, C, T, F)
        x = self.norm(magnitude_of(X).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)    # (B, F, C, T) and back
        frames = x.shape[2]
        x = F.pad(x[..., :-1], (0, 0, 0, -frames % self.backbone.frame_multiple)) # (B, C, T', F - 1): no Nyquist bin
        features = self.backbone(x)[:, :, :frames].to(X.real.dtype)                        # (B, D, T, F - 1)
        with torch.autocast(mixture.device.type, enabled=False):
            heads = {name: head(features).unflatten(1, (-1, config.channels))     # (B, S, C, T, F - 1)
                     for name, head in self.heads.items()}
            heads.update({name: heads[name].tanh() for name in heads if name in ("p_r", "p_i")})  # not in the paper
            Y = F.pad(self.rule(X[:, None, ..., :-1], **heads), (0, 1))           # (B, S, C, T, F): 0 at Nyquist
            return istft(Y, mixture.shape[-1], config.window, config.hop)         # (B, S, C, L)

class Relative(nn.Module):
    """(B, C, L) -> (B, S, C, L) for any L, by a network of baselines.py: of waveforms, or between stft and istft."""
    def __init__(self, config, backbone, spectral=True):
        super().__init__()
        self.config, self.spectral, self.sizes = config, spectral, (config.window, config.hop)
        shape = (config.channels, config.window // 2 + 1) if spectral else (config.channels,)
        self.backbone = backbone(*shape, len(config.targets), config.width, rest(config.targets))
        self.stride = self.backbone.STRIDE * (config.hop if spectral else 1)      # samples

    def forward(self, mixture):
        if not self.spectral:
            return self.backbone(mixture)
        return istft(self.backbone(stft(mixture, *self.sizes, "constant")), mixture.shape[-1], *self.sizes)

def rest(targets):
    """The number of the target that the others leave of the mixture, where all together make it up; else None."""
    groups = {frozenset(SOURCES): "other", frozenset(("vocals", "accompaniment")): "accompaniment"}
    return targets.index(groups[frozenset(targets)]) if frozenset(targets) in groups else None

MODELS = {
    # Table 3                                  backbone  rule           J (stereo, one target)
    "UNetPhase":        lambda c: Separator(c, unet,     complex_mask),     # 4
    "UNet":             lambda c: Separator(c, unet,     magnitude_mask),   # 2
    "UNetDecouple":     lambda c: Separator(c, unet,     decouple),         # 6
    "UNetDecouple+":    lambda c: Separator(c, unet,     decouple_plus),    # 8
    "ResUNet":          lambda c: Separator(c, resunet,  magnitude_mask),   # 2
    "ResUNetDecouple":  lambda c: Separator(c, resunet,  decouple),         # 6
    "ResUNetDecouple+": lambda c: Separator(c, resunet,  decouple_plus),    # 8
    # relatives, from the other seeds
    "Wave-U-Net":       lambda c: Relative(c, baselines.WaveUNet, False),
    "Wave-U-Net-12":    lambda c: Relative(c, functools.partial(baselines.WaveUNet, stoller=True), False),
    "DPRNN":            lambda c: Relative(c, baselines.DPRNN),
    "PM-Unet":          lambda c: Relative(c, baselines.PMUnet),
    "PM-Unet-conv":     lambda c: Relative(c, functools.partial(baselines.PMUnet, lstm=False)),
}

# ---- Whole tracks, in constant memory: blocks in, blocks out ---------------------------------------------------------

SEGMENT, OVERLAP = 639 * 441, 63 * 441          # 6.39 and 0.63 s: 640 frames, 576 apart, are pooled alike, unpadded

def separate_windows(model, windows, bf16):
    """(B, C, n) on the CPU -> (B, S, C, n) on the CPU, or None where the device's memory is too small for that."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return model(windows.to(device)).float().cpu()
    except RuntimeError as error:                                     # torch.OutOfMemoryError, MPS's and the CPU's own
        if not re.search("out of memory|(can't allocate|not enough) memory|ALLOC_FAILED", str(error)):
            raise
    torch.cuda.empty_cache()                                          # of unused memory, if CUDA is in use

def separate_blocks(model, blocks, segment=SEGMENT, overlap=OVERLAP, batch_size=1, bf16=False):
    """Separate a stream of (C, n) blocks -> a stream of (S, C, n') blocks of the same total length.

    The model sees windows of `segment` samples, `batch_size` at once. Of the `overlap` between two neighbours the
    middle half is cross-faded; the quarters beside it are context that only the other neighbour's samples are taken
    from. Where memory runs out, fewer windows go at once, then shorter ones; UserError where that doesn't help.
    """
    fade = overlap // 2
    context = (overlap - fade) // 2
    if segment - overlap < max(fade, 1):
        raise UserError(f"a segment of at least 1.5 overlaps expected, found {segment} and {overlap} samples")
    ramp = (torch.arange(fade) + 0.5) / max(fade, 1)                  # ramp + (1 - ramp) = 1: nothing to normalise
    blocks = iter(blocks)
    mixture, tail, last = next(blocks), None, False                   # (C, n): from the next window's start on
    while not last:
        hop, excess = segment - overlap, (segment - overlap) % getattr(model, "stride", 1)
        hop -= excess if hop - excess > fade else 0                   # where a model samples all windows alike
        while mixture.shape[-1] <= segment + (batch_size - 1) * hop and (block := next(blocks, None)) is not None:
            mixture = torch.cat([mixture, block], dim=-1)
        last = mixture.shape[-1] <= segment                           # the last window ends with the stream
        count = 1 if last else min(batch_size, math.ceil((mixture.shape[-1] - segment) / hop))
        windows = mixture[None] if last else mixture.unfold(-1, segment, hop).transpose(0, 1)[:count]     # (B, C, n)
        estimates = separate_windows(model, windows, bf16)
        if estimates is None:
            last = False
            if count == 1 and hop // 2 < max(fade, 1):
                raise UserError(f"out of memory even with {segment} samples at once: try a lower --overlap, --bf16 or "
                                "--device cpu")
            batch_size, segment = (count // 2, segment) if count > 1 else (1, overlap + hop // 2)
            print(f"notice: out of memory; going on with {batch_size} x {segment} samples at once", file=sys.stderr)
            continue
        for y in estimates:                                           # (S, C, n)
            end = y.shape[-1] if last else hop + context
            if tail is None:
                yield y[..., :end]
            else:
                yield torch.lerp(tail, y[..., context:context + fade], ramp)
                yield y[..., context + fade:end]
            tail = y[..., end:end + fade]
        mixture = mixture[..., count * hop:]

def separate_track(model, mixture, segment=SEGMENT, overlap=OVERLAP, batch_size=1, bf16=False):
    """(C, L) at the model's rate -> (S, C, L), for any L >= 0; see separate_blocks."""
    return torch.cat(list(separate_blocks(model, [mixture], segment, overlap, batch_size, bf16)), dim=-1)

def complement(targets):
    """What mixture - estimate is for a model of `targets`: the other one of vocals and accompaniment, or None."""
    return {("vocals",): "accompaniment", ("accompaniment",): "vocals"}.get(tuple(targets))

# ---- SDR -------------------------------------------------------------------------------------------------------------

def decibels(signal, error):
    """The ratio of two energies in dB: inf without any error, -inf without any signal, NaN without either."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 10 * np.log10(np.divide(signal, error))                # eq. 5

def sdr(reference, estimate, epsilon=0.0):
    """10 log10(|s|^2 / |y - s|^2) in dB over all samples and channels of two arrays of one shape."""
    s, y = np.asarray(reference, dtype=np.float64), np.asarray(estimate, dtype=np.float64)
    return float(decibels(np.vdot(s, s) + epsilon, np.vdot(y - s, y - s) + epsilon))

# ---- Checkpoints: one file of plain dicts and tensors ----------------------------------------------------------------

def save_checkpoint(path, config, model, **state):
    """Write config, weights and whatever `state` (plain dicts, numbers, tensors) a run needs to one file, atomically.

    Raises UserError where it can't be written, as on a full disk: the file that was there stays.
    """
    content = {"config": dataclasses.asdict(config), "model": model.state_dict(), **state}
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        while error.__context__:                                      # torch hides "No space left" behind its own
            error = error.__context__
        raise UserError(f"{path}: not saved, an older file stays: {one_line(error)}") from error

def load_checkpoint(path, device="cpu"):
    """Read a checkpoint of ours or a published ResUNet143 file -> (config, model in eval mode on device, state).

    state holds all but config and weights, such as "step". Raises UserError for anything that is no such file.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: a checkpoint expected, found no file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                           # torch's advice on foreign pickles
            content = torch.load(path, map_location="cpu", weights_only=True)
        if "config" not in content:
            content = convert_published(content, Path(path).name)
        config = Config(**content.pop("config"))
        with torch.device("meta"):                                    # no memory and no random numbers needed yet
            model = MODELS[config.model](config)
        model.load_state_dict(content.pop("model"), assign=True)
    except Exception as error:      # there are a dozen ways for a truncated, foreign or unsafe file to fail here
        raise UserError(f"{path}: a checkpoint of this program or a published resunet143_ismir2021 file expected, "
                        f"found a damaged or foreign file ({type(error).__name__}; --debug tells more)") from error
    return config, model.to(device, torch.float32, memory_format=torch.channels_last).eval(), content

def convert_published(content, file_name):
    """{"step", "model"} of a published resunet143_ismir2021 file, whose name tells the target -> one like ours."""
    target = "accompaniment" if "accompaniment" in file_name else "vocals"
    ours, rules = {}, (
        (r"^bn0", lambda m: "norm"),
        (r"^encoder_block(\d)\.conv_block(\d)", lambda m: f"backbone.encoders.{int(m[1]) - 1}.{int(m[2]) - 1}"),
        (r"^conv_block7(\w)\.conv_block(\d)", lambda m: f"backbone.bottleneck.{'abcd'.index(m[1])}.{int(m[2]) - 1}"),
        (r"^decoder_block(\d)\.bn1", lambda m: f"backbone.decoders.{int(m[1]) - 1}.up.0"),
        (r"^decoder_block(\d)\.conv1", lambda m: f"backbone.decoders.{int(m[1]) - 1}.up.2"),
        (r"^decoder_block(\d)\.conv_block(\d)", lambda m: f"backbone.decoders.{int(m[1]) - 1}.block.{int(m[2]) - 2}"),
        (r"^after_conv_block1\.conv_block(\d)", lambda m: f"backbone.after.{int(m[1]) - 1}"),
        (r"\.abn2\.", lambda m: ".bn2."))
    for name, value in content["model"].items():
        if name.startswith(("stft.", "istft.")):                      # Fourier matrices: torch.stft has its own
            continue
        if name.endswith("abn2.weight"):                              # InPlaceABN scales by |w| + its eps
            value = value.abs() + 1e-5
        if name.startswith("after_conv2."):                           # (S*C*K, ...), the heads K running fastest
            for k, head in enumerate(("mask", "p_r", "p_i", "q")):
                ours[f"heads.{head}.{name.removeprefix('after_conv2.')}"] = value[k::4]
            continue
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        ours[name] = value
    return {"config": dataclasses.asdict(Config(targets=(target,))), "model": ours, "step": content.get("step")}

# ---- What the scripts share ------------------------------------------------------------------------------------------

def parser(description):
    """An argparse parser with the flags that all scripts share; it takes no abbreviations and complains in one line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    parser.add_argument("-d", "--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; auto: cuda if there is")
    parser.add_argument("--bf16", action="store_true", help="run the backbone in bfloat16")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser

def pick_device(name):
    """The torch device of a --device flag, under torchrun a GPU for each process. UserError where there is none."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    try:
        device = torch.device("cpu" if name == "auto" else name)
        torch.empty(1, device=device).cpu()
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: no such device here: {one_line(error)}") from None

def keep_memory():
    """Let glibc keep freed memory: by default every large tensor is mapped and unmapped, which doubles the time."""
    with contextlib.suppress(OSError, AttributeError):                # another C library: nothing to settle
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)                                           # M_MMAP_MAX: no allocation gets its own mapping
        libc.mallopt(-1, -1)                                          # M_TRIM_THRESHOLD: never give the heap's top back

def peak_memory(device):
    """The most memory that this process has held so far, on the GPU if it uses one, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2 ** 30
    with contextlib.suppress(ImportError):                            # Windows
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
    return math.nan

@torch.inference_mode()
def convolution_rate(device, dtype):
    """The FLOP/s of a 3x3 convolution of 384 features, the ResUNet's widest: what the machine can do now."""
    import torch.utils.benchmark                                      # 90 ms, for the benchmark only
    x, conv = (thing.to(device, dtype, memory_format=torch.channels_last) for thing in (
        torch.randn(1 if device.type == "cpu" else 32, 384, 64, 64), nn.Conv2d(384, 384, 3, padding=1, bias=False)))
    timer = torch.utils.benchmark.Timer("conv(x)", globals={"conv": conv, "x": x}, num_threads=torch.get_num_threads())
    return 2 * 9 * 384 * x.numel() / timer.blocked_autorange(min_run_time=0.2).median

def run(main):
    """Run a script: exit with main's code; what the user can mend becomes one line on stderr and exit code 2."""
    keep_memory()
    for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):             # unwind, so that no temporary file stays
        if signal.getsignal(number := getattr(signal, name)) == signal.SIG_DFL:       # ignored under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, UnicodeError, torch.OutOfMemoryError) as error:
        if "--debug" in sys.argv:
            raise
        message = str(error).strip().split("mss.UserError: ")[-1]     # from a loader's worker it comes with a traceback
        print(f"{Path(sys.argv[0]).name}: error: {message or type(error).__name__}", file=sys.stderr)
        sys.exit(2)
