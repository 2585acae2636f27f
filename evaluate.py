"""Score a checkpoint on whole songs: SDR as museval computes it, and uSDR, beside the mixture as estimate.

    python evaluate.py -m runs/vocals/best.pt --musdb /data/musdb18hq
    python evaluate.py -m runs/demo/best.pt --musdb runs/demo/songs        # what the demo of train.py learned
"""
import csv
import os

import numpy as np
import torch

import mss
import separate

SDR = "SDR (museval: median over 1 s frames, median over tracks)"
USDR = "uSDR (whole song, mean over tracks)"
COLUMNS = ("track", "target", "sdr", "mixture_sdr", "usdr", "mixture_usdr", "frames", "frames_total")

def with_complements(mixture, estimates):
    """Add what follows from estimates {target: (C, L)}: the other one of vocals and accompaniment."""
    other = mss.complement(estimates)
    if other:
        return {**estimates, other: mixture - next(iter(estimates.values()))}
    if set(mss.SOURCES) <= set(estimates) and "accompaniment" not in estimates:
        return {**estimates, "accompaniment": sum(estimates[name] for name in mss.SOURCES[1:])}
    return estimates

def usdr(reference, estimate):
    """SDR of a whole song as in MDX21 and SDX23, in dB: 1e-7 is added to both energies, so it is always finite."""
    return mss.sdr(reference, estimate, epsilon=1e-7)

def framewise_sdr(references, estimates, rate):
    """museval's (BSS Eval v4) SDR of S sources evaluated together: (S, C, L), (S, C, L') -> (S, frames) in dB.

    Frames of 1 s; an incomplete last one is dropped unless it is the only one. Estimates are cut or zero-padded to L.
    A frame is NaN for all sources if in any reference or estimate the channels sum to 0 at each of its samples.
    """
    s = np.asarray(references, dtype=np.float64)
    y = np.asarray(estimates, dtype=np.float64)[..., :s.shape[-1]]
    y = np.pad(y, [(0, 0), (0, 0), (0, s.shape[-1] - y.shape[-1])])
    frame = min(int(rate), s.shape[-1])
    frames = s.shape[-1] // frame if frame else 1
    s, y = (x[..., :frames * frame].reshape(*x.shape[:2], frames, frame) for x in (s, y))     # (S, C, frames, frame)
    silent = [(x.sum(axis=1) == 0).all(axis=-1).any(axis=0) for x in (s, y)]                  # (frames,)
    signal, error = (np.einsum("scfl,scfl->sf", x, x) for x in (s, y - s))                    # (S, frames)
    return np.where(silent[0] | silent[1], np.nan, mss.decibels(signal, error))

def score(references, estimates, rate):
    """{target: (C, L)} twice -> {target: ((frames,) SDR in dB, uSDR in dB)}.

    As in museval {vocals, accompaniment} are evaluated together, apart from the group of the stems: the groups decide
    which frames count. uSDR is NaN where the reference is silent.
    """
    scores = {}
    for group in (("vocals", "accompaniment"), mss.SOURCES):
        names = [name for name in group if name in estimates]
        if not set(names) <= set(scores) and (group == mss.SOURCES or len(names) == 2):
            frames = framewise_sdr(np.stack([references[name] for name in names]),
                                   np.stack([estimates[name] for name in names]), rate)
            for name, values in zip(names, frames):
                silent = not references[name].any()
                scores.setdefault(name, (values, np.nan if silent else usdr(references[name], estimates[name])))
    return scores

def median(values):
    """The median of the finite values, NaN where there are none: museval leaves out NaN and infinite frames."""
    values = np.asarray(values)[np.isfinite(values)]
    return float(np.median(values)) if len(values) else np.nan

def mean(values):
    values = np.asarray(values)[np.isfinite(values)]
    return float(np.mean(values)) if len(values) else np.nan

def evaluate_track(model, track, bf16=False):
    """Separate one song and score it -> (a row of COLUMNS per target, {target: (C, L) estimate})."""
    config = model.config
    if track.sample_rate != config.sample_rate:
        raise mss.UserError(f"{track.name}: {config.sample_rate} Hz expected, found {track.sample_rate} Hz")
    mixture = mss.to_channels(track.load("mixture"), config.channels)
    estimates = with_complements(mixture, dict(zip(config.targets, mss.separate_track(model, mixture, bf16=bf16))))
    if not all(torch.isfinite(audio).all() for audio in estimates.values()):
        raise mss.UserError(f"{track.name}: the model's estimate holds NaN or infinite samples")
    references = {name: mss.to_channels(track.load(name), config.channels) for name in estimates}
    baseline = score(references, dict.fromkeys(estimates, mixture), track.sample_rate)
    rows = []
    for name, (frames, whole) in score(references, estimates, track.sample_rate).items():
        rows.append(dict(zip(COLUMNS, (track.name, name, median(frames), median(baseline[name][0]), whole,
                                       baseline[name][1], int(np.isfinite(frames).sum()), len(frames)))))
    return rows, estimates

def print_row(row):
    print(f"{row['track'][:40]:40} {row['target']:13} {row['sdr']:7.2f} {row['mixture_sdr']:8.2f} "
          f"{row['usdr']:8.2f} {row['mixture_usdr']:8.2f} {row['frames']:8d}/{row['frames_total']}", flush=True)

def print_aggregate(rows):
    for title, column, aggregate in ((SDR, "sdr", median), (USDR, "usdr", mean)):
        print(f"\n{title}, dB")
        for target in dict.fromkeys(row["target"] for row in rows):
            mine = [row for row in rows if row["target"] == target]
            counted = [sum(row[key] for row in mine) for key in ("frames", "frames_total")]
            tracks = sum(np.isfinite(row[column]) for row in mine)
            print(f"{target:13} {aggregate([row[column] for row in mine]):7.2f}   mixture as estimate "
                  f"{aggregate([row['mixture_' + column] for row in mine]):7.2f}   {tracks} of {len(mine)} tracks"
                  + (f", {counted[0]} of {counted[1]} frames" if column == "sdr" else ""))

def write_csv(path, rows):
    with mss.replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)

def main(argv=None):
    parser = mss.parser(__doc__)
    parser.add_argument("-m", "--model", required=True, help="checkpoint file, or paper or paper-accompaniment")
    parser.add_argument("--musdb", default=os.environ.get("MUSDB_PATH"), help="dataset folder (env MUSDB_PATH)")
    parser.add_argument("--subset", default="test", choices=("train", "valid", "test"))
    parser.add_argument("--cache", help="where .stem.mp4 files are decoded to (default: ROOT-wav beside ROOT)")
    parser.add_argument("-o", "--out", help="write OUT/SUBSET/TRACK/TARGET.wav and OUT/SUBSET.csv")
    args = parser.parse_args(argv)
    if not args.musdb:
        parser.error("--musdb PATH expected: the folder that holds train/ and test/ (or set MUSDB_PATH)")
    device = mss.pick_device(args.device)
    config, model, state = mss.load_checkpoint(separate.checkpoint_path(args.model), device)
    model = mss.fold_batch_norms(model)
    tracks = mss.musdb_tracks(args.musdb, args.subset, args.cache)

    print(f"{args.model}: {config.model} at step {state.get('step')}, {args.subset}: {len(tracks)} tracks, {device}")
    print("\nSDR: median over the 1 s frames that count, dB; uSDR: whole song, dB; mixture: the mixture as estimate")
    print(f"{'track':40} {'target':13} {'SDR':>7} {'mixture':>8} {'uSDR':>8} {'mixture':>8} {'frames':>8}")
    rows = []
    for track in tracks:
        of_track, estimates = evaluate_track(model, track, args.bf16)
        rows += of_track
        for row in of_track:
            print_row(row)
        for name, audio in estimates.items() if args.out else ():
            mss.write_audio(os.path.join(args.out, args.subset, track.name, f"{name}.wav"), audio, track.sample_rate)
    print_aggregate(rows)
    if args.out:
        path = os.path.join(args.out, f"{args.subset}.csv")
        write_csv(path, rows)
        print(f"\n{path}")
    return 0

if __name__ == "__main__":
    mss.run(main)
