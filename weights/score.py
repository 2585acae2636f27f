"""Score weights for vocals on the songs that material.py holds out.

    python weights/score.py FILE ... --songs OUT [--musdb-samples FOLDER]

For each song: SDR of the vocals (museval: median over 1 s frames), uSDR (of the whole song), and
how far below the accompaniment the vocals are that the network finds in the accompaniment alone.
All in dB; then their means over the songs. FOLDER holds excerpts of MUSDB18, which nothing learns
from.
"""
import argparse
import sys
from pathlib import Path

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
    """separate: (C, L) -> vocals (C, L). -> (SDR, uSDR, level of what isn't there), in dB."""
    mixture = track.load("mixture")
    vocals = separate(mixture)
    estimates = {"vocals": vocals, "accompaniment": mixture - vocals}
    scores, _, _ = evaluate.compare(track, mixture, estimates)
    rows = evaluate.summary(track.name, scores)
    row, = evaluate.select(rows, "estimate", "vocals")

    band = track.load("accompaniment")
    found = separate(band)
    power = found.double().square().sum().clamp(min=1e-12)
    level = 10 * torch.log10(power / band.double().square().sum()).item()
    return row["SDR"], row["uSDR"], level

def table(name, separate, tracks):
    print(f"\n{name:44}     SDR    uSDR   false")
    rows = []
    for track in tracks:
        rows.append(scores_of(separate, track))
        print(f"{track.name[:44]:44}" + "".join(f"{score:8.2f}" for score in rows[-1]), flush=True)
    means = torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist()
    print(f"{'mean':44}" + "".join(f"{score:8.2f}" for score in means), flush=True)
    return means

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
        table(file, lambda mixture: mss.separate_track(model, mixture)[k], tracks)
    return 0

if __name__ == "__main__":
    mss.run(main)
