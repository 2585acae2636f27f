"""Make the songs that vocals.pt learned from: free music, and voices of people and machines.

    python weights/material.py OUT --data DATA --packages ROOT --singers SINGERS

OUT becomes a dataset for train.py: in train/ voices and bands by themselves, and four whole songs;
in valid/ whole songs of what train/ does not hold. What is there already is kept; all that is
random in a song follows from its name. What is missing is said, with the way to get it, and left
out. Begin in an empty folder where anything has changed since.

    DATA      one or more folders that hold those of FOLDERS, below, or some of them
    ROOT      where the packages named in tracks.tsv are unpacked: by default /, where they are
              when installed; or `apt-get download NAME` and `dpkg-deb -x NAME*.deb ROOT`
    SINGERS   more voices, NAME/vocals.wav each, such as singers.py makes

The songs are 16-bit WAV; with --ogg they are Vorbis, a tenth as large, to be sent to a machine with
a GPU. --processes says how many are made at once, by default one for each core.

This script, which nothing else needs, takes two things besides the project's packages. Without them
it leaves out what they are for:

    pyworld                 pip install "setuptools<81" pyworld: voices changed into other singers',
                            and synthetic ones
    espeak-ng and flite     apt-get install espeak-ng flite: synthetic voices
"""
import argparse
import concurrent.futures
import csv
import itertools
import shutil
import subprocess
import sys
import tempfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch

try:
    import pyworld
except ImportError:
    pyworld = None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mss

RATE = 44100                                    # Hz

# The folders of DATA, and where their files are from.
FOLDERS = {
    "everything_is_free": "five songs by Software-Entwicklungskit, CC0: {train,valid}/SONG/"
                          "{vocals,drums,bass,other}.ogg",
    "pjs": "the songs of PJS corpus 1.1, as pjs001.ogg to pjs100.ogg: "
           "https://sites.google.com/site/shinnosuketakamichi/research-topics/pjs_corpus",
    "vocadito": "vocadito_1.wav, _10 and _14 of https://zenodo.org/records/5578807",
    "digabi_muzak": "tiles/muzak of https://github.com/digabi/map-tiles",
    "librosa_clips": "recordings of https://librosa.org/data",
    "mdn_multitrack": "multi-track of https://github.com/mdn/webaudio-examples",
}
VOICES = {              # those of them that hold voices
    "everything_is_free": "*/*/vocals.ogg",
    "pjs": "*.ogg",
    "vocadito": "*.wav",
}

def run_program(*command):
    """Run a program; UserError where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise mss.UserError(f"{command[0]}: {mss.one_line(done.stderr)}")

# ---- Sounds: (C, L) float64 ---------------------------------------------------------------------

def load(*paths):
    """The sum of files of one rate, as long as the shortest -> (C, L) at RATE."""
    parts, rates = zip(*map(mss.read_audio, paths))
    length = min(part.shape[1] for part in parts)
    total = sum(part[:, :length] for part in parts)
    return mss.resample(total, rates[0], RATE).double().numpy()

def level(x):
    """The mean power of the louder half of the moments of x, in dB of full scale."""
    blocks = x[..., :x.shape[-1] // 2048 * 2048].reshape(-1, 2048)
    powers = np.sort(np.mean(blocks ** 2, axis=-1))
    return 10 * np.log10(np.mean(powers[len(powers) // 2:]) + 1e-12)

def at_level(x, decibels=-20.0):
    return x * 10 ** ((decibels - level(x)) / 20)

def without_rumble(x):
    """x with nothing below 50 Hz and all above 70: there are footsteps, but hardly a voice."""
    X = np.fft.rfft(x)
    frequencies = np.fft.rfftfreq(x.shape[1], 1 / RATE)
    return np.fft.irfft(X * np.clip((frequencies - 50) / 20, 0, 1), x.shape[1])

def compressed(x, ratio):
    """x with the differences in level between moments of 50 ms divided by `ratio`."""
    n = 2205
    sums = np.cumsum(np.pad(np.mean(x ** 2, axis=0), (n // 2 + 1, n - n // 2 - 1)))
    power = np.append((sums[n:] - sums[:-n]) / n, 0)[:x.shape[1]]
    return x * (np.maximum(power, 1e-5) / 1e-2) ** ((1 / ratio - 1) / 2)

def augmented(x, rng, *names):
    """x after some of mss.AUGMENTATIONS."""
    x = torch.from_numpy(x).float()
    for name in names:
        x = mss.AUGMENTATIONS[name].function(x, rng)
    return x.double().numpy()

def sounding(x, floor=-50):
    """x without its pauses: the moments above `floor` dB and 0.2 s around them.

    UserError for silence.
    """
    blocks = x[:, :x.shape[1] // 441 * 441].reshape(len(x), -1, 441)
    loud = 10 * np.log10(np.mean(blocks ** 2, axis=(0, 2)) + 1e-12) > floor
    loud = np.convolve(loud, np.ones(41), "same") > 0.5
    if not loud.any():
        raise mss.UserError("a voice expected, found silence")
    return x[:, :len(loud) * 441][:, np.repeat(loud, 441)]

def phrases(x, length, rng, gap=5.0):
    """Random phrases of x, 3 to 10 s long, with pauses of up to `gap` s between -> (C, length)."""
    y = np.zeros((len(x), length))
    at = int(rng.uniform(0, 2) * RATE)
    while at < length:
        n = min(int(rng.uniform(3, 10) * RATE), x.shape[1], length - at)
        start = int(rng.integers(x.shape[1] - n + 1))
        fade = np.minimum(1, np.minimum(np.arange(n), np.arange(n)[::-1]) / 441)
        y[:, at:at + n] = x[:, start:start + n] * fade
        at += n + int(rng.uniform(0, gap) * RATE)
    return y

# ---- Voices -------------------------------------------------------------------------------------

def nonsense(rng, words):
    """A text without meaning in which all sorts of syllables meet."""
    onsets = "b,d,f,g,k,l,m,n,p,r,s,t,v,w,y,sh,st,tr,bl,fl,gr,h,z,ch,".split(",")
    codas = ",,,,n,m,s,t,l,r,ng,nd".split(",")
    vowels = [*"aeiou", "ai", "oo", "ee", "ow"]

    def word():
        syllables = range(rng.integers(1, 4))
        return "".join(rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas)
                       for _ in syllables)

    return ", ".join(" ".join(word() for _ in range(rng.integers(3, 9)))
                     for _ in range(words // 6))

SPEAKERS = {            # flite's voices, and languages and variants of espeak-ng
    "flite": ("slt", "rms", "awb", "kal16"),
    "espeak-ng": ("en-us+f2", "en-gb+m3", "it+f5", "es+m1", "fr-fr+f3", "de+m7", "pt-br+f1",
                  "fi+Andy", "en-us+Annie", "sv+linda", "pl+m5", "el+f4", "en-gb+steph",
                  "tr+belinda", "id+Alicia", "ro+victor"),
}

def spoken(engine, voice, rng):
    """Half a minute of synthetic speech, or less -> (L,)."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "speech.wav"))
        text = nonsense(rng, 60)
        commands = {
            "flite": ("flite", "-voice", voice, "-t", text, "-o", path),
            "espeak-ng": ("espeak-ng", "-v", voice, "-s", "150", "-w", path, text),
        }
        run_program(*commands[engine])
        return load(path)[0, :30 * RATE]

SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 3, 5, 7, 10))

def melody(voiced, rng):
    """Notes for each 5 ms frame of a voice, True where it is voiced -> Hz.

    A random walk on a scale, with glides and vibrato.
    """
    scale = SCALES[rng.integers(3)]
    base = rng.uniform(38, 62)                                        # of MIDI: 73 to 290 Hz
    notes = np.zeros(len(voiced))
    starts = np.flatnonzero(voiced[1:] & ~voiced[:-1])
    degree, at = 4, 0
    while at < len(voiced):
        degree = int(np.clip(degree + rng.choice([-3, -2, -1, -1, 0, 1, 1, 2, 4]), 0, 9))
        end = at + int(rng.choice([30, 50, 50, 70, 100, 200]))
        near = starts[(starts > end - 15) & (starts < end + 15)]
        end = min(near, default=end)                                  # rather where a sound begins
        notes[at:end] = base + scale[degree % len(scale)] + 12 * (degree // len(scale))
        at = end

    glide = np.hanning(int(rng.uniform(6, 24)))
    padded = np.pad(notes, len(glide), "edge")
    notes = np.convolve(padded, glide / glide.sum(), "same")[len(glide):-len(glide)]
    drift = np.convolve(rng.standard_normal(len(notes)), np.hanning(80), "same") * 0.02
    rate = rng.uniform(4.8, 6.5)                                      # Hz
    vibrato = rng.uniform(0, 0.5) * np.sin(2 * np.pi * rate * 0.005 * np.arange(len(notes)))
    return 440 * 2 ** ((notes + drift + vibrato - 69) / 12)

def sung(x, rng, speech=False, semitones=(-7, 7), tract=(0.85, 1.2)):
    """A voice (L,) as another singer's: pitch, formants and tempo changed apart.

    By WORLD (Morise et al. 2016). `tract`, times what the frequencies of the formants are, and
    `semitones` are ranges. Speech gets a melody, lasting vowels, and above 7 kHz, where its sample
    rate leaves little, what is just below.
    """
    f0, times = pyworld.dio(x, RATE, 60, 900)
    f0 = pyworld.stonemask(x, f0, times, RATE)
    envelope = pyworld.cheaptrick(x, f0, times, RATE)                 # (frames, 1025)
    noise = pyworld.d4c(x, f0, times, RATE)
    if speech:
        top = round(7000 / RATE * 2048)
        fall = 10 ** (-0.1 * 15 * np.arange(1025 - top) / top)        # by 15 dB every 7 kHz
        envelope[:, top:] = envelope[:, top - 60:top].mean(axis=1, keepdims=True) * fall
        noise[:, top:] = 1

    bins = np.arange(1025)
    shifted = bins / rng.uniform(*tract)

    def with_other_formants(spectra):
        return np.apply_along_axis(lambda row: np.interp(shifted, bins, row), 1, spectra)

    envelope, noise = with_other_formants(envelope), with_other_formants(noise)

    # Which of x's frames is heard in each of the result's.
    slow = rng.uniform(1.2, 2.6) if speech else 1.0
    pace = np.cumsum(np.where(f0 > 0, slow, 1.0)) * rng.uniform(0.85, 1.2)
    frames = np.searchsorted(pace, np.arange(int(pace[-1])))
    f0 = f0[frames] * 2 ** (rng.uniform(*semitones) / 12)
    if speech:
        f0 = np.where(f0 > 0, melody(f0 > 0, rng), 0)
    return pyworld.synthesize(f0, np.ascontiguousarray(envelope[frames]),
                              np.ascontiguousarray(noise[frames]), RATE)

# ---- Songs: a job is a partial() of one of these, which makes {stem: (C, L)} from an rng --------

LONGEST = 90 * RATE     # of a voice that is changed

# Whatever is made of these voices is in valid/ or nowhere.
HELD_OUT = ("3.Sodium", "pjs09", "vocadito_14", "singer bf_emma", "singer am_michael",
            "espeak-ng it+f5", "flite rms")

MIXED = {               # songs of valid/: the band, and the voice, or several, one after the other
    "supertuxkart-data subsea": ("pjs090", "pjs093", "pjs096", "pjs099"),
    "supertuxkart-data West": ("pjs091", "pjs094", "pjs097"),
    "singularity-music Coherence": ("pjs092", "pjs095", "pjs098"),
    "hyperrogue-music hr3-desert": ("vocadito_14",),
    "redeclipse-data track 05": ("flite rms",),
    "ardentryst castle": ("espeak-ng it+f5",),
    "fretsonfire-songs-sectoid Metal madness": ("singer am_michael-high",),
    "digabi_muzak Electronic Happy Song": ("singer bf_emma-high",),
}

def dry_voice(rng, paths):
    """The voices in files, one after the other, without pauses, all about as loud: mono."""
    parts = [load(path).mean(axis=0, keepdims=True) for path in paths]
    x = sounding(at_level(np.concatenate(parts, axis=1)))
    return {"vocals": at_level(compressed(x, 1.5))}

def changed_voice(rng, path, semitones=(-7, 7), tract=(0.85, 1.2)):
    """As another singer's."""
    x = dry_voice(rng, [path])["vocals"][0, :LONGEST]
    return {"vocals": at_level(sung(x, rng, semitones=semitones, tract=tract)[None])}

def synthetic_voice(rng, engine, speaker):
    x = sung(spoken(engine, speaker, rng), rng, speech=True)
    return {"vocals": at_level(sounding(at_level(x[None])))}

def band(rng, paths):
    return {"accompaniment": at_level(load(*paths))}

def whole_song(rng, song):
    """A song of Everything Is Free."""
    parts = [song / f"{name}.ogg" for name in mss.SOURCES[1:]]
    return {"vocals": load(song / "vocals.ogg"), "accompaniment": load(*parts)}

def mixed_song(rng, sing, play):
    """Of a job for the voice and one for the band, at most 40 s.

    The voice gets pauses, and is in stereo, in a room.
    """
    x = sing(rng)["vocals"]
    y = play(rng)["accompaniment"]
    length = min(40 * RATE, y.shape[1])
    first = int(rng.integers(y.shape[1] - length + 1))
    x = phrases(np.repeat(x, 2, axis=0), length, rng, gap=3)
    x = augmented(x, rng, "equalizer", "room")
    return {"vocals": at_level(x, rng.uniform(-23, -18)),
            "accompaniment": y[:, first:first + length]}

def make(folder, job, form):
    """Write what a job makes; softer where a file or their sum would clip."""
    if folder.exists():
        return
    stems = job(np.random.default_rng(zlib.crc32(folder.name.encode())))

    # Songs stay as they were released.
    if "vocals" in stems and job.func is not whole_song:
        stems["vocals"] = without_rumble(stems["vocals"])

    gain = min(1, 0.99 / max(np.abs(x).max() for x in (*stems.values(), sum(stems.values()))))
    with mss.new_folder(folder) as work:
        for name, x in stems.items():
            options = {"subtype": "PCM_16"} if form == "wav" else {}
            with soundfile.SoundFile(work / f"{name}.{form}", "w", RATE, len(x), **options) as file:
                for start in range(0, x.shape[1], RATE):              # OGG: long blocks crash it
                    file.write(gain * x[:, start:start + RATE].T)
    print(folder, flush=True)

# ---- What there is ------------------------------------------------------------------------------

def left_out(what, how):
    print(f"{what}: left out; {how}", file=sys.stderr)

def place_of(name, folders):
    """The folder of this name in the first of `folders` that has it, or None."""
    return next((folder / name for folder in folders if (folder / name).is_dir()), None)

def files_in(name, folders, pattern):
    place = place_of(name, folders)
    return sorted(place.glob(pattern)) if place else []

def recorded(name, folders):
    """The files of one of VOICES' folders."""
    return files_in(name, folders, VOICES[name])

def voices_in(folders, singers):
    """{name: job} of all voices, those of valid/, too. What is missing is printed."""
    for name in VOICES:
        if not recorded(name, folders):
            left_out(name, FOLDERS[name])
    if singers is None:
        left_out("more voices", "singers.py makes them, --singers says where they are")

    jobs = {}
    for i, path in enumerate(recorded("pjs", folders)):
        jobs[path.stem] = partial(dry_voice, paths=[path])
        if i % 2:
            jobs[f"{path.stem} high"] = partial(
                changed_voice, path=path, semitones=(4, 12), tract=(1.05, 1.25))
    for path in recorded("vocadito", folders):
        jobs[path.stem] = partial(dry_voice, paths=[path])
        for k in range(4):
            jobs[f"{path.stem} changed {k}"] = partial(changed_voice, path=path)
    for path in recorded("everything_is_free", folders):
        song = path.parent.name
        jobs[f"{song} voice"] = partial(dry_voice, paths=[path])
        for k in range(3):
            jobs[f"{song} changed {k}"] = partial(changed_voice, path=path)

    for engine, speakers in SPEAKERS.items():
        if shutil.which(engine) is None:
            left_out(f"{engine}'s voices", f"apt-get install {engine}")
            continue
        for speaker in speakers:
            jobs[f"{engine} {speaker}"] = partial(synthetic_voice, engine=engine, speaker=speaker)
    for path in sorted(singers.glob("*/vocals.wav")) if singers else ():
        jobs[f"singer {path.parent.name}"] = partial(dry_voice, paths=[path])

    if pyworld is None:
        left_out("voices made by WORLD", 'pip install "setuptools<81" pyworld')
        by_world = (changed_voice, synthetic_voice)
        jobs = {name: job for name, job in jobs.items() if job.func not in by_world}
    return jobs

def bands_in(folders, root):
    """The same of all bands: {"train": {name: job}, "valid": {name: job}}.

    They are those of tracks.tsv and of Everything Is Free. What is missing is printed.
    """
    jobs = {"train": {}, "valid": {}}
    missing = {}
    with open(Path(__file__).with_name("tracks.tsv"), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    for row in rows:
        name, file = row["from"], row["file"]
        paths = files_in(name, folders, file) if name in FOLDERS else sorted(root.glob(file))
        if paths:
            jobs[row["subset"]][f"{name} {row['title']}"] = partial(band, paths=paths)
        else:
            missing.setdefault(name, []).append(row["title"])
    for name, titles in missing.items():
        get = f"apt-get download {name} && dpkg-deb -x {name}_*.deb {root}"
        if root == Path("/"):
            get = f"apt-get install {name}"
        left_out(f"{name}: {', '.join(titles)}", FOLDERS.get(name, get))

    for path in files_in("everything_is_free", folders, "*/*/other.ogg"):
        song = path.parent
        if not song.name.startswith(HELD_OUT):
            # Twice: with the whole songs they are then a quarter of the music's minutes.
            parts = [song / f"{name}.ogg" for name in mss.SOURCES[1:]]
            jobs["train"][f"{song.name} band"] = partial(band, paths=parts)
            jobs["train"][f"{song.name} band again"] = partial(band, paths=parts)
    return jobs

def all_jobs(folders, root, singers):
    """{folder below OUT: job}. What is missing is printed."""
    voices, bands = voices_in(folders, singers), bands_in(folders, root)
    jobs = {f"train/{name}": job for name, job in {**voices, **bands["train"]}.items()
            if not name.startswith(HELD_OUT)}

    for path in recorded("everything_is_free", folders):
        song = path.parent
        if song.name.startswith(HELD_OUT):
            jobs[f"valid/{song.name}"] = partial(whole_song, song=song)
        else:
            jobs[f"train/{song.name} whole"] = partial(whole_song, song=song)

    for name, singing in MIXED.items():
        if name not in bands["valid"] or not set(singing) <= set(voices):
            left_out(f"valid/mixed {name}", f"it needs this piece and {', '.join(singing)}")
            continue
        sing = voices[singing[0]]
        if len(singing) > 1:                                          # recordings, all of them
            paths = [path for voice in singing for path in voices[voice].keywords["paths"]]
            sing = partial(dry_voice, paths=paths)
        jobs[f"valid/mixed {name}"] = partial(mixed_song, sing=sing, play=bands["valid"][name])
    return jobs

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--data", metavar="FOLDER", type=Path, nargs="+", required=True)
    parser.add_argument("--packages", metavar="ROOT", type=Path, default=Path("/"))
    parser.add_argument("--singers", metavar="FOLDER", type=Path)
    parser.add_argument("--ogg", dest="form", action="store_const", const="ogg", default="wav")
    parser.add_argument("--processes", metavar="N", type=int)
    args = parser.parse_args()

    jobs = all_jobs(args.data, args.packages, args.singers)

    # The slow ones last.
    jobs = dict(sorted(jobs.items(), key=lambda item: item[1].func is changed_voice))
    folders = [args.out / name for name in jobs]
    with concurrent.futures.ProcessPoolExecutor(
            args.processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(make, folders, jobs.values(), itertools.repeat(args.form)))
    print(f"{len(jobs)} songs in {args.out}")
    return 0

if __name__ == "__main__":
    mss.run(main)
