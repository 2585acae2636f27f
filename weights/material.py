"""Make the songs that vocals.pt learned from: free recordings, sung speech, and scores played by free sound fonts.

    python weights/material.py DATA OUT [SONG]  # an hour and a half in MUSDB's layout, 16-bit WAV, 4 GB; ten minutes

DATA holds everything_is_free/, mdn_multitrack/ and vocadito/. SONG, by default 3.Sodium, is the one of Everything Is
Free to validate with: nothing of it is in OUT/train. Songs that are there already are kept; all that is random in one
follows from its number or name.

Only this script, which nothing else needs, takes more than the project's packages: pyworld (pip; it wants setuptools
below 81), the programs fluidsynth, espeak-ng and flite, and the sound fonts below (Debian: fluid-soundfont-gm,
musescore-general-soundfont).
"""
import concurrent.futures
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyworld
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mss

RATE = 44100                                    # Hz
FONTS = "/usr/share/sounds/sf2/FluidR3_GM.sf2", "/usr/share/sounds/sf3/MuseScore_General.sf3"       # both MIT
SONGS = 64                                      # with made-up accompaniments

def play(*command):
    """Run a program; UserError where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise mss.UserError(f"{command[0]}: {mss.one_line(done.stderr)}")

# ---- Sound effects: (C, L) -> (C, L) ---------------------------------------------------------------------------------

def filtered(x, response):
    """x with each frequency's amplitude multiplied by response(Hz)."""
    n = 1 << x.shape[-1].bit_length()                                 # numpy is slow at prime lengths
    return np.fft.irfft(np.fft.rfft(x, n) * response(np.fft.rfftfreq(n, 1 / RATE)), n)[..., :x.shape[-1]]

def equalized(x, rng, decibels=5.0):
    """x with random gains at nine frequencies, in between interpolated; below 30 Hz nothing."""
    gains = rng.uniform(-decibels, decibels, 9)
    return filtered(x, lambda f: (f > 30) * 10 ** (np.interp(np.log2(f + 20), np.arange(6, 15), gains) / 20))

def level(x):
    """The mean power of the louder half of the moments of x (C, L), in dB of full scale."""
    blocks = np.sort(np.mean(x[..., :x.shape[-1] // 2048 * 2048].reshape(-1, 2048) ** 2, axis=-1))
    return 10 * np.log10(np.mean(blocks[len(blocks) // 2:]) + 1e-12)

def at_level(x, decibels):
    return x * 10 ** ((decibels - level(x)) / 20)

def compressed(x, ratio):
    """x with the differences in level between moments of 50 ms divided by `ratio`."""
    window = np.hanning(2205) / np.hanning(2205).sum()
    power = np.convolve(np.mean(x ** 2, axis=0), window, "same")
    return x * (np.maximum(power, 1e-5) / 1e-2) ** ((1 / ratio - 1) / 2)

def echoed(x, rng):
    """Mono or stereo x in a room: a stereo tail of decaying noise, sometimes also discrete echoes."""
    size = 1 << (x.shape[-1] + 2 * RATE).bit_length()
    t = np.arange(2 * RATE) / RATE
    tail = rng.standard_normal((2, len(t))) * 10 ** (-3 * t / rng.uniform(0.2, 1.8)) * (t > rng.uniform(0, 0.04))
    tail = filtered(tail, lambda f: 1 / (1 + (f / rng.uniform(2000, 9000)) ** 2) * (f > 150))
    tail *= 10 ** (rng.uniform(-26, -8) / 20) / np.sqrt(np.sum(tail ** 2) / 2)
    tail[:, 0] += 1
    if rng.random() < 0.3:
        beat, gain = rng.uniform(0.15, 0.5), rng.uniform(0.1, 0.4)
        for k in range(1, 1 + int(1.9 / beat)):
            tail[k % 2 if rng.random() < 0.5 else slice(None), int(k * beat * RATE)] += gain ** k
    return np.fft.irfft(np.fft.rfft(x, size) * np.fft.rfft(tail, size), size)[:, :x.shape[-1]]

def produced(x, rng):
    """A dry voice (L,) as in a mix: (2, L), equalized, compressed, sometimes doubled, in a room."""
    x = compressed(equalized(x[None], rng), rng.uniform(1, 3))
    if rng.random() < 0.25:                                           # two more, late and out of tune by a few cents
        t = np.arange(x.shape[1])
        delays = [rng.uniform(600, 1200) + rng.uniform(30, 90) * np.sin(t / RATE * rng.uniform(2, 5)) for _ in "lr"]
        x = x + rng.uniform(0.3, 0.8) * np.stack([np.interp(t - delay, t, x[0]) for delay in delays])
    pan = np.sqrt(0.5 + (rng.uniform(-0.3, 0.3) if rng.random() < 0.3 else 0) * np.array([[1], [-1]]))
    return echoed(x * pan * np.sqrt(2), rng)

# ---- Voices ----------------------------------------------------------------------------------------------------------

def load(path):
    """(C, L) float64 at RATE."""
    audio, rate = mss.read_audio(path)
    return mss.resample(audio, rate, RATE).double().numpy()

def sounding(x, floor=-50):
    """x (C, L) without its pauses: the moments above `floor` dB and 0.2 s around them. UserError for silence."""
    power = np.mean(x[:, :x.shape[1] // 441 * 441].reshape(len(x), -1, 441) ** 2, axis=(0, 2))
    loud = np.convolve(10 * np.log10(power + 1e-12) > floor, np.ones(41), "same") > 0.5
    if not loud.any():
        raise mss.UserError("a voice expected, found silence")
    return x[:, :len(loud) * 441][:, np.repeat(loud, 441)]

def phrases(x, length, rng, gap=5.0):
    """Random phrases of x (C, L), 3 to 10 s long, with pauses of up to `gap` s in between -> (C, length)."""
    y, at = np.zeros((len(x), length)), int(rng.uniform(0, 2) * RATE)
    while at < length:
        n = min(int(rng.uniform(3, 10) * RATE), x.shape[1], length - at)
        start = int(rng.integers(x.shape[1] - n + 1))
        fade = np.minimum(1, np.minimum(np.arange(n), np.arange(n)[::-1]) / 441)
        y[:, at:at + n] = x[:, start:start + n] * fade
        at += n + int(rng.uniform(0, gap) * RATE)
    return y

def nonsense(rng, words):
    """A text without meaning in which all sorts of syllables meet."""
    onsets = "b,d,f,g,k,l,m,n,p,r,s,t,v,w,y,sh,st,tr,bl,fl,gr,h,z,ch,".split(",")
    codas = ",,,,n,m,s,t,l,r,ng,nd".split(",")
    word = lambda: "".join(rng.choice(onsets) + rng.choice(list("aeiou") + ["ai", "oo", "ee", "ow"]) + rng.choice(codas)
                           for _ in range(rng.integers(1, 4)))
    return ", ".join(" ".join(word() for _ in range(rng.integers(3, 9))) for _ in range(words // 6))

SPEAKERS = [("flite", name) for name in ("slt", "rms", "awb", "kal16")] + [
    ("espeak-ng", f"{language}+{variant}") for language, variant in (
        ("en-us", "f2"), ("en-gb", "m3"), ("it", "f5"), ("es", "m1"), ("fr-fr", "f3"), ("de", "m7"), ("pt-br", "f1"),
        ("fi", "Andy"), ("en-us", "Annie"), ("sv", "linda"), ("pl", "m5"), ("el", "f4"), ("en-gb", "steph"),
        ("tr", "belinda"), ("id", "Alicia"), ("ro", "victor"))]

def spoken(engine, voice, rng):
    """Half a minute of synthetic speech, or less -> (L,)."""
    with tempfile.TemporaryDirectory() as folder:
        path, text = str(Path(folder, "speech.wav")), nonsense(rng, 60)
        play(*{"flite": ("flite", "-voice", voice, "-t", text, "-o", path),
               "espeak-ng": ("espeak-ng", "-v", voice, "-s", "150", "-w", path, text)}[engine])
        return load(path)[0, :30 * RATE]

def melody(voiced, rng):
    """Notes for each 5 ms frame of a voice: a random walk on a scale, with glides and vibrato -> Hz."""
    scale = [[0, 2, 4, 5, 7, 9, 11], [0, 2, 3, 5, 7, 8, 10], [0, 3, 5, 7, 10]][rng.integers(3)]
    base, degree, at, notes = rng.uniform(38, 62), 4, 0, np.zeros(len(voiced))    # the lowest note: 73 to 290 Hz
    starts = np.flatnonzero(voiced[1:] & ~voiced[:-1])
    while at < len(voiced):
        degree = int(np.clip(degree + rng.choice([-3, -2, -1, -1, 0, 1, 1, 2, 4]), 0, 9))
        end = at + int(rng.choice([30, 50, 50, 70, 100, 200]))
        end = min(starts[(starts > end - 15) & (starts < end + 15)], default=end)     # rather where a sound begins
        notes[at:end], at = base + scale[degree % len(scale)] + 12 * (degree // len(scale)), end
    glide = np.hanning(int(rng.uniform(6, 24)))
    notes = np.convolve(np.pad(notes, len(glide), "edge"), glide / glide.sum(), "same")[len(glide):-len(glide)]
    drift = np.convolve(rng.standard_normal(len(notes)), np.hanning(80), "same") * 0.02
    vibrato = rng.uniform(0, 0.5) * np.sin(2 * np.pi * rng.uniform(4.8, 6.5) * 0.005 * np.arange(len(notes)))
    return 440 * 2 ** ((notes + drift + vibrato - 69) / 12)

def sung(x, rng, speech=False):
    """A voice (L,) as another singer's, by WORLD (Morise et al. 2016): pitch, formants and tempo changed apart.

    Speech gets a melody, lasting vowels, and above 7 kHz, where its sample rate leaves little, what is just below.
    """
    f0, times = pyworld.dio(x, RATE, 60, 900)
    f0 = pyworld.stonemask(x, f0, times, RATE)
    envelope, noise = pyworld.cheaptrick(x, f0, times, RATE), pyworld.d4c(x, f0, times, RATE)     # (frames, 1025)
    if speech:
        top = round(7000 / RATE * 2048)
        fall = 10 ** (-0.1 * 15 * np.arange(1025 - top) / top)        # by 15 dB every 7 kHz
        envelope[:, top:], noise[:, top:] = envelope[:, top - 60:top].mean(axis=1, keepdims=True) * fall, 1
    bins = np.arange(1025) / rng.uniform(0.85, 1.2)                   # the vocal tract's length
    envelope, noise = (np.apply_along_axis(lambda row: np.interp(bins, np.arange(1025), row), 1, thing)
                       for thing in (envelope, noise))
    slow = rng.uniform(1.2, 2.6) if speech else 1.0
    pace = np.cumsum(np.where(f0 > 0, slow, 1.0)) * rng.uniform(0.85, 1.2)
    frames = np.searchsorted(pace, np.arange(int(pace[-1])))          # of the source, for each of the song's
    f0 = f0[frames] * 2 ** (rng.uniform(-7, 7) / 12)
    if speech:
        f0 = np.where(f0 > 0, melody(f0 > 0, rng), 0)
    return pyworld.synthesize(f0, np.ascontiguousarray(envelope[frames]), np.ascontiguousarray(noise[frames]), RATE)

# ---- Accompaniments: scores, played by a General MIDI synthesizer ----------------------------------------------------

DRUMS = [dict(zip((36, 38, 42), patterns.split())) for patterns in (          # kick, snare, hi-hat, in 16ths of a bar
    "x.......x.x..... ....x.......x... x.x.x.x.x.x.x.x.", "x...x...x...x... ....x.......x... ..x...x...x...x.",
    "x..x..x...x..x.. ....x..x.x..x..x xxxxxxxxxxxxxxxx", "x.........x..... ........x....... x.x.x.x.x.x.x.x.",
    "x..x......x..... ....x.......x... x.xxx.x.x.xxx.x.", "x.....x...x..... ....x.......x... x..xx..xx..xx..x",
    "x.x.......xx.... ....x..x....x... x.x.x.x.x.x.x.x.", "x......x..x...x. ...x..x....x..x. x.x.x.x.x.x.x.x.")]
PARTS = {   # General MIDI programs: chords that last, are struck or broken, and tunes; no choirs (52 to 54, 85, 91)
    "pad": (16, 17, 18, 19, 20, 21, 44, 48, 49, 50, 51, 61, 62, 63, 88, 89, 90, 92, 93, 94, 95),
    "comp": (0, 1, 2, 3, 4, 5, 6, 7, 11, 16, 24, 25, 26, 27, 28, 29, 30, 45, 61, 62, 81, 84, 107),
    "arpeggio": (0, 4, 8, 9, 10, 11, 12, 13, 24, 25, 26, 45, 46, 80, 81, 87, 98, 99, 104, 108),
    "lead": (22, 26, 27, 29, 30, 31, 40, 41, 42, 56, 57, 59, 60, 64, 65, 66, 67, 68, 71, 72, 73, 75, 76, 77, 78, 79, 80,
             81, 82, 83, 84, 86, 87, 109, 110)}

def drum_notes(rng, bars):
    """[(beat, beats, key, velocity)]: one of DRUMS, varied, with crashes, fills and more percussion."""
    pattern, notes = dict(DRUMS[rng.integers(len(DRUMS))]), []
    pattern[42 if rng.random() < 0.6 else 51] = pattern.pop(42)       # hi-hat or ride
    if rng.random() < 0.4:
        pattern[int(rng.choice([39, 54, 70, 75, 82, 56]))] = "".join(rng.choice(["x", ".", "."], 16))
    for bar in range(bars):
        for key, steps in pattern.items():
            notes += [(4 * bar + i / 4, 0.2, key, int(rng.integers(60, 90) + 30 * (i % 4 == 0)))
                      for i, step in enumerate(steps) if (step == "x") != (rng.random() < 0.02)]
        if bar % 4 == 3 and rng.random() < 0.7:
            notes += [(4 * bar + 3 + i / 4, 0.2, int(rng.choice([38, 41, 45, 48])), 100) for i in range(4)]
        if bar % 8 == 0:
            notes.append((4 * bar, 2, 49, 100))
    return notes

def part_notes(part, chords, rng):
    """The same for bass or another part that follows `chords`, a list of keys for each bar; it rests at times."""
    rhythms = ([0, 1, 2, 3], [0, 1.5, 2.5], [0], [0, 2], np.arange(0, 4, 0.5), [0.5, 1.5, 2.5, 3.5],
               [0, 0.75, 1.5, 2.5, 3.25])
    beats, notes, shift = rhythms[rng.integers(len(rhythms))], [], int(rng.choice([-12, 0, 0, 12]))
    density, plays = rng.uniform(0.5, 1), True
    for bar, chord in enumerate(chords):
        plays = rng.random() < density if bar % 4 == 0 and bar else plays
        loud = int(rng.integers(70, 110))
        if part == "bass":
            ends = [*beats[1:], 4]
            notes += [(4 * bar + a, 0.9 * (b - a), chord[0] - 24 + int(rng.choice([0, 0, 0, 12, 7])), loud)
                      for a, b in zip(beats, ends)]
        elif plays and part == "pad":
            notes += [(4 * bar, 3.95, key + shift, loud - 20) for key in chord]
        elif plays and part == "comp":
            notes += [(4 * bar + a, rng.choice([0.2, 0.4, 0.9]), key, loud) for a in beats for key in chord]
        elif plays and part == "arpeggio":
            notes += [(4 * bar + i / 4, 0.3, chord[i * 3 % 7 % len(chord)] + shift, loud) for i in range(16)]
        elif plays:                                                   # a lead
            a = 0.0
            while a < 4:
                n = float(rng.choice([0.25, 0.5, 0.5, 1, 1.5, 2]))
                key = chord[rng.integers(len(chord))] + int(rng.choice([0, 0, 0, 2, -1])) + 12
                notes += [(4 * bar + a, n * 0.95, key, loud)] * (rng.random() < 0.85)
                a += n
    return notes

def score(rng, seconds):
    """A made-up song -> (beats per minute, bars, {stem: [(program, notes)]})."""
    tempo = rng.uniform(70, 150)
    bars, key = round(seconds * tempo / 240), int(rng.integers(48, 60))
    scale = [[0, 2, 4, 5, 7, 9, 11], [0, 2, 3, 5, 7, 8, 10], [0, 2, 3, 5, 7, 9, 10]][rng.integers(3)]
    sections = [rng.choice([0, 1, 2, 3, 3, 4, 4, 5], 4) for _ in range(2)]        # two progressions of four chords
    thirds = 3 + (rng.random() < 0.4)                                 # triads or chords of the seventh
    chords = [[key + scale[(root + 2 * i) % 7] + 12 * ((root + 2 * i) // 7) for i in range(thirds)]
              for bar in range(bars) for root in [sections[bar // 8 % 2][bar % 4]]]
    parts = rng.choice(["pad", "comp", "comp", "arpeggio", "lead", "lead"], rng.integers(2, 6))
    other = [(int(rng.choice(PARTS[part])), part_notes(part, chords, rng)) for part in parts]
    return tempo, bars, {"drums": [(int(rng.choice([0, 8, 16, 24, 25, 32, 40])), drum_notes(rng, bars))],
                         "bass": [(int(rng.integers(32, 40)), part_notes("bass", chords, rng))], "other": other}

def midi(tempo, parts, rng, drums):
    """The bytes of a Standard MIDI File, format 0, of [(program, notes)]: a channel each, the tenth for drums."""
    events = []                                                       # (tick of 480 in a beat, bytes)
    for channel, (program, notes) in enumerate(parts):
        channel = 9 if drums else channel
        events += [(0, bytes([0xC0 | channel, program])), (0, bytes([0xB0 | channel, 10, int(rng.integers(20, 108))])),
                   (0, bytes([0xB0 | channel, 1, int(rng.integers(0, 90))])),     # pan; modulation: vibrato
                   (0, bytes([0xB0 | channel, 7, int(rng.integers(70, 120))]))]   # volume
        ends = {}                                                     # a key that is struck again is let go before
        for beat, beats, key, velocity in sorted(notes, reverse=True):
            start, key = max(1, round(480 * beat + rng.normal(0, 4))), int(np.clip(key, 20, 108))
            end = min(start + max(30, round(480 * beats)), ends.get(key, math.inf))
            if start < end:                                           # else twice at once
                ends[key] = start
                events += [(start, bytes([0x90 | channel, key, velocity])), (end, bytes([0x80 | channel, key, 0]))]
    track, now = b"\0\xff\x51\x03" + round(6e7 / tempo).to_bytes(3, "big"), 0
    for tick, event in sorted(events):
        delta, now = tick - now, tick
        size = [delta & 127]
        while delta := delta >> 7:
            size.insert(0, delta & 127 | 128)
        track += bytes(size) + event
    track += b"\0\xff\x2f\0"
    return b"MThd\0\0\0\6\0\0\0\1\1\xe0MTrk" + len(track).to_bytes(4, "big") + track

def accompaniment(rng, seconds):
    """{"drums", "bass", "other": (2, L)} of a song of about `seconds`."""
    tempo, bars, stems = score(rng, seconds)
    length, font, audio = int(bars * 240 / tempo * RATE), FONTS[rng.integers(len(FONTS))], {}
    with tempfile.TemporaryDirectory() as folder:
        for stem, parts in stems.items():
            path = Path(folder, stem)
            path.with_suffix(".mid").write_bytes(midi(tempo, parts, rng, stem == "drums"))
            play("fluidsynth", "-niq", "-r", str(RATE), "-g", "0.4", "-o", "synth.dynamic-sample-loading=1",
                 "-O", "float", "-F", f"{path}.wav", font, f"{path}.mid")
            x = load(f"{path}.wav")[:, :length]
            x = at_level(np.pad(x, ((0, 0), (0, length - x.shape[1]))), -20)
            drive = rng.uniform(1, 6) if rng.random() < 0.3 else 0
            x = np.tanh(drive * x) if drive else x
            audio[stem] = at_level(equalized(x, rng), rng.uniform(-25, -17))
    return audio

# ---- Songs -----------------------------------------------------------------------------------------------------------

def write_song(folder, stems):
    """16-bit WAV files of stems {name: (2, L)}, all there or none; where one or their sum would clip all get softer."""
    gain = min(1, 0.99 / max(np.abs(x).max() for x in (*stems.values(), sum(stems.values()))))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as temporary:
        for name, x in stems.items():
            with mss.write_blocks(Path(temporary, "song", f"{name}.wav"), RATE, 2, subtype="PCM_16") as write:
                write(torch.from_numpy(gain * x).float())
        Path(temporary, "song").rename(folder)

def original_song(song):
    """{stem: (2, L)} of a song's folder."""
    return {name: load(song / f"{name}.ogg") for name in mss.SOURCES}

def recorded_song(song):
    """A song of Everything Is Free; its voice sings more of the time, not where it does in the song."""
    rng, stems = np.random.default_rng([ord(letter) for letter in song.name]), original_song(song)
    return {**stems, "vocals": phrases(sounding(stems["vocals"]), stems["vocals"].shape[1], rng)}

def band_song(band, recording):
    """The band of mdn_multitrack with a singer of vocadito."""
    parts = {path.stem: load(path) for path in sorted(band.glob("*.mp3"))}
    length, rng = min(x.shape[1] for x in parts.values()), np.random.default_rng([ord(x) for x in recording.stem])
    parts = {name: at_level(x[:, :length], -20) for name, x in parts.items()}
    voice = produced(phrases(sounding(load(recording)), length, rng)[0], rng)
    other = sum(parts[name] * rng.uniform(0.3, 1) for name in ("clav", "horns", "leadguitar"))
    return {"vocals": at_level(voice, rng.uniform(-24, -16)), "drums": parts["drums"], "bass": parts["bassguitar"],
            "other": other}

def made_song(number, voice):
    """A made-up accompaniment with another version of a recorded voice, a Path, or a synthetic one, of SPEAKERS."""
    rng = np.random.default_rng(number)
    stems, recorded = accompaniment(rng, 66), isinstance(voice, Path)
    dry = (phrases(sounding(load(voice).mean(axis=0, keepdims=True)), RATE * 30, rng, gap=0)[0] if recorded
           else spoken(*voice, rng))
    voice = phrases(sung(dry, rng, not recorded)[None], stems["drums"].shape[1], rng)[0]
    return {"vocals": at_level(produced(voice, rng), rng.uniform(-24, -16)), **stems}

def make(folder, job):
    function, *arguments = job
    if not folder.exists():
        write_song(folder, function(*arguments))
        print(folder, flush=True)

def main():
    if len(sys.argv) not in (3, 4):
        raise mss.UserError("DATA OUT [SONG] expected")
    data, out, held_out = Path(sys.argv[1]), Path(sys.argv[2]), (*sys.argv, "3.Sodium")[3]
    songs, solos = sorted(data.glob("everything_is_free/*/*/")), sorted(data.glob("vocadito/*.wav"))
    if held_out not in [song.name for song in songs] or not solos or not (data / "mdn_multitrack").is_dir():
        raise mss.UserError(f"{data}: everything_is_free/ with {held_out}, mdn_multitrack/ and vocadito/ expected")
    if missing := [font for font in FONTS if not Path(font).is_file()]:           # fluidsynth would take another one
        raise mss.UserError(f"{missing[0]}: a sound font expected, found no file")
    voices = ([(song.name, song / "vocals.ogg") for song in songs] + [(solo.stem, solo) for solo in solos],
              [(" ".join(speaker), speaker) for speaker in SPEAKERS])
    jobs = {song.name: (recorded_song, song) for song in songs}
    jobs.update({f"mdn {solo.stem}": (band_song, data / "mdn_multitrack", solo) for solo in solos})
    for number in range(SONGS):                                       # recorded and synthetic voices take turns
        name, voice = voices[number % 2][number // 2 % len(voices[number % 2])]
        jobs[f"{name} {number}"] = made_song, number, voice
    jobs = {out / "train" / name: job for name, job in jobs.items() if not name.startswith(held_out)}
    jobs.update({out / "valid" / song.name: (original_song, song) for song in songs if song.name == held_out})
    with concurrent.futures.ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(make, jobs, jobs.values()))
    return 0

if __name__ == "__main__":
    mss.run(main)
