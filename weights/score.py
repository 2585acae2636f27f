"""Score weights for vocals on the songs that material.py holds out.

    python weights/score.py FILE ... --songs OUT [--musdb-samples FOLDER]

For each song, in dB, and then their means over the songs:

    SDR         of the vocals, museval's: the median over frames of 1 s
    uSDR        of the vocals, over the whole song at once
    band SDR    of the accompaniment, museval's
    leakage     the level of what is taken for vocals in the accompaniment alone, relative to that
                accompaniment: the lower, the better

FOLDER holds excerpts of MUSDB18, which nothing learns from. --device is cpu, cuda or auto.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import mss

def songs_in(songs, samples):
    tracks = mss.musdb_tracks(songs, "valid")
    if samples:
        cache = songs / "musdb-samples"
        for subset in ("train", "test"):
            tracks += mss.musdb_tracks(samples, subset, cache)
    return tracks

def scores_of(separate, track):
    """separate: (C, L) -> vocals (C, L). -> [SDR, uSDR, band SDR, leakage]"""
    mixture = track.load("mixture")
    vocals = separate(mixture)
    estimates = {"vocals": vocals, "accompaniment": mixture - vocals}
    scores, _, _ = evaluate.compare(track, mixture, estimates)
    rows = evaluate.summary(track.name, scores)
    voice, = evaluate.select(rows, "estimate", "vocals")
    rest, = evaluate.select(rows, "estimate", "accompaniment")

    band = track.load("accompaniment")
    found = separate(band)
    power = found.double().square().sum().clamp(min=1e-12)
    leakage = 10 * torch.log10(power / band.double().square().sum()).item()
    return [voice["SDR"], voice["uSDR"], rest["SDR"], leakage]

def line(name, scores):
    return f"{name[:44]:44}" + "".join(f"{score:10.2f}" for score in scores)

def print_table(name, separate, tracks):
    print(f"\n{name[-44:]:44}       SDR      uSDR  band SDR   leakage")
    rows = []
    for track in tracks:
        rows.append(scores_of(separate, track))
        print(line(track.name, rows[-1]), flush=True)
    print(line("mean", np.mean(rows, axis=0)), flush=True)

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", metavar="FILE", nargs="+")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--songs", metavar="OUT", type=Path, required=True)
    parser.add_argument("--musdb-samples", metavar="FOLDER", type=Path)
    args = parser.parse_args()

    tracks = songs_in(args.songs, args.musdb_samples)
    for file in args.files:
        config, model, _ = mss.load_checkpoint(file, mss.pick_device(args.device))
        k = config.targets.index("vocals")
        print_table(file, lambda mixture: mss.separate_track(model, mixture)[k], tracks)
    return 0

if __name__ == "__main__":
    mss.run(main)
