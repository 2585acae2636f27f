"""Score models, or anyone's estimates, on whole songs: SDR as museval computes it, uSDR, oracles.

    python evaluate.py -m runs/vocals/best.pt --musdb /data/musdb18hq --report report
    python evaluate.py --estimates DIR --musdb /data/musdb18hq --full
    python evaluate.py --oracle --musdb /data/musdb18hq           # Table 1 and Figure 2

DIR holds the estimates of any system: DIR/test/Artist - Title/vocals.wav ...
"""
import base64
import collections
import contextlib
import csv
import dataclasses
import functools
import hashlib
import html
import io
import itertools
import json
import os
import signal
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

import baselines
import mss
import separate

SDR = "SDR (museval: median over 1 s frames, median over tracks)"
USDR = "uSDR (whole song, mean over tracks, those with a silent reference left out)"
METRICS = ("SDR", "ISR", "SIR", "SAR")          # ISR, SIR and SAR are aggregated as SDR is
CSV_COLUMNS = ("track", "system", "target", *METRICS, "uSDR", "frames", "frames_total")
TARGETS = ("vocals", "accompaniment", "bass", "drums", "other")

# ---- BSS Eval v4, as museval 0.4.1 computes it --------------------------------------------------

TAPS = 512              # length of the filters that a reference may be changed by
BLOCK = 1 << 14         # samples that one FFT correlates
PIECE = 1 << 18         # samples, about, of a song that are in memory at a time

def correlations(pieces):
    """How the channels x of references and estimates correlate with those of the references, s.

    r[i, j, TAPS - 1 + k] = sum over n of x_i[n + k] s_j[n] for |k| < TAPS, of a whole song.
    Pieces of (S, C, n) references and estimates -> (2 S C, S C, 2 TAPS - 1) float64.
    """
    hop = BLOCK - 2 * (TAPS - 1)
    step = 16 * hop                                                   # 6 s
    channels = (torch.cat(piece).flatten(0, 1) for piece in pieces)   # (2 S C, n)
    first = next(channels)
    margin = first.new_zeros(len(first), TAPS - 1)
    song = mss.Lookahead(itertools.chain([margin, first], channels, [margin]))

    cross = first.new_zeros(len(first), len(first) // 2, BLOCK // 2 + 1, dtype=torch.cdouble)
    while (x := song.peek(step + 2 * (TAPS - 1))).shape[-1] > 2 * (TAPS - 1):
        rest = -(x.shape[-1] - 2 * (TAPS - 1)) % hop
        x = F.pad(x, (0, rest)).double()
        s = x[:len(x) // 2, TAPS - 1:1 - TAPS].unflatten(-1, (-1, hop))
        X = torch.fft.rfft(x.unfold(-1, BLOCK, hop))                  # (2 S C, blocks, bins)
        S = torch.fft.rfft(s, BLOCK).conj()
        cross += torch.einsum("ntf,mtf->nmf", X, S)
        song.drop(step)
    return torch.fft.irfft(cross, BLOCK)[..., :2 * TAPS - 1]

def projection_filters(r_ss, r_ys, n_fft):
    """The filters that project each y on M signals s and their delayed copies.

    (M, M, 2 TAPS - 1) and (N, M, 2 TAPS - 1) correlations -> their response (bins, M, N).

    They solve G C = D. G is singular where channels are equal or silent, and nearly so where a
    band is: a ridge of 1e-15 of its mean diagonal, or ten times that and so on, lets Cholesky
    succeed; one step of refinement follows. UserError if not even a ridge of the diagonal helps.
    """
    M = len(r_ss)
    size = M * TAPS
    G = r_ss.unfold(-1, TAPS, 1).flip(2).permute(0, 2, 1, 3)          # [a, p, b, q] = r_ab[q - p]
    G = G.reshape(size, size)
    D = r_ys[..., TAPS - 1:].permute(1, 2, 0).reshape(size, -1)       # [(a, p), x] = r_xa[p]

    ridge = 0
    mean = G.diagonal().mean()
    for power in range(-15, 1):
        more = 10.0 ** power * mean + 1e-300 - ridge
        G.diagonal().add_(more)                                       # in place, for G is large
        ridge += more
        L, failed = torch.linalg.cholesky_ex(G)
        if not failed:
            break
    else:
        raise mss.UserError("references that can be projected on expected, found that no ridge "
                            "makes their correlations positive definite")

    C = torch.cholesky_solve(D, L)
    C += torch.cholesky_solve(D - G @ C + ridge * C, L)
    C = C.reshape(M, TAPS, -1)
    return torch.fft.rfft(C, n_fft, dim=1).transpose(0, 1).contiguous()

def check_arrays(s, y):
    """Raise UserError unless both are (sources, samples, channels)."""
    same = s.dim() == y.dim() == 3 and s.shape[0] == y.shape[0] and s.shape[2] == y.shape[2]
    if not same:
        raise mss.UserError("(sources, samples, channels) twice expected, found "
                            f"{(*s.shape,)} and {(*y.shape,)}")

def bss_eval(references, estimates, rate, filters=True):
    """BSS Eval v4 of (S, L, C) and (S, L', C) arrays.

    -> {"SDR": (S, frames), and with filters also "ISR", "SIR", "SAR"} in dB, as numpy arrays.

    Frames of 1 s; an incomplete last one is dropped unless it is the only one. Estimates are cut or
    zero-padded to L. A frame is NaN for all sources where in any reference or estimate the channels
    sum to 0 at each of its samples. UserError for other shapes and for NaN.
    Sources: Stoter, Liutkus, Ito 2018; museval.
    """
    s = torch.as_tensor(np.asarray(references), device="cpu")
    y = torch.as_tensor(np.asarray(estimates), device="cpu")
    check_arrays(s, y)
    sources, length, _ = s.shape
    y = y[:, :length]
    y = F.pad(y, (0, 0, 0, length - y.shape[1]))

    def read_s(part):
        return s[:, part].transpose(1, 2)                             # (S, C, n)

    def read_y(part):
        return y[:, part].transpose(1, 2)

    group = list(range(sources))
    (scores, _, _), = score_pieces(read_s, [read_y], [group], rate, length, filters)
    return scores

def score_pieces(read_s, systems, groups, rate, length, filters):
    """BSS Eval v4 of several systems' estimates of a song of `length` samples, read in pieces.

    read_s(slice) -> references (S, C, n). systems: functions read_y(slice) -> estimates; `filters`:
    whether the first of them gets ISR, SIR, SAR. groups: of sources that are evaluated together; a
    source is scored as one of the first group that has it.

    -> for each system bss_eval's scores and, of the whole song, |s|^2 and |y - s|^2, both (S,).
    """
    size = max(1, min(int(rate), length))                             # of a frame
    count = max(1, length // size)
    step = size * max(1, PIECE // size)
    parts = [slice(t, min(t + step, length)) for t in range(0, max(length, 1), step)]

    # The song is read once, with filters twice. One array holds all energies: small ones that stay
    # between large ones would hinder the C library from reusing the large ones' memory.
    sources = len(set().union(*groups))
    energies = np.zeros((len(systems), 3, sources, max(1, -(-length // size))))
    pieces = measured(read_s, systems, parts, size, energies)
    r = correlations(pieces) if filters else collections.deque(pieces, maxlen=0)

    results = []
    for of_s, of_error, sound in energies:
        if not np.isfinite(of_s + of_error).all():
            raise mss.UserError("finite samples expected, found NaN or infinity")

        counted = np.zeros((sources, count), bool)
        for group in reversed(groups):
            counted[group] = sound[group, :count].all(axis=0)

        scores = {"SDR": mss.decibels(of_s, of_error)[:, :count]}     # eq. 5
        if filters and not results:
            scores.update({name: np.full(counted.shape, np.nan) for name in METRICS[1:]})
            if counted.any():
                again = ((read_s(part), systems[0](part)) for part in parts)
                add_projections(scores, r, again, groups, counted, size)
        for values in scores.values():
            values[~counted] = np.nan
        results.append((scores, of_s.sum(1), of_error.sum(1)))
    return results

def measured(read_s, systems, parts, size, energies):
    """Yield the pieces of the references and of the first system, (S, C, n), and fill `energies`.

    (systems, 3, S, frames): |s|^2, |y - s|^2, and whether both sound. An incomplete last frame is
    one of them.
    """
    for part in parts:
        piece = read_s(part), systems[0](part)
        s = in_frames(piece[0], size)                                 # (S, frames, C, size)
        frames = slice(part.start // size, part.start // size + s.shape[1])
        energies[:, 0, :, frames] = energy(s)
        s_sounds = sounds(s)
        for k, read_y in enumerate(systems):
            y = in_frames(read_y(part) if k else piece[1], size)
            energies[k, 2, :, frames] = s_sounds & sounds(y)
            energies[k, 1, :, frames] = energy(y.sub_(s))
        yield piece

def in_frames(x, size):
    """(S, C, n) -> (S, frames, C, size) float64; zeros fill up the last frame."""
    frames = max(1, -(-x.shape[-1] // size))
    missing = frames * size - x.shape[-1]
    x = F.pad(x, (0, missing)).double() if missing else x.to(torch.double, copy=True)
    return x.unflatten(-1, (frames, size)).transpose(1, 2)

def energy(x):
    """(S, frames, C, size) -> (S, frames)"""
    return x.square().sum((2, 3))

def sounds(x):
    """In which frames of (S, frames, C, size) the channels don't sum to 0 at each sample."""
    return sum(x.unbind(2)).any(-1)

def add_projections(scores, r, pieces, groups, counted, size):
    """ISR, SIR and SAR of the frames that `counted` (S, frames) says, to `scores`.

    r: correlations of the pieces, references and estimates (S, C, n). An estimate is projected on
    its own reference and its delayed copies (own), and on those of all references of its group
    (all): what is lost on the way is error in space, interference and artefacts.
    """
    sources, frames = counted.shape
    n_fft = -(-(size + TAPS - 1) // 1024) * 1024                      # quick to transform

    # The filters, of whole songs.
    r_ss, r_ys = r.unflatten(1, (sources, -1)).unflatten(0, (2, sources, -1))     # (S, C, S, C, k)

    def filters(estimates, references):
        ss = r_ss[references][:, :, references].flatten(2, 3).flatten(0, 1)
        ys = r_ys[estimates][:, :, references].flatten(2, 3).flatten(0, 1)
        return projection_filters(ss, ys, n_fft)

    C_own = torch.stack([filters([j], [j]) for j in range(sources)])  # (S, bins, C, C)
    C_all = []
    scored = set()
    for group in groups:
        mine = [j for j in group if j not in scored]
        scored.update(group)
        if counted[mine].any():
            C_all.append((group, mine, filters(mine, group)))         # (bins, S' C, S'' C)

    # Energies by Parseval: all bins but the first and the last stand for two.
    weights = torch.full((n_fft // 2 + 1,), 2 / n_fft, dtype=torch.double, device="cpu")
    weights[0] = weights[-1] = 1 / n_fft

    def ratio(signal, error):
        energies = [((X.real ** 2 + X.imag ** 2) @ weights).sum(-1).numpy()
                    for X in (signal, error)]
        return mss.decibels(*energies)

    pairs = (pair for s, y in pieces for pair in zip(s.split(size, -1), y.split(size, -1)))
    for t, (s_t, y_t) in zip(range(frames), pairs):                   # (S, C, size)
        if not counted[:, t].any():
            continue
        S = torch.fft.rfft(s_t.double(), n_fft)                       # (S, C, bins)
        Y = torch.fft.rfft(y_t.double(), n_fft)
        P_own = torch.einsum("jfaz,jaf->jzf", C_own, S)
        P_all = torch.zeros_like(S)
        for group, mine, C in C_all:
            P = torch.einsum("faz,af->zf", C, S[group].flatten(0, 1))
            P_all[mine] = P.unflatten(0, (len(mine), -1))
        scores["ISR"][:, t] = ratio(S, P_own - S)
        scores["SIR"][:, t] = ratio(P_own, P_all - P_own)
        scores["SAR"][:, t] = ratio(P_all, Y - P_all)

# ---- Scores of one song -------------------------------------------------------------------------

def evaluated_together(names):
    """The groups of targets that museval would evaluate together: they decide which frames count.

    {vocals, accompaniment}; the stems that there are; an accompaniment without vocals by itself.
    """
    names = set(names)
    pair = {"vocals", "accompaniment"} <= names
    groups = []
    if pair:
        groups.append(["vocals", "accompaniment"])
    stems = [name for name in mss.SOURCES if name in names]
    if stems and not (pair and stems == ["vocals"]):
        groups.append(stems)
    if "accompaniment" in names and not pair:
        groups.append(["accompaniment"])
    return groups

class Stored:
    """A (C, L) signal that is read where it is sliced: [:, start:stop], as of a tensor.

    load(start, n) -> its next n samples; zeros follow where there are fewer.
    """

    def __init__(self, load, channels, frames):
        self.load = functools.lru_cache(1)(load)                      # who needs it needs it twice
        self.shape = (channels, frames)

    def __getitem__(self, where):
        start, stop, _ = where[1].indices(self.shape[1])
        audio = mss.to_channels(self.load(start, stop - start), self.shape[0])
        missing = stop - start - audio.shape[1]
        return F.pad(audio, (0, missing)) if missing else audio       # else it would copy, too

def stored(track, source, channels):
    """A source of a track, as Stored."""
    return Stored(functools.partial(track.load, source), channels, track.frames)

def stored_file(file, first, channels, frames):
    """An open file from sample `first` on, as Stored."""
    def load(start, n):
        place = min(first + start, file.frames)
        n = min(n, file.frames - place)
        here = file.tell() == place                                   # MP3 is seeked inexactly
        return mss.read_samples(file, n, None if here else place)
    return Stored(load, channels, frames)

def score(references, systems, rate, filters=False):
    """{target: audio} and {system: {target: audio}} -> {system: {target: scores}}.

    Audio is (C, L), a tensor or Stored. Scores are {"SDR": [dB per frame], ..., "uSDR": dB}, with
    filters of the first system also "ISR", "SIR", "SAR". uSDR (MDX21, SDX23): 1e-7 is added to both
    energies of the whole song; NaN where the reference is silent.
    """
    groups = evaluated_together(next(iter(systems.values())))
    targets = list(dict.fromkeys(name for group in groups for name in group))
    groups = [[targets.index(name) for name in group] for group in groups]

    def reader(signals):
        return lambda part: torch.stack([signals[name][:, part] for name in targets])

    readers = [reader(estimates) for estimates in systems.values()]
    length = references[targets[0]].shape[1]
    found = score_pieces(reader(references), readers, groups, rate, length, filters)

    results = {}
    for system, (frames, loudness, error) in zip(systems, found):
        usdr = mss.decibels(loudness + 1e-7, error + 1e-7)
        usdr[loudness == 0] = np.nan
        results[system] = {}
        for j, name in enumerate(targets):
            scores = {metric: values[j].tolist() for metric, values in frames.items()}
            results[system][name] = {**scores, "uSDR": float(usdr[j])}
    return results

def mixture_for(model, track):
    """A track's mixture in the model's number of channels, as Stored. UserError at other rates."""
    rate = model.config.sample_rate
    if track.sample_rate != rate:
        raise mss.UserError(f"{track.name}: {rate} Hz expected, found {track.sample_rate} Hz")
    return stored(track, "mixture", model.config.channels)

def separated(model, track, bf16=False):
    """A model's (mixture (C, L), {target: (C, L)}), in its number of channels."""
    mixture = mixture_for(model, track)[:, :]
    estimates = mss.separate_track(model, mixture, bf16=bf16)
    return mixture, dict(zip(model.config.targets, estimates))

def separated_on_disk(stack, model, track, folder, bf16=False):
    """As separated, but Stored, in temporary files in `folder` that `stack` removes."""
    mixture = mixture_for(model, track)
    channels, length = mixture.shape
    blocks = (mixture[:, t:t + PIECE] for t in range(0, max(length, 1), PIECE))
    blocks = mss.separate_blocks(model, blocks, bf16=bf16)            # (S, C, n) each

    temporary = tempfile.TemporaryDirectory(prefix=mss.partial_prefix(), dir=folder)
    folder = stack.enter_context(temporary)
    targets = model.config.targets
    paths = [Path(folder, f"{i}.wav") for i in range(len(targets))]
    separate.write_stems(paths, blocks, track.sample_rate, channels, length, "FLOAT")

    files = [stack.enter_context(mss.open_audio(path)) for path in paths]
    estimates = [stored_file(file, 0, channels, length) for file in files]
    return mixture, dict(zip(targets, estimates))

def estimate_files(folder, subset, name):
    """{target: file} of FOLDER/SUBSET/NAME/TARGET.wav (or flac, mp3, ...), or of FOLDER/NAME.

    Of two files for a target FOLDER/SUBSET's counts, and wav. UserError without any.
    """
    places = [Path(folder, name), Path(folder, subset, name)]
    files = {}
    for place in places:
        # The last one wins.
        for path in sorted(place.glob("*"), key=lambda path: (path.suffix.lower() == ".wav", path)):
            if path.stem.lower() in TARGETS and path.suffix.lower() in mss.AUDIO:
                files[path.stem.lower()] = path
    if not files:
        raise mss.UserError(f"{places[1]}: some of {', '.join(TARGETS)}.wav expected, found none")
    return files

def read_estimates(stack, files, track):
    """{target: file} -> (mixture, {target: Stored}); `stack` closes the files.

    Other lengths and numbers of channels are made the song's, with a notice.
    """
    song, first = (track.song, track.first) if isinstance(track, Excerpt) else (track, 0)
    expected = (song.channels, song.frames)
    estimates = {}
    for name, path in files.items():
        file = stack.enter_context(mss.open_audio(path))
        if file.samplerate != track.sample_rate:
            raise mss.UserError(f"{path}: {track.sample_rate} Hz expected, found "
                                f"{file.samplerate} Hz")

        found = (file.channels, file.frames)
        if found != expected:
            print(f"notice: {path}: (channels, samples) {found}, made {expected}: cut or zeros "
                  "added", file=sys.stderr)
        estimates[name] = stored_file(file, first, track.channels, track.frames)
    return stored(track, "mixture", track.channels), estimates

def complemented(mixture, estimates):
    """As mss.with_complements; what follows from the others is Stored."""
    def load(name, start, n):
        part = slice(start, start + n)
        parts = {given: audio[:, part] for given, audio in estimates.items()}
        return mss.with_complements(mixture[:, part], parts)[name]

    names = mss.with_complements(0, dict.fromkeys(estimates, 0))
    more = {name: Stored(functools.partial(load, name), *mixture.shape)
            for name in names if name not in estimates}
    return {**estimates, **more}

def compare(track, mixture, estimates, filters=False):
    """Score estimates, and the mixture as estimate; audio is (C, L), a tensor or Stored.

    -> ({"estimate": scores, "mixture": scores}, references, estimates and what follows from them).
    """
    estimates = complemented(mixture, estimates)
    references = {name: stored(track, name, mixture.shape[0]) for name in estimates}
    systems = {"estimate": estimates, "mixture": dict.fromkeys(estimates, mixture)}
    scores = score(references, systems, track.sample_rate, filters)
    return scores, references, estimates

# ---- Oracles: what ideal masks reach (sections 2.5 and 2.6 of the paper) ------------------------

def ideal_binary_mask(S, X):
    return S.abs() > (X - S).abs()

def ideal_ratio_mask(limit):
    return lambda S, X: mss.ideal_mask(S, X, limit).abs()

def complex_ideal_ratio_mask(limit):
    return lambda S, X: mss.ideal_mask(S, X, limit)

ORACLES = {             # (S, X) -> M: the columns of Table 1
    "mixture": lambda S, X: 1,
    "IBM": ideal_binary_mask,
    "IRM(1)": ideal_ratio_mask(1),
    "IRM(inf)": ideal_ratio_mask(np.inf),
    "cIRM(1)": complex_ideal_ratio_mask(1),
    "cIRM(2)": complex_ideal_ratio_mask(2),
    "cIRM(5)": complex_ideal_ratio_mask(5),
    "cIRM(10)": complex_ideal_ratio_mask(10),
    "cIRM(inf)": complex_ideal_ratio_mask(np.inf),
}
SIDE = 129              # cells of Figure 2's histograms on each axis, for -2 to 2
HOP = 441               # mss.stft's, whose window has 2048 samples: what lies within a MARGIN,
MARGIN = 5 * HOP        # which is longer, has a say

def spectrograms(mixture, references):
    """A function (source or "mixture", start, stop) -> the spectrogram (C, T, F) of these samples
    and their surroundings, and how many samples come before `start` in it. It keeps the latest.
    """
    @functools.lru_cache(len(references) + 1)
    def spectrogram(source, start, stop):
        audio = references.get(source, mixture)
        first = max(0, start // HOP * HOP - MARGIN)
        return mss.stft(audio[:, first:stop + MARGIN]), start - first
    return spectrogram

def oracle_estimates(mixture, references):
    """{mask: {target: Stored}}: the mixture with the ideal masks of each."""
    spectrogram = spectrograms(mixture, references)

    def load(mask, source, start, n):
        S, before = spectrogram(source, start, start + n)
        X, _ = spectrogram("mixture", start, start + n)
        Y = mask(S, X) * X                                            # eq. 4
        return mss.istft(Y, before + n)[:, before:]

    return {name: {source: Stored(functools.partial(load, mask, source), *mixture.shape)
                   for source in references}
            for name, mask in ORACLES.items()}

def mask_statistics(mixture, references):
    """{target: [bins, those with |M| > 1, then a flat (SIDE, SIDE) histogram of M]}.

    Bins with |X| <= 1e-8 are none.
    """
    statistics = dict.fromkeys(references, 0)
    spectrogram = spectrograms(mixture, references)
    length = mixture.shape[1]
    step = PIECE // HOP * HOP
    for start in range(0, max(length, 1), step):
        stop = min(start + step, length)
        X, before = spectrogram("mixture", start, stop)
        end = None if stop == length else (before + step) // HOP
        frames = slice(before // HOP, end)
        for name in references:
            S, _ = spectrogram(name, start, stop)
            M = mss.ideal_mask(S, X)[:, frames][X[:, frames].abs() > 1e-8]
            rows_columns = torch.stack([-M.imag, M.real])             # + j on top
            cells = ((rows_columns + 2) * (SIDE / 4)).floor().long()
            inside = ((cells >= 0) & (cells < SIDE)).all(0)
            row, column = cells[:, inside]
            histogram = torch.bincount(row * SIDE + column, minlength=SIDE * SIDE)

            counts = torch.tensor([M.numel(), (M.abs() > 1).sum()], device="cpu")
            statistics[name] += torch.cat([counts, histogram])
    return {name: counts.tolist() for name, counts in statistics.items()}

def figure_2(masks):
    """{name: what mask_statistics counts} -> the paper's Figure 2, (H, W, 3) uint8.

    A panel for each, three in a row: M from -2 to 2 on both axes, the unit circle in red.
    """
    x = (np.arange(2 * SIDE) + 0.5) / SIDE * 2 - 2                    # two pixels for each cell
    circle = abs(np.hypot(x, x[:, None]) - 1) < 1 / SIDE
    panels = []
    for _, _, *histogram in masks.values():
        cells = np.log1p(histogram).reshape(SIDE, SIDE)
        shade = np.kron(cells, np.ones((2, 2)))[..., None]            # (2 SIDE, 2 SIDE, 1)
        grey = 255 - 255 * shade / shade.max().clip(1)
        panel = np.where(circle[..., None], (255, 0, 0), grey).astype("uint8")
        panels.append(np.pad(panel, ((10, 10), (10, 10), (0, 0)), constant_values=255))
    rows = [np.concatenate(panels[i:i + 3], axis=1) for i in range(0, len(panels), 3)]
    return np.concatenate(rows)

# ---- Tables -------------------------------------------------------------------------------------

def finite(how, values):
    """how(values), such as np.median, of those that are finite; NaN where none are, as museval."""
    values = np.asarray(values)[np.isfinite(values)]
    return float(how(values)) if len(values) else np.nan

def summary(track, scores):
    """{system: {target: scores}} of a track -> a row of CSV_COLUMNS for each system and target."""
    rows = []
    for system, targets in scores.items():
        for target, values in targets.items():
            row = {"track": track, "system": system, "target": target}
            row.update({metric: finite(np.median, value) for metric, value in values.items()})
            row["frames"] = int(np.isfinite(values["SDR"]).sum())
            row["frames_total"] = len(values["SDR"])
            rows.append(row)
    return rows

def select(rows, system, target):
    return [row for row in rows if (row["system"], row["target"]) == (system, target)]

def aggregate(rows, system, target, metric, how):
    """how, np.median or np.mean, over the tracks in `rows` with a finite score."""
    return finite(how, [row[metric] for row in select(rows, system, target)])

def line(label, rows, target, columns, how=np.median):
    """Cells of a table: target, label, a figure for each of `columns`, frames that count.

    columns: {heading: (system, metric)}
    """
    cells = [target, label]
    for system, metric in columns.values():
        figure = aggregate(rows, system, target, metric, how)
        cells.append(f"{figure:.2f}" if np.isfinite(figure) else "n/a")
    system, _ = next(iter(columns.values()))
    counted = select(rows, system, target)
    frames = sum(row["frames"] for row in counted)
    total = sum(row["frames_total"] for row in counted)
    return [*cells, f"{frames}/{total}"]

def table(rows, columns):
    """The table of all tracks, lists of cells: a heading, then medians and means per target."""
    lines = [["target", "track", *columns, "frames"]]
    system, _ = next(iter(columns.values()))
    for target in dict.fromkeys(row["target"] for row in rows):
        tracks = [np.isfinite(row["SDR"]) for row in select(rows, system, target)]
        for how in (np.median, np.mean):
            label = f"{how.__name__} of {sum(tracks)}/{len(tracks)} tracks"
            lines.append(line(label, rows, target, columns, how))
    return lines

def text(cells):
    """A table's cells -> a line of text."""
    target, track, *figures = cells
    figures = "".join(f"{cell:>10}" for cell in figures)
    return f"{target:13} {mss.one_line(track)[:36]:36}{figures}"

def write_csv(path, rows):
    """A row for each track, system and target; what wasn't measured is empty."""
    with mss.replacing(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(CSV_COLUMNS)
            writer.writerows([row.get(column, "") for column in CSV_COLUMNS] for row in rows)

def write_json(path, scores):
    """museval's layout, which its EvalStore reads: rounded to 1e-5, infinite values NaN."""
    targets = []
    for name, values in scores.items():
        frames = []
        for t, metrics in enumerate(zip(*(values[metric] for metric in METRICS))):
            rounded = [round(x, 5) if np.isfinite(x) else np.nan for x in metrics]
            frames.append({"time": float(t), "duration": 1.0,
                           "metrics": dict(zip(METRICS, rounded))})

        targets.append({"name": name, "frames": frames})
    content = {"targets": targets, "museval_version": "0.4.1"}
    with mss.replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2))

# ---- The report: a page to look at and to listen to ---------------------------------------------

def png(image):
    """(H, W, 3) uint8 -> the bytes of a PNG file."""
    def number(n):
        return n.to_bytes(4, "big")

    def chunk(kind, data):
        return number(len(data)) + kind + data + number(zlib.crc32(kind + data))

    height, width, _ = image.shape
    header = number(width) + number(height) + bytes([8, 2, 0, 0, 0])  # 8 bits, RGB
    rows = b"".join(b"\0" + row.tobytes() for row in image)           # 0: no filter
    data = zlib.compress(rows, 9)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data)
            + chunk(b"IEND", b""))

def spectrogram_image(audio):
    """(C, L) -> (H, W, 3) uint8: colours for -94 to -14 dB of full scale, 0 Hz below."""
    magnitude = mss.stft(audio).abs().mean(0) / 100                   # 512 is full scale
    level = 20 * torch.log10(magnitude + 1e-9)                        # (T, F) dB
    level = F.avg_pool2d(level[None], (2, 4))[0].T.flip(0).numpy()    # (F / 4, T / 2)
    x = 1 + level.clip(-80, 0) / 80
    colours = np.stack([x ** 0.5, x ** 3, np.sin(2 * np.pi * x).clip(0)], axis=-1)    # gnuplot's
    return (255 * colours).astype("uint8")

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif }}
body {{ max-width: 72rem; margin: auto }}
body > * {{ margin-inline: 1rem }}
h1, h2 {{ overflow-wrap: anywhere }}
.wide {{ overflow: auto }}
table {{ border-collapse: collapse; white-space: nowrap }}
td, th {{ padding: .2rem .5rem; text-align: right; border-bottom: 1px solid #8886 }}
td:nth-child(-n+2), th:nth-child(-n+2) {{ text-align: left }}
.grid {{ display: grid; gap: 0 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }}
figure {{ margin: 0 0 1rem }}
img, svg, audio {{ display: block; width: 100% }}
img {{ aspect-ratio: 2 }}
svg {{ height: 5rem; background: #8882 }}
</style></head>
<body><h1>{title}</h1>{body}</body></html>
"""

def bars(values, label):
    """An SVG with a bar for the dB of each frame, from 0 up to 30 or down to -10.

    None for frames that don't count.
    """
    label = html.escape(label)
    path = ""
    for t, value in enumerate(values):
        if np.isfinite(value):
            path += f"M{t + .5} 30V{30 - np.clip(value, -10, 30):.1f}"
    return (f'<figure><figcaption>{label}</figcaption>'
            f'<svg viewBox="0 0 {len(values)} 40" preserveAspectRatio="none" role="img" '
            f'aria-label="{label}">'
            f'<path d="M0 30H{len(values)}" stroke="#888" stroke-width=".3"/>'
            f'<path d="{path}" stroke="#2a7de1" stroke-width=".8"/></svg></figure>')

def player(label, audio, rate):
    """HTML of the spectrogram of (C, L) samples, and of an MP3 of them, 320 kbit/s."""
    label = html.escape(label)
    sound = mss.resample(audio, rate, 44100).T
    file = io.BytesIO()
    soundfile.write(file, sound, 44100, format="MP3", bitrate_mode="CONSTANT",
                    compression_level=0.0)
    image = base64.b64encode(png(spectrogram_image(audio))).decode()
    sound = base64.b64encode(file.getvalue()).decode()
    return (f'<figure><figcaption>{label}</figcaption>'
            f'<img alt="spectrogram: {label}" src="data:image/png;base64,{image}">'
            f'<audio controls aria-label="{label}" src="data:audio/mpeg;base64,{sound}"></audio>'
            '</figure>')

def loudest(audio, n):
    """Where the n samples of (C, L) with the highest energy begin, to a hundredth of n."""
    hop = max(1, n // 100)
    energies = [torch.zeros(1, device="cpu")]
    for start in range(0, audio.shape[-1] - hop + 1, 100 * hop):
        part = audio[:, start:start + 100 * hop].double().square().sum(0)
        energies.append(part[:len(part) // hop * hop].unflatten(0, (-1, hop)).sum(1))
    energy = torch.cat(energies).cumsum(0)
    hops = n // hop
    return hop * int((energy[hops:] - energy[:len(energy) - hops]).argmax())

def listening(mixture, references, estimates, rate):
    """HTML of the 10 s in which the first target is loudest: mixture, references, estimates."""
    n = min(10 * rate, mixture.shape[-1])
    start = loudest(next(iter(references.values())), n)
    sounds = {"mixture": mixture}
    for name in estimates:
        sounds[f"{name}, reference"] = references[name]
        sounds[f"{name}, estimate"] = estimates[name]
    players = [player(label, audio[:, start:start + n], rate) for label, audio in sounds.items()]
    return (f"<p>{start / rate:.0f} to {(start + n) / rate:.0f} s</p>"
            f"<div class=grid>{''.join(players)}</div>")

def scores_table(lines):
    """HTML of a table's lines, of which the first is the heading."""
    rows = []
    for k, cells in enumerate(lines):
        tag = "td" if k else "th"
        rows.append("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<div class=wide tabindex=0 role=region aria-label=scores><table>{body}</table></div>"

def write_report(path, title, lines, results, chosen):
    """The page: a table, each track's SDR over time, and players for the tracks in `chosen`."""
    body = [scores_table(lines), f"<p>{SDR}; {USDR}.</p>",
            "<p>Bars: SDR of each second, from -10 to 30 dB; none where one doesn't count.</p>"]
    for result in results:
        body.append(f"<h2>{html.escape(result['track'])}</h2>")
        body.append(html.escape(result.get("error", "")))
        body.append("<div class=grid>")
        for target, values in result.get("scores", {}).get("estimate", {}).items():
            median = finite(np.median, values["SDR"])
            figure = f"{median:.2f} dB SDR" if np.isfinite(median) else "no SDR"
            body.append(bars(values["SDR"], f"{target}: {figure}"))
        body.append("</div>")

        if result["track"] in chosen:
            body.append(Path(result["fragment"]).read_text())

    page = PAGE.format(title=html.escape(title), body="\n".join(body))
    with mss.replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")

def from_worst_to_best(rows, count):
    """The names of `count` tracks, evenly spread over the scores of the first target."""
    mine = select(rows, "estimate", rows[0]["target"]) if rows else []
    mine.sort(key=lambda row: (np.isfinite(row["SDR"]), row["SDR"]))
    if not mine:
        return set()
    return {mine[round(i)]["track"] for i in np.linspace(0, len(mine) - 1, count)}

# ---- Many songs ---------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Excerpt(mss.Track):
    """A part of a track, of `frames` samples."""
    song: mss.Track = None
    first: int = 0                              # where in the song it begins

    def load(self, source, start=0, frames=-1):
        left = self.frames - start
        frames = left if frames < 0 else min(frames, left)
        return self.song.load(source, self.first + start, frames)

def excerpts(tracks, count, seconds, seed):
    """A random excerpt of each of `count` random songs, or of all; shorter songs come whole."""
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.choice(len(tracks), min(count, len(tracks)), replace=False))
    parts = []
    for track in (tracks[i] for i in chosen):
        frames = min(track.frames, round(seconds * track.sample_rate))
        first = int(rng.integers(track.frames - frames + 1))
        parts.append(Excerpt(**{**vars(track), "frames": frames, "song": track, "first": first}))
    return parts

def cached(path):
    """The result in a file, or None: there is none, it is damaged, or what it wrote has changed."""
    with contextlib.suppress(OSError, ValueError):
        result = json.loads(path.read_text())
        for file, written in result["files"].items():
            if os.stat(file).st_mtime_ns != written:
                return None
        return result
    return None

def identity_of(args, device):
    """What a result depends on, beside the song: weights, code, device and options."""
    files = [path for name in args.model for path in mss.checkpoint_paths(name)]
    modules = (mss, baselines, separate, sys.modules[__name__])
    files += [Path(module.__file__) for module in modules]
    hashes = [mss.hash_of(path) for path in files]
    return (hashes, args.oracle, args.bf16, args.full, device.type, args.report, args.out)

def evaluate_track(args, model, track):
    """The result of one song, as plain lists and dicts: read back where known, else kept."""
    files = estimate_files(args.estimates, args.subset, track.name) if args.estimates else {}
    times = []
    for path in (*track.files.values(), *files.values()):
        stat = os.stat(path)
        times.append((stat.st_size, stat.st_mtime_ns))

    key = repr((args.identity, track, files, times)).encode()
    path = Path(args.results, f"{hashlib.sha256(key).hexdigest()}.json")

    result = cached(path)
    if result is None:
        if args.oracle:
            result = evaluate_oracles(track)
        else:
            result = evaluate_estimates(args, model, track, files, path.with_suffix(".html"))
        result["track"] = track.name
        with mss.replacing(path) as temporary:
            temporary.write_text(json.dumps(result))
    return result

def evaluate_oracles(track):
    mixture = stored(track, "mixture", track.channels)
    references = {name: stored(track, name, track.channels)
                  for name in TARGETS if track.parts(name)}
    scores = score(references, oracle_estimates(mixture, references), track.sample_rate)
    return {"scores": scores, "masks": mask_statistics(mixture, references), "files": {}}

def evaluate_estimates(args, model, track, files, fragment):
    """Scores; the estimates as --out says; and, as --report says, its part in `fragment`."""
    with contextlib.ExitStack() as stack:
        if files:
            mixture, estimates = read_estimates(stack, files, track)
        else:
            mixture, estimates = separated_on_disk(stack, model, track, args.results, args.bf16)
        scores, references, estimates = compare(track, mixture, estimates, args.full)
        result = {"scores": scores}

        written = []
        if args.out:
            folder = Path(args.out, args.subset, track.name).absolute()
            written += [str(folder / f"{name}.wav") for name in estimates]
            channels, length = mixture.shape
            blocks = ([audio[:, t:t + PIECE] for audio in estimates.values()]
                      for t in range(0, max(length, 1), PIECE))
            separate.write_stems(written, blocks, track.sample_rate, channels, length, "FLOAT")
        if args.report:
            fragment = fragment.absolute()
            fragment.write_text(listening(mixture, references, estimates, track.sample_rate))
            result["fragment"] = str(fragment)
            written.append(str(fragment))
    result["files"] = {file: os.stat(file).st_mtime_ns for file in written}
    return result

def work(args, model, tracks, columns, store):
    """Score the tracks that are this process's turn; print and write what is known by then."""
    torch.set_num_threads(max(1, torch.get_num_threads() // args.workers))
    for i in mss.turns(store, len(tracks)):
        try:
            result = evaluate_track(args, model, tracks[i])
            if args.json:
                path = Path(args.json, args.subset, f"{result['track']}.json")
                write_json(path, result["scores"]["estimate"])
        except () if args.debug else Exception as error:
            result = {"track": tracks[i].name, "error": mss.one_line(error)}
            print(f"evaluate.py: error: {result['track']}: {result['error']}", file=sys.stderr,
                  flush=True)

        rows = summary(result["track"], result.get("scores", {}))
        for target in dict.fromkeys(row["target"] for row in rows):
            print(text(line(result["track"], rows, target, columns)), flush=True)
        store.set(f"track {i}", json.dumps(result))
        if mss.on_terminal(sys.stderr):
            print(f"{store.add('done', 1)} of {len(tracks)} tracks", end=mss.CLEAR,
                  file=sys.stderr, flush=True)

def worker(_, args, tracks, columns, port):
    """What a process of --workers does."""
    mss.make_streams_safe()
    mss.keep_memory()
    model = mss.load_models(args.model, mss.pick_exact_device(args.device)) if args.model else None
    store = torch.distributed.TCPStore("127.0.0.1", port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)         # unwind: no partial file
    work(args, model, tracks, columns, store)

def start_workers(args, tracks, columns):
    """Start the processes of --workers but this one -> the store that all share."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    # Ctrl-C is for this process; the others inherit that it is ignored.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.multiprocessing.spawn(
        worker, (args, tracks, columns, store.port), args.workers - 1, join=False, daemon=True)
    signal.signal(signal.SIGINT, handler)
    return store

def collect(store, tracks):
    """The results of all processes, when they are there; of one that died an error."""
    keys = [f"track {i}" for i in range(len(tracks))]
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    while not store.check(keys) and (launched or torch.multiprocessing.active_children()):
        time.sleep(0.1)
    results = []
    for key, track in zip(keys, tracks):
        there = store.check([key])
        died = {"track": track.name, "error": "its process died"}
        results.append(json.loads(store.get(key)) if there else died)
    return results

# ---- The command --------------------------------------------------------------------------------

def build_parser():
    parser = mss.parser(__doc__)
    add = parser.add_argument
    add("-m", "--model", nargs="+", default=[],
        help="a name (separate.py --list-models) or file; several: together (default: default)")
    add("--estimates", metavar="DIR",
        help="score files of any system instead: DIR/SUBSET/TRACK/TARGET.wav")
    add("--oracle", action="store_true",
        help="score ideal masks instead: Table 1 and Figure 2 of the paper")

    add("--musdb", default=os.environ.get("MUSDB_PATH"), help="dataset folder (env MUSDB_PATH)")
    add("--subset", default="test", choices=("train", "valid", "test"), help="default: %(default)s")
    add("--cache", help="where .stem.mp4 (default: ROOT-wav beside ROOT) and, if given, flac and "
        "ogg are decoded to")
    add("--full", action="store_true",
        help="ISR, SIR, SAR, too, which lossy stems distort (on: --json, --chunks)")
    add("--chunks", type=int, default=0, metavar="N",
        help="score an excerpt of each of N random tracks only")
    add("--seconds", type=float, default=30.0, help="length of the excerpts (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the choice of excerpts (default: %(default)s)")

    add("-o", "--out", help="write the estimates to OUT/SUBSET/TRACK/TARGET.wav")
    add("--csv", metavar="FILE", help="write a row for each track, system and target")
    add("--json", metavar="DIR", help="write museval's files: DIR/SUBSET/TRACK.json")
    add("--report", metavar="DIR",
        help="write DIR/index.html, a page to look at and to listen to")
    add("--listen", type=int, default=3, metavar="N",
        help="tracks to hear there, from worst to best (%(default)s)")
    add("--results", default="evaluated", metavar="DIR",
        help="keeps finished tracks for the next run (%(default)s)")
    add("--workers", type=int, default=1, metavar="N",
        help="processes that take turns (default: %(default)s)")
    return parser

def check(parser, args):
    """End with a line that says what is wrong about the flags, if something is."""
    if not args.musdb:
        parser.error("--musdb PATH expected: the folder that holds train/ and test/ (or set "
                     "MUSDB_PATH)")
    if bool(args.model) + bool(args.estimates) + args.oracle > 1:
        parser.error("one of -m, --estimates, --oracle expected")
    if args.oracle and (args.json or args.report or args.out or args.full):
        parser.error("--oracle: whole songs, SDR only")
    if args.workers > 1 and (os.getenv("RANK") or args.debug):
        parser.error("--workers: not with torchrun or --debug")
    if args.workers < 1 or not 0 < args.seconds < np.inf:
        parser.error("--workers, --seconds: positive numbers expected")
    if min(args.chunks, args.listen, args.seed) < 0:
        parser.error("--chunks, --listen, --seed: numbers from 0 on expected")

def parse(argv):
    parser = build_parser()
    args = parser.parse_args(argv)
    check(parser, args)
    args.full = bool(args.full or args.json or args.chunks)
    if not (args.model or args.estimates or args.oracle):
        args.model = ["default"]
    return args

def columns_of(args):
    """{heading: (system, metric)} of the table that is printed."""
    if args.oracle:
        return {name: (name, "SDR") for name in ORACLES}
    columns = {"SDR": ("estimate", "SDR"), "mix SDR": ("mixture", "SDR"),
               "uSDR": ("estimate", "uSDR"), "mix uSDR": ("mixture", "uSDR")}
    if args.full:
        columns.update({metric: ("estimate", metric) for metric in METRICS[1:]})
    return columns

def title_of(args, model, device, tracks):
    system = args.estimates or "ideal masks"
    if model:
        system = f"{' '.join(args.model)}: {model.config.model} on {device}"
    songs = f"excerpts of {args.seconds:g} s" if args.chunks else "songs"
    return f"{system}; {args.subset} {songs}: {len(tracks)}"

def write_figure_2(path, results):
    """Print the shares of bins with |M| > 1, and write the figure."""
    masks = {}
    for name in TARGETS:
        found = [result["masks"][name] for result in results if name in result["masks"]]
        if found:                                                     # not all songs hold all
            masks[name] = np.sum(found, axis=0)
    masks["all"] = sum(masks.values())

    shares = ", ".join(f"{name} {above / max(bins, 1):.1%}"
                       for name, (bins, above, *_) in masks.items())
    print(f"|M| > 1 where |X| > 1e-8: {shares}")
    with mss.replacing(path) as temporary:
        temporary.write_bytes(png(figure_2(masks)))

def finish(args, title, columns, results):
    """Print the tables of all tracks and write the files that are asked for -> exit code."""
    good = [result for result in results if "scores" in result]
    rows = [row for result in good for row in summary(result["track"], result["scores"])]
    lines = table(rows, columns)
    print("", *map(text, lines), "", f"{SDR}; {USDR}; dB", sep="\n")

    writers = {}                                                      # file -> what writes it
    if args.oracle and good:
        figure = Path(args.results, "figure2.png")
        writers[figure] = lambda: write_figure_2(figure, good)
    if args.csv:
        writers[args.csv] = lambda: write_csv(args.csv, rows)
    if args.report:
        page = Path(args.report, "index.html")
        chosen = from_worst_to_best(rows, args.listen)
        writers[page] = lambda: write_report(page, title, lines, results, chosen)
    missing = False
    for path, write in writers.items():
        try:
            write()
            print(path)
        except () if args.debug else OSError as error:
            missing = True
            print(f"evaluate.py: error: {path}: not written: {mss.one_line(error)}",
                  file=sys.stderr)

    failed = [f"{result['track']} ({result['error']})" for result in results if result not in good]
    if failed:
        print(f"evaluate.py: {len(failed)} of {len(results)} tracks failed: {', '.join(failed)}",
              file=sys.stderr)
    if not good:
        return 2
    return 1 if failed or missing else 0

def main(argv=None):
    args = parse(argv)

    # Process 0 downloads and decodes; the others wait.
    store, rank = mss.shared_store()
    if rank == 0:
        args.model = mss.without_default(args.model)
    else:
        mss.wait_for(store, ["ready"])
        args.model = json.loads(store.get("ready"))
    device = mss.pick_exact_device(args.device)
    model = mss.load_models(args.model, device) if args.model else None
    tracks = mss.musdb_tracks(args.musdb, args.subset, args.cache)
    if args.chunks:
        tracks = excerpts(tracks, args.chunks, args.seconds, args.seed)
    for folder in (args.results, args.json, args.out, args.report):   # fails now or never
        if folder:
            os.makedirs(folder, exist_ok=True)
    mss.remove_partials(args.results)
    store.set("ready", json.dumps(args.model))

    args.identity = identity_of(args, device)
    columns = columns_of(args)
    title = title_of(args, model, device, tracks)
    if rank == 0:
        print(title, "", text(table([], columns)[0]), sep="\n", flush=True)
    if args.workers > 1:
        store = start_workers(args, tracks, columns)
    work(args, model, tracks, columns, store)
    if rank > 0:
        return 0
    return finish(args, title, columns, collect(store, tracks))

if __name__ == "__main__":
    mss.run(main)
