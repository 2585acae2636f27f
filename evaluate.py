"""Score models, or anyone's estimates, on whole songs: SDR as museval computes it, uSDR; the paper's oracles.

    python evaluate.py -m runs/vocals/best.pt --musdb /data/musdb18hq --report report  # a page to look and listen, too
    python evaluate.py --estimates DIR --musdb /data/musdb18hq --full  # DIR/test/Artist - Title/vocals.wav ...
    python evaluate.py --oracle --musdb /data/musdb18hq                # Table 1 and Figure 2
"""
import base64
import contextlib
import csv
import dataclasses
import hashlib
import html
import io
import json
import os
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

import mss
import separate

SDR = "SDR (museval: median over 1 s frames, median over tracks)"
USDR = "uSDR (whole song, mean over tracks, those with a silent reference left out)"
METRICS = ("SDR", "ISR", "SIR", "SAR")          # ISR, SIR and SAR are aggregated as SDR is
COLUMNS = ("track", "system", "target", *METRICS, "uSDR", "frames", "frames_total")
TARGETS = ("vocals", "accompaniment", "bass", "drums", "other")
SIDE = 129                                      # cells of Figure 2's histograms on each axis, for -2 to 2

# ---- BSS Eval v4, as museval 0.4.1 computes it -----------------------------------------------------------------------

TAPS, BLOCK = 512, 1 << 14                      # length of the filters; samples that one FFT correlates

def correlations(x, s):
    """r[i, j, TAPS - 1 + k] = sum over n of x_i[n + k] s_j[n] for |k| < TAPS: (N, L), (M, L) -> (N, M, 2 TAPS - 1)."""
    hop = BLOCK - 2 * (TAPS - 1)
    rest = -x.shape[-1] % hop
    x, s = F.pad(x, (TAPS - 1, rest + TAPS - 1)).unfold(-1, BLOCK, hop), F.pad(s, (0, rest)).unfold(-1, hop, hop)
    cross = sum(torch.einsum("ntf,mtf->nmf", torch.fft.rfft(x_t.double()), torch.fft.rfft(s_t.double(), BLOCK).conj())
                for x_t, s_t in zip(x.split(16, dim=1), s.split(16, dim=1)))      # 16 blocks at a time: 6 s
    return torch.fft.irfft(cross, BLOCK)[..., :2 * TAPS - 1]

def projection_filters(r_ss, r_ys, n_fft):
    """The filters C that project each y on the M signals s and their delayed copies -> their (bins, M, N) response.

    They solve G C = D. G is singular where channels are equal or silent and nearly so where a band is: a ridge of
    1e-15 of its mean diagonal, or ten times that and so on, lets Cholesky succeed; one step of refinement follows.
    """
    size = len(r_ss) * TAPS
    G = r_ss.unfold(-1, TAPS, 1).flip(2).permute(0, 2, 1, 3).reshape(size, size)      # G[(a,p),(b,q)] = r_ab[q - p]
    D = r_ys[..., TAPS - 1:].permute(1, 2, 0).reshape(size, -1)                       # D[(a,p),x] = r_xa[p]
    ridge, more, failed = 0, 1e-15 * G.diagonal().mean() + 1e-300, True
    while failed:                                                                 # in place, for G is large
        G.diagonal().add_(more)
        ridge, more, (L, failed) = ridge + more, 9 * (ridge + more), torch.linalg.cholesky_ex(G)
    C = torch.cholesky_solve(D, L)
    C += torch.cholesky_solve(D - G @ C + ridge * C, L)
    return torch.fft.rfft(C.reshape(len(r_ss), TAPS, -1), n_fft, dim=1).transpose(0, 1).contiguous()

def bss_eval(references, estimates, rate, filters=True):
    """BSS Eval v4: (S, L, C), (S, L', C) arrays -> {"SDR": (S, frames), and with filters "ISR", "SIR", "SAR"} in dB.

    Frames of 1 s; an incomplete last one is dropped unless it is the only one. Estimates are cut or zero-padded to L.
    A frame is NaN for all sources if in any reference or estimate the channels sum to 0 at each of its samples.
    UserError for other shapes and NaN. Sources: Stoter, Liutkus, Ito 2018; museval.
    """
    s, y = (torch.as_tensor(np.asarray(x)) for x in (references, estimates))
    if s.dim() != 3 or y.dim() != 3 or s.shape[0] != y.shape[0] or s.shape[2] != y.shape[2]:
        raise mss.UserError(f"(sources, samples, channels) twice expected, found {(*s.shape,)} and {(*y.shape,)}")
    if not torch.isfinite(s.sum() + y.sum()):
        raise mss.UserError("finite samples expected, found NaN or infinity")
    y = F.pad(y[:, :s.shape[1]], (0, 0, 0, max(0, s.shape[1] - y.shape[1])))
    (sources, length, channels), size = s.shape, max(1, min(int(rate), s.shape[1]))
    frames = [slice(t, t + size) for t in range(0, max(length - size, 0) + 1, size)]
    scores = {name: np.full((sources, len(frames)), np.nan) for name in METRICS[:4 if filters else 1]}
    counted = []
    for t, frame in enumerate(frames):
        s_t, y_t = s[:, frame].double(), y[:, frame].double()
        if all(sum(x.unbind(-1)).any(1).all() for x in (s_t, y_t)):               # no source is silent
            counted.append(t)
            energies = [torch.linalg.vecdot(x, x).numpy() for x in (s_t.flatten(1), (y_t - s_t).flatten(1))]
            scores["SDR"][:, t] = mss.decibels(*energies)
    if not filters or not counted:
        return scores
    s, y = s.transpose(1, 2), y.transpose(1, 2)                                   # (S, C, L)
    n_fft = -(-(size + TAPS - 1) // 1024) * 1024                                  # quick to transform
    r_ss, r_ys = correlations(torch.cat([s, y]).flatten(0, 1), s.flatten(0, 1)).split(sources * channels)
    C_all = projection_filters(r_ss, r_ys, n_fft)                                 # (bins, S*C, S*C)
    own = [slice(j * channels, (j + 1) * channels) for j in range(sources)]
    C_own = torch.stack([projection_filters(r_ss[j][:, j], r_ys[j][:, j], n_fft) for j in own])       # (S, bins, C, C)
    weights = F.pad(torch.full((n_fft // 2 - 1,), 2 / n_fft, dtype=torch.double), (1, 1), value=1 / n_fft)
    energy = lambda X: ((X.real ** 2 + X.imag ** 2) @ weights).sum(-1).numpy()    # Parseval; most bins stand for two
    for t in counted:
        S, Y = (torch.fft.rfft(x[..., frames[t]].double(), n_fft) for x in (s, y))                # (S, C, bins)
        P_all = torch.einsum("faz,af->zf", C_all, S.flatten(0, 1)).unflatten(0, (sources, channels))
        P_own = torch.einsum("jfaz,jaf->jzf", C_own, S)
        scores["ISR"][:, t] = mss.decibels(energy(S), energy(P_own - S))
        scores["SIR"][:, t] = mss.decibels(energy(P_own), energy(P_all - P_own))
        scores["SAR"][:, t] = mss.decibels(energy(P_all), energy(Y - P_all))
    return scores

# ---- Scores of one song ----------------------------------------------------------------------------------------------

def score(references, estimates, rate, filters=False):
    """{target: (C, L)} twice -> {target: {"SDR": [dB per frame], with filters "ISR", "SIR", "SAR", and "uSDR": dB}}.

    {vocals, accompaniment} are evaluated apart from the group of the stems, as in museval: groups decide which frames
    count. uSDR (MDX21, SDX23): 1e-7 is added to both energies of the whole song; NaN where the reference is silent.
    """
    scores = {}
    for group in (("vocals", "accompaniment"), mss.SOURCES, ("accompaniment",)):  # the last: without vocals, alone
        names = [name for name in group if name in estimates]
        if not set(names) <= set(scores) and (group == mss.SOURCES or len(names) == len(group)):
            s, y = (np.stack([audio[name].T.numpy() for name in names]) for audio in (references, estimates))
            for name, *frames in zip(names, *(bss := bss_eval(s, y, rate, filters)).values()):
                whole = mss.sdr(references[name], estimates[name], 1e-7) if references[name].any() else np.nan
                scores.setdefault(name, {**{key: x.tolist() for key, x in zip(bss, frames)}, "uSDR": whole})
    return scores

def with_complements(mixture, estimates):
    """Add what follows from estimates {target: (C, L)}: the other one of vocals and accompaniment."""
    if other := mss.complement(estimates):
        return {**estimates, other: mixture - next(iter(estimates.values()))}
    whole = set(mss.SOURCES) <= set(estimates) and "accompaniment" not in estimates
    return {**estimates, "accompaniment": sum(estimates[name] for name in mss.SOURCES[1:])} if whole else estimates

def separated(model, track, bf16=False):
    """A model's (mixture (C, L), {target: (C, L)}), in its number of channels."""
    config = model.config
    if track.sample_rate != config.sample_rate:
        raise mss.UserError(f"{track.name}: {config.sample_rate} Hz expected, found {track.sample_rate} Hz")
    mixture = mss.to_channels(track.load("mixture"), config.channels)
    return mixture, dict(zip(config.targets, mss.separate_track(model, mixture, bf16=bf16)))

def estimate_files(folder, subset, name):
    """{target: file} of FOLDER/SUBSET/NAME/TARGET.wav (or flac, mp3, ...), or of FOLDER/NAME; UserError without any."""
    places = [Path(folder, name), Path(folder, subset, name)]                     # the second wins, and .wav
    files = {path.stem: path for place in places for path in sorted(place.glob("*"))
             if path.stem in TARGETS and path.suffix.lower() in separate.AUDIO}
    if not files:
        raise mss.UserError(f"{places[1]}: some of {', '.join(TARGETS)}.wav expected, found none")
    return files

def read_estimates(files, track):
    """As separated, from {target: file}. Other lengths and numbers of channels are made the song's, with a notice."""
    estimates, song = {}, dataclasses.replace(track, files=files)
    for name, path in files.items():
        with mss.open_audio(path) as file:
            if file.samplerate != track.sample_rate:
                raise mss.UserError(f"{path}: {track.sample_rate} Hz expected, found {file.samplerate} Hz")
        audio = song.load(name)                                       # (C', L')
        if (found := tuple(audio.shape)) != (expected := (track.channels, track.frames)):
            print(f"notice: {path}: (channels, samples) {found}, made {expected}: cut or zeros added", file=sys.stderr)
        audio = mss.to_channels(audio, track.channels)[:, :track.frames]
        estimates[name] = F.pad(audio, (0, track.frames - audio.shape[-1]))
    return track.load("mixture"), estimates

def compare(track, mixture, estimates, filters=False):
    """Score estimates and the mixture -> ({"estimate": scores, "mixture": scores}, references, all the estimates)."""
    estimates = with_complements(mixture, estimates)
    references = {name: mss.to_channels(track.load(name), len(mixture)) for name in estimates}
    return {"estimate": score(references, estimates, track.sample_rate, filters),
            "mixture": score(references, dict.fromkeys(estimates, mixture), track.sample_rate)}, references, estimates

# ---- Oracles: what ideal masks reach (sections 2.5 and 2.6 of the paper) ---------------------------------------------

def ideal_mask(S, X, limit=np.inf):
    """The complex ideal ratio mask (cIRM) M = S / X, |M| cut to the limit, and 0 in silence, |X| <= 1e-8."""
    M = torch.where(X.abs() > 1e-8, S / X, 0)                         # eq. 3
    return M * (limit / M.abs()).clamp(max=1) if limit < np.inf else M

ORACLES = {"mixture": lambda S, X: 1, "IBM": lambda S, X: S.abs() > (X - S).abs()}     # (S, X) -> M, as in Table 1
ORACLES.update({f"IRM({limit})": lambda S, X, limit=limit: ideal_mask(S, X, limit).abs() for limit in (1, np.inf)})
ORACLES.update({f"cIRM({limit})": lambda S, X, limit=limit: ideal_mask(S, X, limit) for limit in (1, 2, 5, 10, np.inf)})

def spectrograms(mixture, references):
    """Yield (channel, target, S, X), both (1, T, F): a channel at a time, for a long song's spectrogram is large."""
    for c, x in enumerate(mixture.split(1)):
        X = mss.stft(x)
        for name, reference in references.items():
            yield c, name, mss.stft(reference[c:c + 1]), X

def oracle_estimates(mask, mixture, references):
    estimates = {name: torch.empty_like(mixture) for name in references}
    for c, name, S, X in spectrograms(mixture, references):
        estimates[name][c] = mss.istft(mask(S, X) * X, mixture.shape[-1])[0]      # eq. 4
    return estimates

def mask_statistics(mixture, references):
    """{target: [bins, those with |M| > 1, then a flat (SIDE, SIDE) histogram of M]}; bins with |X| <= 1e-8 are none."""
    statistics = dict.fromkeys(references, 0)
    for _, name, S, X in spectrograms(mixture, references):
        M = ideal_mask(S, X)[X.abs() > 1e-8]
        cells = torch.stack([-M.imag, M.real]).add(2).mul(SIDE / 4).floor().long()            # rows, columns; +j on top
        y, x = cells[:, ((cells >= 0) & (cells < SIDE)).all(0)]
        histogram = torch.bincount(y * SIDE + x, minlength=SIDE * SIDE)
        statistics[name] += torch.cat([torch.tensor([M.numel(), (M.abs() > 1).sum()]), histogram])
    return {name: counts.tolist() for name, counts in statistics.items()}

# ---- Pictures, and the report: a page to look at and to listen to ----------------------------------------------------

def png(image):
    """(H, W, 3) uint8 -> the bytes of a PNG file."""
    number = lambda n: n.to_bytes(4, "big")
    chunk = lambda kind, data: number(len(data)) + kind + data + number(zlib.crc32(kind + data))
    header = number(image.shape[1]) + number(image.shape[0]) + bytes([8, 2, 0, 0, 0])         # 8 bits, RGB
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in image), 9)                 # filter 0: none
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")

FONT = dict(zip("ABCDEHILMNOPRSTUV0123456789.%+- ", (    # 3 x 5 pixels, an octal digit for each row
    "25755 65656 34443 65556 74647 55755 72227 44447 57755 65555 25552 65644 65655 34216 72222 55557 55552 75557 26227 "
    "71747 71717 55711 74717 74757 71122 75757 75717 00002 51245 02720 00700 00000").split()))

def write(image, x, y, text, colour=0):
    """Write into an (H, W, 3) image, in letters of 9 x 15 pixels, 12 apart."""
    words = [[int(FONT[letter][row]) >> bit & 1 for letter in text.upper() for bit in (2, 1, 0, 3)] for row in range(5)]
    image[y:y + 15, x:x + 12 * len(text)][np.kron(words, np.ones((3, 3))) == 1] = colour

def figure_2(masks):
    """{name: what mask_statistics counts} -> the paper's Figure 2, (H, W, 3): M from -2 to 2, unit circle in red."""
    x = (np.arange(2 * SIDE) + 0.5) / SIDE * 2 - 2                    # two pixels for each cell
    circle, panels = abs(np.hypot(x, x[:, None]) - 1) < 1 / SIDE, []
    for name, (bins, above, *histogram) in masks.items():
        shade = np.kron(np.log1p(histogram).reshape(SIDE, SIDE), np.ones((2, 2)))[..., None]
        panels.append(np.full((2 * SIDE + 40, 2 * SIDE + 20, 3), 255, dtype="uint8"))
        panels[-1][30:-10, 10:-10] = np.where(circle[..., None], (255, 0, 0), 255 - 255 * shade / shade.max().clip(1))
        write(panels[-1], 10, 8, f"{name} {above / max(bins, 1):.1%}")
    return np.concatenate([np.concatenate(panels[i:i + 3], axis=1) for i in range(0, len(panels), 3)])

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{0}</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif }} body {{ max-width: 72rem; margin: auto }}
body > * {{ margin-inline: 1rem }} .wide {{ overflow: auto }} table {{ border-collapse: collapse; white-space: nowrap }}
td, th {{ padding: .2rem .5rem; text-align: right; border-bottom: 1px solid #8886 }} figure {{ margin: 0 0 1rem }}
td:nth-child(-n+2), th:nth-child(-n+2) {{ text-align: left }} h1, h2 {{ overflow-wrap: anywhere }}
.grid {{ display: grid; gap: 0 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }}
img, svg, audio {{ display: block; width: 100% }} img {{ aspect-ratio: 2 }} svg {{ height: 5rem; background: #8882 }}
</style></head><body><h1>{0}</h1>{1}</body></html>
"""

def bars(values, label):
    """An SVG with a bar for the dB of each frame, from 0 up to 30 or down to -10; none for frames that don't count."""
    path = "".join(f"M{t + .5} 30V{30 - np.clip(x, -10, 30):.1f}" for t, x in enumerate(values) if np.isfinite(x))
    return (f'<figure><figcaption>{label}</figcaption><svg viewBox="0 0 {len(values)} 40" preserveAspectRatio="none" '
            f'role="img" aria-label="{label}"><path d="M0 30H{len(values)}" stroke="#888" stroke-width=".3"/>'
            f'<path d="{path}" stroke="#2a7de1" stroke-width=".8"/></svg></figure>')

def player(label, audio, rate):
    """HTML of a spectrogram of (C, L) samples, colours for -94 to -14 dB of full scale, and of an MP3 of them."""
    level = 20 * torch.log10(mss.stft(audio).abs().mean(0) / 100 + 1e-9)                      # (T, F) dB; 512: full
    x = 1 + F.avg_pool2d(level[None], (2, 4))[0].T.flip(0).numpy().clip(-80, 0) / 80          # (F, T), 0 Hz below
    colours, file = np.stack([x ** 0.5, x ** 3, np.sin(2 * np.pi * x).clip(0)], axis=-1), io.BytesIO()   # gnuplot's
    sound = mss.resample(audio, rate, 44100).T
    soundfile.write(file, sound, 44100, format="MP3", bitrate_mode="CONSTANT", compression_level=0.0)    # 320 kbit/s
    image, sound = (base64.b64encode(data).decode() for data in (png((255 * colours).astype("uint8")), file.getvalue()))
    return (f'<figure><figcaption>{label}</figcaption><img alt="spectrogram: {label}" src="data:image/png;base64,'
            f'{image}"><audio controls aria-label="{label}" src="data:audio/mpeg;base64,{sound}"></audio></figure>')

def listening(mixture, references, estimates, rate):
    """HTML of the 10 s in which the first target is loudest: mixture, references, estimates."""
    n = min(10 * rate, mixture.shape[-1])
    energy = F.pad(next(iter(references.values())).double().square().sum(0).cumsum(0), (1, 0))
    start = int((energy[n:] - energy[:-n or None]).argmax())
    sounds = {"mixture": mixture, **{f"{name}, {kind}": audio[name] for name in estimates for kind, audio in (
        ("reference", references), ("estimate", estimates))}}
    return f"<p>{start / rate:.0f} to {(start + n) / rate:.0f} s</p><div class=grid>" + "".join(
        player(label, audio[:, start:start + n], rate) for label, audio in sounds.items()) + "</div>"

def write_report(path, title, lines, results, chosen):
    """The page: a table of the lines, each track's SDR over time, and players for the tracks in `chosen`."""
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>" for cells in lines)
    rows = rows.replace("td>", "th>", 2 * len(lines[0]))              # the heading
    body = [f'<div class=wide tabindex=0 role=region aria-label=scores><table>{rows}</table></div><p>{SDR}; {USDR}.</p>'
            "<p>Bars: SDR of each second, from -10 to 30 dB; none where a second doesn't count.</p>"]
    for result in results:
        body.append(f"<h2>{html.escape(result['track'])}</h2>{html.escape(result.get('error', ''))}<div class=grid>")
        body += [bars(values["SDR"], f"{target}: {median(values['SDR']):.2f} dB SDR".replace("nan dB", "no"))
                 for target, values in result.get("scores", {}).get("estimate", {}).items()]
        body.append("</div>" + (Path(result["fragment"]).read_text() if result["track"] in chosen else ""))
    with mss.replacing(path) as temporary:
        temporary.write_text(PAGE.format(html.escape(title), "\n".join(body)), encoding="utf-8")

# ---- Tables ----------------------------------------------------------------------------------------------------------

def median(values, how=np.median):
    """The median of the finite values, NaN where there are none: museval leaves out NaN and infinite frames."""
    values = np.asarray(values)[np.isfinite(values)]
    return float(how(values)) if len(values) else np.nan

def summary(track, scores):
    """{system: {target: scores}} of a track -> a row of COLUMNS for each system and target."""
    return [{"track": track, "system": system, "target": target, **{key: median(x) for key, x in values.items()},
             "frames": int(np.isfinite(values["SDR"]).sum()), "frames_total": len(values["SDR"])}
            for system, targets in scores.items() for target, values in targets.items()]

def line(label, rows, target, columns, how=np.median):
    """Cells of a table: target, label, a figure for each {heading: (system, metric)} of columns, frames that count."""
    rows = [row for row in rows if row["target"] == target]
    figures = [median([row[metric] for row in rows if row["system"] == system], how)
               for system, metric in columns.values()]
    frames = [sum(row[key] for row in rows if row["system"] == rows[0]["system"]) for key in COLUMNS[-2:]]
    return [target, label, *(f"{x:.2f}" if np.isfinite(x) else "n/a" for x in figures), "{}/{}".format(*frames)]

def table(rows, columns):
    """The table of all tracks, lists of cells: a heading, then the medians and the means over tracks per target."""
    lines, (first, _) = [["target", "track", *columns, "frames"]], next(iter(columns.values()))
    for target in dict.fromkeys(row["target"] for row in rows):
        finite = [np.isfinite(row["SDR"]) for row in rows if (row["target"], row["system"]) == (target, first)]
        lines += [line(f"{how.__name__} of {sum(finite)}/{len(finite)} tracks", rows, target, columns, how)
                  for how in (np.median, np.mean)]
    return lines

def text(cells):
    return f"{cells[0]:13} {mss.one_line(cells[1])[:36]:36}" + "".join(f"{cell:>10}" for cell in cells[2:])

def write_json(path, scores):
    """museval's layout, which its EvalStore reads: values rounded to 1e-5, infinite ones NaN."""
    targets = [{"name": name, "frames": [{"time": float(t), "duration": 1.0, "metrics": {
        key: round(x, 5) if np.isfinite(x) else np.nan for key, x in zip(METRICS, metrics)}}
        for t, metrics in enumerate(zip(*(values[key] for key in METRICS)))]} for name, values in scores.items()]
    with mss.replacing(path) as temporary:
        temporary.write_text(json.dumps({"targets": targets, "museval_version": "0.4.1"}, indent=2))

# ---- The command -----------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Excerpt(mss.Track):
    first: int = 0                              # where in the song its `frames` samples begin

    def load(self, source):
        return super().load(source, self.first, self.frames)

def excerpts(tracks, count, seconds, seed):
    """A random excerpt of each of `count` random songs, or of all if there are fewer; shorter songs come whole."""
    rng = np.random.default_rng(seed)
    for track in (tracks[i] for i in sorted(rng.choice(len(tracks), min(count, len(tracks)), replace=False))):
        frames = min(track.frames, round(seconds * track.sample_rate))
        yield Excerpt(**{**vars(track), "frames": frames, "first": int(rng.integers(track.frames - frames + 1))})

def evaluate_track(args, model, track):
    """The result of one song, as plain lists and dicts: read back where it is known, else computed and kept."""
    files = estimate_files(args.estimates, args.subset, track.name) if args.estimates else {}
    times = [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, (*track.files.values(), *files.values()))]
    path = Path(args.results, f"{hashlib.sha256(repr((args.identity, track, files, times)).encode()).hexdigest()}.json")
    with contextlib.suppress(OSError, ValueError):                    # none yet, damaged, or what it wrote is gone
        result = json.loads(path.read_text())
        if all(os.stat(file).st_mtime_ns == written for file, written in result["files"].items()):
            return result
    result, written = {"track": track.name}, []
    if args.oracle:
        mixture, references = track.load("mixture"), {name: track.load(name) for name in TARGETS}
        result["scores"] = {name: score(references, oracle_estimates(mask, mixture, references), track.sample_rate)
                            for name, mask in ORACLES.items()}
        result["masks"] = mask_statistics(mixture, references)
    else:
        mixture, estimates = read_estimates(files, track) if files else separated(model, track, args.bf16)
        result["scores"], references, estimates = compare(track, mixture, estimates, args.full)
        for name, audio in estimates.items() if args.out else ():
            written.append(os.path.abspath(Path(args.out, args.subset, track.name, f"{name}.wav")))
            mss.write_audio(written[-1], audio, track.sample_rate)
        if args.report:
            written.append(result.setdefault("fragment", str(path.absolute().with_suffix(".html"))))
            Path(written[-1]).write_text(listening(mixture, references, estimates, track.sample_rate))
    result["files"] = {file: os.stat(file).st_mtime_ns for file in written}
    with mss.replacing(path) as temporary:
        temporary.write_text(json.dumps(result))
    return result

def work(args, model, tracks, columns, store):
    """Score the tracks that are this process's turn; print and write what is known by then."""
    torch.set_num_threads(max(1, torch.get_num_threads() // args.workers))
    for i in separate.turns(store, len(tracks)):
        try:
            result = evaluate_track(args, model, tracks[i])
        except () if args.debug else (mss.UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            result = {"track": tracks[i].name, "error": mss.one_line(error)}
            print(f"evaluate.py: error: {result['track']}: {result['error']}", file=sys.stderr, flush=True)
        rows = summary(result["track"], result.get("scores", {}))
        for target in dict.fromkeys(row["target"] for row in rows):
            print(text(line(result["track"], rows, target, columns)), flush=True)
        if args.json and rows:
            write_json(Path(args.json, args.subset, f"{result['track']}.json"), result["scores"]["estimate"])
        store.set(f"track {i}", json.dumps(result))
        if sys.stderr.isatty():
            print(f"{store.add('done', 1)} of {len(tracks)} tracks", end="\033[K\r", file=sys.stderr, flush=True)

def worker(_, args, tracks, columns, port):
    mss.keep_memory()
    model = separate.load_models(args.model, mss.pick_device(args.device)) if args.model else None
    store = torch.distributed.TCPStore("127.0.0.1", port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)         # from now on unwind: no partial file stays
    work(args, model, tracks, columns, store)

def gather(store, tracks):
    """The results of all processes, when they are there; of one that died an error."""
    keys = [f"track {i}" for i in range(len(tracks))]
    while not store.check(keys) and ("TORCHELASTIC_RUN_ID" in os.environ or torch.multiprocessing.active_children()):
        time.sleep(0.1)
    return [json.loads(store.get(key)) if store.check([key]) else {"track": track.name, "error": "its process died"}
            for key, track in zip(keys, tracks)]

def parse(argv):
    parser = mss.parser(__doc__)
    add = parser.add_argument
    add("-m", "--model", nargs="+", default=[], help="default (that without -m), paper, files; several: together")
    add("--estimates", metavar="DIR", help="score files of any system instead: DIR/SUBSET/TRACK/TARGET.wav")
    add("--oracle", action="store_true", help="score ideal masks instead: Table 1 and Figure 2 of the paper")
    add("--musdb", default=os.environ.get("MUSDB_PATH"), help="dataset folder (env MUSDB_PATH)")
    add("--subset", default="test", choices=("train", "valid", "test"), help="default: %(default)s")
    add("--cache", help="where .stem.mp4 (default: ROOT-wav beside ROOT) and, if given, flac and ogg are decoded to")
    add("--full", action="store_true", help="ISR, SIR, SAR, too, which lossy stems distort (on: --json, --chunks)")
    add("--chunks", type=int, default=0, metavar="N", help="score an excerpt of each of N random tracks only")
    add("--seconds", type=float, default=30.0, help="length of the excerpts (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the choice of excerpts (default: %(default)s)")
    add("-o", "--out", help="write the estimates to OUT/SUBSET/TRACK/TARGET.wav")
    add("--csv", metavar="FILE", help="write a row for each track, system and target")
    add("--json", metavar="DIR", help="write museval's files: DIR/SUBSET/TRACK.json")
    add("--report", metavar="DIR", help="write DIR/index.html, a page to look at and to listen to")
    add("--listen", type=int, default=3, metavar="N", help="tracks to hear there, from worst to best (%(default)s)")
    add("--results", default="evaluated", metavar="DIR", help="keeps finished tracks for the next run (%(default)s)")
    add("--workers", type=int, default=1, metavar="N", help="processes that take turns (default: %(default)s)")
    args = parser.parse_args(argv)
    for wrong, message in (
            (not args.musdb, "--musdb PATH expected: the folder that holds train/ and test/ (or set MUSDB_PATH)"),
            (bool(args.model) + bool(args.estimates) + args.oracle > 1, "one of -m, --estimates, --oracle expected"),
            (args.oracle and (args.json or args.report or args.out or args.full), "--oracle: whole songs, SDR only"),
            (args.workers > 1 and (os.getenv("RANK") or args.debug), "--workers: not with torchrun or --debug"),
            (not (min(args.workers, args.chunks + 1, args.listen + 1, args.seed + 1) > 0 < args.seconds < np.inf),
             "positive numbers expected")):
        if wrong:
            parser.error(message)
    args.full = args.full or bool(args.json or args.chunks)
    args.model = args.model or ["default"] * (not args.estimates and not args.oracle)
    return args

def finish(args, title, columns, results):
    """Print the tables of all tracks and write the files that are asked for -> exit code."""
    good = [result for result in results if "scores" in result]
    rows = [row for result in good for row in summary(result["track"], result["scores"])]
    lines, written = table(rows, columns), []
    print("", *map(text, lines), "", f"{SDR}; {USDR}; dB", sep="\n")
    if args.oracle and good:
        masks = {name: np.sum([result["masks"][name] for result in good], axis=0) for name in TARGETS}
        masks["all"] = sum(masks.values())
        print("|M| > 1 where |X| > 1e-8:", ", ".join(f"{name} {m[1] / max(m[0], 1):.1%}" for name, m in masks.items()))
        written.append(Path(args.results, "figure2.png"))
        with mss.replacing(written[-1]) as temporary:
            temporary.write_bytes(png(figure_2(masks)))
    if args.csv:
        written.append(args.csv)
        with mss.replacing(args.csv) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *([row.get(column, "") for column in COLUMNS] for row in rows)])
    if args.report:
        mine = [row for row in rows if row["system"] == "estimate" and row["target"] == rows[0]["target"]]
        ranked = [row["track"] for row in sorted(mine, key=lambda row: (np.isfinite(row["SDR"]), row["SDR"]))]
        chosen = {ranked[round(i)] for i in np.linspace(0, len(ranked) - 1, args.listen) if ranked}
        written.append(Path(args.report, "index.html"))
        write_report(written[-1], title, lines, results, chosen)
    print(*written, sep="\n", end="\n" * bool(written))
    if failed := [f"{result['track']} ({result['error']})" for result in results if result not in good]:
        print(f"evaluate.py: {len(failed)} of {len(results)} tracks failed: {', '.join(failed)}", file=sys.stderr)
    return 0 if not failed else 1 if good else 2

def main(argv=None):
    args = parse(argv)
    store, rank = separate.torchrun()
    separate.introduce(args.model * (rank == 0))
    while rank and not store.check(["ready"]):                        # process 0 downloads and decodes
        time.sleep(0.2)
    device = mss.pick_device(args.device)
    model = separate.load_models(args.model, device) if args.model else None
    tracks = mss.musdb_tracks(args.musdb, args.subset, args.cache)
    tracks = list(excerpts(tracks, args.chunks, args.seconds, args.seed)) if args.chunks else tracks
    title = f"{' '.join(args.model)}: {model.config.model} on {device}" if model else args.estimates or "ideal masks"
    title += f"; {args.subset} {f'excerpts of {args.seconds:g} s' if args.chunks else 'songs'}: {len(tracks)}"
    for folder in filter(None, (args.results, args.json, args.out, args.report)):             # fails now or never
        os.makedirs(folder, exist_ok=True)
    code = [*map(separate.checkpoint_path, args.model),
            *(Path(module.__file__) for module in (mss, mss.baselines, separate, sys.modules[__name__]))]
    args.identity = ([hashlib.sha256(path.read_bytes()).hexdigest() for path in code],
                     args.oracle, args.bf16, args.full, device.type, args.report, args.out)
    columns = {name: (name, "SDR") for name in ORACLES} if args.oracle else {
        "SDR": ("estimate", "SDR"), "mix SDR": ("mixture", "SDR"), "uSDR": ("estimate", "uSDR"),
        "mix uSDR": ("mixture", "uSDR"), **{metric: ("estimate", metric) for metric in METRICS[1:] if args.full}}
    store.set("ready", "")
    if not rank:
        print(title, "", text(table([], columns)[0]), sep="\n", flush=True)
    if args.workers > 1:                                              # which take turns as torchrun's do
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)        # which they inherit: Ctrl-C is for this one
        torch.multiprocessing.spawn(
            worker, (args, tracks, columns, store.port), args.workers - 1, join=False, daemon=True)
        signal.signal(signal.SIGINT, handler)
    work(args, model, tracks, columns, store)
    return 0 if rank else finish(args, title, columns, gather(store, tracks))

if __name__ == "__main__":
    mss.run(main)
