"""Draw the pictures: docs/spectrograms.png, docs/network.svg and docs/bundled-*.png.

    python docs/pictures.py RUN SONGS

RUN is what `python train.py --out RUN` made, SONGS what weights/material.py made.
"""
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import evaluate
import mss

# ---- What was learned, on songs that were not heard ---------------------------------------------

def spectrograms(model, track, start, seconds=6):
    """The mixture, the vocals that a model estimates, and the true vocals: up to 8 kHz."""
    frames = seconds * track.sample_rate
    mixture = track.load("mixture", start, frames)
    vocals = mss.separate_track(model, mixture)[0]

    images = []
    for audio in (mixture, vocals, track.load("vocals", start, frames)):
        image = evaluate.spectrogram_image(audio)
        image = image[-93:].repeat(2, axis=0)                         # rows of 86 Hz: up to 8 kHz
        images.append(np.pad(image, ((0, 0), (0, 6), (0, 0)), constant_values=255))
    return np.concatenate(images, axis=1)[:, :-6]

def demo(run):
    """On a built-in song."""
    track = mss.musdb_tracks(Path(run, "songs"), "test")[0]
    return spectrograms(mss.load_models([Path(run, "best.pt")]), track, 0)

def bundled(songs, name):
    """The bundled weights on a song of weights/material.py's, where its vocals are loudest."""
    track, = (track for track in mss.musdb_tracks(songs, "valid") if name in track.name)
    start = evaluate.loudest(track.load("vocals"), 6 * track.sample_rate)
    return spectrograms(mss.load_models(["bundled"]), track, start)

# ---- The residual network, as a line drawing ----------------------------------------------------

def box(x, y, width, height, label, colour):
    middle = x + width / 2
    return (f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{colour}"/>'
            f'<text x="{middle}" y="{y + height / 2 + 4}" text-anchor="middle">{label}</text>')

def arrow(x1, y1, x2, y2, dash=""):
    return (f'<path d="M{x1} {y1}L{x2} {y2}" stroke="#888" fill="none" marker-end="url(#head)" '
            f'stroke-dasharray="{dash}"/>')

def network():
    """The U: encoders down the left side, decoders up the right one, skips across."""
    features = (32, 64, 128, 256, 384, 384)
    parts = [box(20, 10, 90, 26, "|X|", "#eee"), arrow(65, 36, 65, 56)]
    for i, count in enumerate(features):
        y, inset = 60 + 44 * i, 20 + 24 * i
        left, right = inset, 640 - inset - 90
        parts.append(box(left, y, 90, 26, f"REB {count}", "#bcd7f5"))
        parts.append(box(right, y, 90, 26, f"RDB {count}", "#f7d3b5"))
        parts.append(arrow(left + 94, y + 13, right - 6, y + 13, dash="4 3"))
        if i < 5:
            parts.append(arrow(left + 57, y + 28, left + 69, y + 42))
            parts.append(arrow(right + 21, y + 42, right + 33, y + 28))
    parts.append(box(265, 330, 110, 26, "4 ICB 384", "#d5d5f0"))
    parts.append(arrow(200, 310, 262, 340) + arrow(378, 340, 440, 310))
    parts.append(arrow(575, 56, 575, 40) + box(530, 10, 90, 26, "ICB 32", "#d5d5f0"))
    parts.append('<path d="M624 23H640M652 12H640V122H652" stroke="#888" fill="none"/>')
    for k, head in enumerate(("mask", "q", "p_r", "p_i")):
        parts.append(box(660, 10 + 32 * k, 60, 24, head, "#cdeacb"))
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 366" font-size="13" '
            'font-family="sans-serif"><defs><marker id="head" markerWidth="7" markerHeight="7" '
            'refX="6" refY="3" orient="auto"><path d="M0 0L6 3L0 6z" fill="#888"/></marker></defs>'
            f'<rect width="740" height="366" fill="white"/>{"".join(parts)}</svg>\n')

def main():
    run, songs = sys.argv[1:]
    (HERE / "network.svg").write_text(network())
    (HERE / "spectrograms.png").write_bytes(evaluate.png(demo(run)))
    for name in ("Coherence", "Sodium"):
        path = HERE / f"bundled-{name.lower()}.png"
        path.write_bytes(evaluate.png(bundled(songs, name)))

if __name__ == "__main__":
    mss.run(main)
