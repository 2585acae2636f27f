"""Separate songs into stems that have the song's length, sample rate and level.

    python separate.py song.mp3                               # separated/song/vocals.wav, ...
    python separate.py album/ -m paper -o stems --ext flac
    torchrun --nproc-per-node 8 separate.py album/ -m paper   # shared out over processes and GPUs
"""
import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import mss

@dataclasses.dataclass(frozen=True)
class Options:
    """How songs are separated and written: the command's flags."""
    ext: str = "wav"
    subtype: str | None = None                  # soundfile's; None: the best of the format
    clip_mode: str = "none"                     # or "clamp", "rescale"
    two_stems: bool | None = None               # also write what is left over; None: of one target
    start: float = 0.0                          # s
    duration: float = math.inf                  # s
    segment: int | None = None                  # samples that the network sees at a time
    overlap: int | None = None                  # samples that two of these share; None: the model's
    batch_size: int | None = None               # segments at once; None: as many as fill the device
    bf16: bool = False

    def stems(self, model):
        """The names of the files that are written for a song."""
        targets = model.config.targets
        return [*targets, *mss.leftovers(targets, self.two_stems)]

# ---- One song -----------------------------------------------------------------------------------

def estimate_blocks(model, blocks, rate, channels, options):
    """A song's (C, n) blocks -> blocks of (estimates (S, C, n), mixture (C, n)), as long in all."""
    for_output, for_model = itertools.tee(blocks)
    model_rate = model.config.sample_rate
    x = (mss.to_channels(block, model.config.channels) for block in for_model)
    x = mss.resample_blocks(x, rate, model_rate)
    x = mss.separate_blocks(
        model, x, options.segment, options.overlap, options.batch_size, options.bf16)
    x = mss.resample_blocks(x, model_rate, rate)

    # Resampling twice may add a sample or two at the end.
    mixture = mss.Lookahead(for_output)
    for estimates in x:
        part = mixture.peek(estimates.shape[-1])
        n = part.shape[-1]
        yield mss.to_channels(estimates[..., :n], channels), part
        mixture.drop(n)

def stem_blocks(model, blocks, rate, channels, options):
    """A song's (C, n) blocks -> blocks of all its stems, [(C, n), ...] as options.stems names them.

    They sum to the song: what is left over is the mixture minus an estimate.
    """
    leftovers = mss.leftovers(model.config.targets, options.two_stems)
    for estimates, mixture in estimate_blocks(model, blocks, rate, channels, options):
        estimates = mss.fill_residual(estimates, mixture, model.residual)
        yield [*estimates, *(mixture - estimates[i] for i in leftovers.values())]

def with_progress(stems, frames, progress):
    """Pass the blocks on, and tell the share of `frames` that is done."""
    done = 0
    for blocks in stems:
        yield blocks
        done += blocks[0].shape[-1]
        progress(done / max(frames, 1))

def write_stems(paths, stems, rate, channels, frames, subtype, clamp=False):
    """Write blocks of stems, one for each path -> (samples written, highest absolute sample)."""
    done, peak = 0, 0.0
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(mss.write_blocks(path, rate, channels, frames, subtype))
                   for path in paths]
        for blocks in stems:
            done += blocks[0].shape[-1]
            for write, block in zip(writers, blocks):
                if block.numel():
                    peak = max(peak, block.abs().max().item())
                write(block.clamp(-1, 1) if clamp else block)
    return done, peak

def write_rescaled(paths, stems, rate, channels, frames, subtype):
    """As write_stems, with one gain for all stems that lets none clip -> (samples, peak, gain).

    First to floats, for the last sample may be the peak.
    """
    with contextlib.ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(
            prefix=mss.partial_prefix(), dir=paths[0].parent)
        folder = stack.enter_context(temporary)
        floats = [Path(folder, f"{i}.wav") for i in range(len(paths))]
        done, peak = write_stems(floats, stems, rate, channels, frames, "FLOAT")

        gain = 1 / max(peak, 1.0)
        files = [stack.enter_context(mss.open_audio(path)) for path in floats]
        together = zip(*map(mss.read_blocks, files))
        scaled = ([gain * block for block in blocks] for blocks in together)
        write_stems(paths, scaled, rate, channels, frames, subtype)
    return done, peak, gain

def excerpt(file, path, options):
    """The (first sample, number of samples) to separate of an open file."""
    first = round(options.start * file.samplerate)
    left = max(file.frames - first, 0)
    frames = math.ceil(min(left, options.duration * file.samplerate))
    if not frames and (first or options.ext in ("flac", "mp3")):      # which can't hold no samples
        raise mss.UserError(f"{path}: more than {options.start:g} s expected (--start), found "
                            f"{file.frames / file.samplerate:g} s")
    return first, frames

def separate_file(model, path, folder, options=Options(), progress=lambda share: None):
    """Separate a file of any length and rate into folder/STEM.ext, in constant memory.

    -> (paths, seconds, peak, gain): the files, how long they are, the highest absolute sample
    before clipping, and the gain of clip mode "rescale". Stems have the file's rate, channels and
    length, and those of a model of one target sum to it. UserError for a bad file.
    """
    paths = [Path(folder, f"{stem}.{options.ext}") for stem in options.stems(model)]
    with mss.open_audio(path, whole=True) as file:
        rate, channels = file.samplerate, file.channels
        first, frames = excerpt(file, path, options)
        stems = stem_blocks(
            model, mss.read_blocks(file, first, frames), rate, channels, options)
        stems = with_progress(stems, frames, progress)

        paths[0].parent.mkdir(parents=True, exist_ok=True)
        gain = 1.0
        try:
            if options.clip_mode == "rescale":
                done, peak, gain = write_rescaled(
                    paths, stems, rate, channels, frames, options.subtype)
            else:
                done, peak = write_stems(
                    paths, stems, rate, channels, frames, options.subtype,
                    clamp=options.clip_mode == "clamp")
        finally:
            with contextlib.suppress(OSError):
                paths[0].parent.rmdir()                               # only if nothing was written

    return paths, done / rate, peak, gain

# ---- Many songs ---------------------------------------------------------------------------------

STEMS = {name for source in mss.SOURCES for name in (source, mss.complement(source))}

def is_stem(path, out):
    """Whether an earlier run wrote a file, as far as its name and its place tell.

    It is named as a stem, and lies in a folder below `out`, or beside the stems that it sums to a
    song with.
    """
    def are_beside(*names):
        return all(path.with_name(name + path.suffix).is_file() for name in names)

    if path.stem not in STEMS:
        return False
    target = path.stem.removeprefix("no_")
    below = Path(os.path.realpath(out)) in Path(os.path.realpath(path)).parents[1:]
    return below or are_beside(target, mss.complement(target)) or are_beside(*mss.SOURCES)

def line(text):
    """Anything as one line: names can hold newlines."""
    return " ".join(str(text).splitlines())

def tell(what, paths):
    """Say on stderr how many paths are so, and name some; nothing where there is none."""
    if paths:
        names = ", ".join(map(line, sorted(paths)[:5])) + (", ..." if len(paths) > 5 else "")
        print(f"notice: {what} ({len(paths)}): {names}", file=sys.stderr)

def audio_files(folder, out):
    """(songs, stems of earlier runs): the audio files at any depth of a folder, but hidden ones.

    What else is left out is named on stderr, as the stems are.
    """
    def visible(place, names):
        return [Path(place, name) for name in names if not name.startswith((".", "__MACOSX"))]

    songs, stems, links, others, closed = [], [], [], [], []
    for place, folders, names in os.walk(folder, onerror=closed.append):
        inside = [path for path in visible(place, folders)
                  if os.path.realpath(path) != os.path.realpath(out)]
        links += [path for path in inside if path.is_symlink()]
        folders[:] = [path.name for path in inside if not path.is_symlink()]

        for path in visible(place, names):
            ending = path.suffix.lower()
            if ending in mss.AUDIO and os.path.isfile(path):
                (stems if is_stem(path, out) else songs).append(path)
            elif ending in mss.AUDIO | mss.OTHER_AUDIO:
                others.append(path)

    tell("stems of an earlier run left out", stems)
    tell("linked folders not searched", links)
    tell("folders that can't be read", [error.filename for error in closed])
    tell("like audio by name, but not readable", others)
    return sorted(songs), stems

def find_songs(inputs, out):
    """Files, and folders searched through -> {audio file: how many folders to name it by}.

    Those are the folders between a folder searched through and the file. Each file comes once.
    """
    found, known = {}, set()
    for given in inputs:
        songs, stems = audio_files(given, out) if os.path.isdir(given) else ([given], [])
        if not songs and not stems:
            songs = [given]                                           # will be one of the failures
        for path in songs:
            real = os.path.realpath(path)
            if real not in known:
                known.add(real)
                found[path] = len(path.relative_to(given).parent.parts)
    if not found:
        raise mss.UserError("songs expected, found stems of earlier runs only; give their names, "
                            "if they are to be separated")
    return found

def shortened(name, ending=""):
    """A name with an ending, cut to what file systems take: 255 bytes in all."""
    while len(os.fsencode(name + ending)) > 255:
        name = name[:-1]
    return name + ending

def name_folders(found, out):
    """What find_songs gives -> [(audio file, folder for its stems)], no folder twice."""
    depths = dict(found)
    above = {path: Path(os.path.abspath(path)).parent.parts[1:] for path in found}

    def folder_of(path, ending=""):
        name = path.stem.rstrip(". ") or path.name
        folders = above[path][len(above[path]) - depths[path]:]
        return Path(out, *folders, shortened(name, ending))

    def key(folder):
        return str(folder).casefold()                                 # some disks ignore case

    # Where songs of several folders meet, as */mixture.wav do, one folder more is named.
    deeper = found
    while deeper:
        groups = collections.defaultdict(list)
        for path in found:
            groups[key(folder_of(path))].append(path)
        meeting = [group for group in groups.values() if len({above[path] for path in group}) > 1]
        deeper = [path for group in meeting for path in group if depths[path] < len(above[path])]
        for path in deeper:
            depths[path] += 1

    songs = {}
    for path in found:
        folder = folder_of(path)
        ending = ""
        if len(groups[key(folder)]) > 1:                              # song.mp3 and song.wav
            ending = f" ({path.suffix[1:20]})"
            folder = folder_of(path, ending)
        number = itertools.count(2)
        while key(folder) in songs:
            folder = folder_of(path, f"{ending} {next(number)}")
        songs[key(folder)] = path, folder
    return list(songs.values())

# ---- The command --------------------------------------------------------------------------------

checkpoint_path = mss.checkpoint_path           # older notebooks look for it here

def clean(out, folders):
    """Remove what killed processes left in the songs' folders, and one level below `out`."""
    with contextlib.suppress(OSError):
        folders = {*folders, *(Path(out, name) for name in os.listdir(out))}
    for folder in folders:
        mss.remove_partials(folder)

def list_models():
    """Print the names of weights, and what is known about them."""
    told = {"default": "paper-small if it is here or can be downloaded now, else bundled"}
    for name, published in mss.PUBLISHED.items():
        sdr = ", ".join(f"{target} {value} dB" for target, value in published.sdr.items())
        told[name] = (f"{sdr} by {published.said_by}; {published.size}; {published.licence} "
                      f"(Zenodo {published.record})")
    card = mss.load_checkpoint(checkpoint_path("bundled"))[2]
    told["bundled"] = f"{card['about']}; {card['licence']}"

    for name, text in told.items():
        print(textwrap.fill(f"{name}: {text}", 100, subsequent_indent="    "))
    print("\nOf all but bundled: dB is SDR (museval) on MUSDB18 test, and not measured here")

def build_parser():
    parser = mss.parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, metavar="FILE", help="audio files, and folders to search")
    add("-m", "--model", nargs="+", action="extend", default=[],
        help="a name that --list-models prints, or FILE (default: default)")
    add("--list-models", action="store_true", help="print the models that have names")
    add("-o", "--out", default="separated", type=Path, help="output folder (default: %(default)s)")
    add("--skip-existing", action="store_true",
        help="leave out songs whose stems are there, of whatever flags, and no older than the song")

    add("--ext", choices=("wav", "flac", "mp3", "ogg"), default="wav",
        help="default: wav, in float32")
    for bits in (24, 16):
        add(f"--int{bits}", dest="subtype", action="store_const", const=f"PCM_{bits}",
            help=f"{bits}-bit wav or flac")
    add("--clip-mode", choices=("none", "clamp", "rescale"), default="none",
        help="samples above full scale: leave them, limit them, or one gain for all stems of the "
        "song (default: %(default)s)")
    add("--two-stems", action=argparse.BooleanOptionalAction,
        help="also write the song without the target, or not")
    add("--start", type=float, default=0.0, metavar="S",
        help="seconds to skip at the beginning (default: %(default)s)")
    add("--duration", type=float, default=math.inf, metavar="S",
        help="seconds to separate (default: all)")

    add("--segment", type=float, metavar="S",
        help="seconds at a time (default: the model's, mostly 6.39)")
    add("--overlap", type=float, metavar="S",
        help="seconds that two share (default: the model's, mostly 0.63, or the same part of a "
        "shorter --segment)")
    add("--batch-size", type=int, metavar="N",
        help="segments at once (default: 1 on a CPU, up to 4 on a GPU)")
    return parser

def check(parser, args):
    """End with a line that says what is wrong about the flags, if something is."""
    if not args.inputs and not args.list_models:
        parser.error("FILE expected: audio files or folders of them")
    if args.subtype and args.ext not in ("wav", "flac"):
        parser.error(f"--ext {args.ext}: has no --int16 or --int24")
    # Whether the two fit is seen when the model is known: mss.block_lengths.
    for name, value, lowest in (("segment", args.segment, 0.01), ("overlap", args.overlap, 0)):
        if value is not None and not lowest <= value <= 1e5:
            parser.error(f"--{name}: {lowest} to 100000 s expected, found {value:g}")
    if not 0 <= args.start < math.inf or not args.duration > 0:
        parser.error("--start from 0, --duration above 0 expected")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error("--batch-size from 1 expected")

def with_lengths(options, args, model):
    """The options with the lengths of the model's blocks, as --segment and --overlap say."""
    rate = model.config.sample_rate
    given = [None if seconds is None else round(seconds * rate)
             for seconds in (args.segment, args.overlap)]
    segment, overlap = mss.block_lengths(model, *given)
    return dataclasses.replace(options, segment=segment, overlap=overlap)

def parse(argv):
    parser = build_parser()
    args = parser.parse_args(argv)

    # Of `-m MODEL song.wav` -m takes the song, too.
    models, songs = [], []
    for word in args.model:
        missing = not Path(word).suffix and not os.path.exists(word)
        mistyped = missing and mss.nearest_name(word)
        named = word in mss.NAMES or Path(word).suffix in (".pt", ".pth") or mistyped
        (models if named or not models else songs).append(word)
    args.model = models or ["default"]
    args.inputs += map(Path, songs)

    check(parser, args)
    args.options = Options(
        ext=args.ext, subtype=args.subtype, clip_mode=args.clip_mode, two_stems=args.two_stems,
        start=args.start, duration=args.duration, batch_size=args.batch_size, bf16=args.bf16)
    return args

def are_newer(outputs, path):
    """Whether all outputs are there, and none older than the file at `path`."""
    return all(output.is_file() and output.stat().st_mtime >= path.stat().st_mtime
               for output in outputs)

class Progress:
    """A line on a terminal: the share of the song that is done, and the time that is left."""

    def __init__(self, title):
        self.title = title
        self.started = time.time()

    def __call__(self, share):
        if mss.on_terminal(sys.stderr) and share:
            left = (time.time() - self.started) * (1 / share - 1)
            told = f"{self.title}: {share:4.0%}, {left:.0f} s left" if share < 1 else ""
            print(told, end=mss.CLEAR, file=sys.stderr, flush=True)

def separate_song(args, model, path, folder, title, inputs):
    """Separate one of the `inputs` and report it -> "done", "skipped" or "failed"."""
    options = args.options
    progress = Progress(line(title + path.name))
    try:
        outputs = [Path(folder, f"{stem}.{options.ext}") for stem in options.stems(model)]
        over = inputs & set(map(os.path.realpath, outputs))
        if over:
            raise mss.UserError(f"{path}: its stems would be written over {', '.join(over)}; "
                                "choose another --out")
        if args.skip_existing and are_newer(outputs, path):
            return "skipped"
        paths, length, peak, gain = separate_file(model, path, folder, options, progress)
    except () if args.debug else Exception as error:
        # Nothing that is wrong about a song may end the others.
        place = "" if str(path) in str(error) else f"{path}: "
        told = line(f"{place}{str(error) or type(error).__name__}")
        print(f"separate.py: error: {told}", file=sys.stderr)
        return "failed"

    clips = options.clip_mode == "clamp" or options.ext != "wav" or options.subtype
    if gain < 1:
        decibels = 20 * math.log10(gain)
        print(f"{line(path)}: all stems x {gain:.4f} ({decibels:.2f} dB): the highest peak was "
              f"{peak:.3f}")
    elif peak > 1 and clips:
        print(f"notice: {line(path)}: its peak, {peak:.3f}, clips above 1; --clip-mode rescale "
              "avoids it", file=sys.stderr)

    seconds = time.time() - progress.started
    factor = f"{seconds / length:.3f}" if length else "n/a"
    device = next(model.parameters()).device
    told = (f"{title}{path}: {length:.1f} s, {'+'.join(args.model)} on {device}, real-time factor "
            f"{factor}, {mss.peak_memory(device):.2f} GiB at the peak")
    print(*map(line, [*paths, told]), sep="\n", flush=True)
    return "done"

def main(argv=None):
    args = parse(argv)
    if args.list_models:
        list_models()
        return 0

    # Process 0 downloads and searches, before any stem is written; the others wait.
    store, rank = mss.shared_store()
    if rank == 0:
        args.model = mss.without_default(args.model)
        found = name_folders(find_songs(args.inputs, args.out), args.out)
        clean(args.out, [folder for _, folder in found])
    else:
        mss.wait_for(store, ["model", "songs"])
        args.model = json.loads(store.get("model"))
    model = mss.load_models(args.model, mss.pick_exact_device(args.device))
    args.options = with_lengths(args.options, args, model)
    if rank == 0:
        store.set("model", json.dumps(args.model))
        store.set("songs", json.dumps([[str(path) for path in song] for song in found]))
    songs = [[Path(path) for path in song] for song in json.loads(store.get("songs"))]

    inputs = {os.path.realpath(path) for path, _ in songs}
    for i in mss.turns(store, len(songs)):
        title = f"[{i + 1}/{len(songs)}] " if len(songs) > 1 else ""
        store.set(f"song {i}", separate_song(args, model, *songs[i], title, inputs))
    if rank > 0:
        return 0

    # Process 0 speaks for all.
    mss.wait_for(store, [f"song {i}" for i in range(len(songs))])
    ends = {path: store.get(f"song {i}").decode() for i, (path, _) in enumerate(songs)}
    tell("skipped, for their stems are there", [path for path in ends if ends[path] == "skipped"])
    failed = [str(path) for path in ends if ends[path] == "failed"]
    if failed and len(songs) > 1:
        names = line(", ".join(failed))
        print(f"separate.py: {len(failed)} of {len(songs)} songs failed: {names}", file=sys.stderr)
    if not failed:
        return 0
    return 2 if len(failed) == len(songs) else 1

if __name__ == "__main__":
    mss.run(main)
