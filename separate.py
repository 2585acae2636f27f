"""Separate songs into stems that have the song's length, sample rate and level.

    python separate.py song.mp3                               # separated/song/{vocals,accompaniment}.wav
    python separate.py album/ -m paper -o stems --ext flac
    torchrun --nproc-per-node 8 separate.py album/ -m paper   # the files shared out over processes and GPUs
"""
import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import http.client
import itertools
import math
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import mss

PUBLISHED = {   # the weights of the paper's authors: name -> target, SDR (dB, MUSDB18 test, by the file's name), sha256
    "paper": ("vocals", 8.9, "0fa735205731b9685c63ce5c83e9469eff934f1c20dfd2260b4182194afedb96"),
    "paper-accompaniment": ("accompaniment", 16.8, "a81ecdb0095ae6bb4433d6b3e4e0a30e57a1fbf5c931c950c20247d14fa1efd5")}
URL = "https://zenodo.org/records/5513378/files/resunet143_ismir2021_{}_{}dB_350k_steps.pth?download=1"
AUDIO = set(".wav .flac .ogg .opus .mp3 .aif .aiff .caf .m4a .aac .mp4 .mov .mkv .webm .wma".split())   # in folders

# ---- Models by path or by name ---------------------------------------------------------------------------------------

def checkpoint_path(name):
    """The file of a name, those of PUBLISHED downloaded once into torch.hub's cache, or UserError; others are paths."""
    if name not in PUBLISHED:
        return Path(__file__).resolve().with_name("weights") / "vocals.pt" if name == "default" else Path(name)
    target, sdr, sha256 = PUBLISHED[name]
    url = URL.format(target, sdr)
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1].removesuffix("?download=1"))
    if not path.exists():
        print(f"downloading {url} (461 MB) to {path}", file=sys.stderr)
        socket.setdefaulttimeout(60)                                  # seconds without a single byte
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path, hash_prefix=sha256, progress=sys.stderr.isatty())
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise mss.UserError(f"{name}: not downloaded: {mss.one_line(error)}; try again, or put {url} "
                                f"(sha256 {sha256}) at {path} by hand") from error
    return path

def introduce(names, text="notice: {about}; the paper's quality: -m paper, 461 MB", file=None):
    """Say what the default model is where `names` mean that, on stderr unless there is another file."""
    if "default" in names:
        print(text.format(**mss.load_checkpoint(checkpoint_path("default"))[2]), file=file or sys.stderr)

def list_models():
    for name, (target, sdr, _) in PUBLISHED.items():
        print(f"{name}: {target}, {mss.complement([target])}; {target} {sdr} dB SDR (museval, MUSDB18 test, by "
              "the file's name); 461 MB; trained on MUSDB18, for non-commercial use (Zenodo 5513378)")
    introduce(["default"], "default: {about}; {licence}", sys.stdout)

class Together(torch.nn.Module):
    """Several models on the same windows: (B, C, L) -> (B, S1 + S2 + ..., C, L)."""
    def __init__(self, models):
        super().__init__()
        targets = sum((tuple(model.config.targets) for model in models), ())
        formats = {f"{model.config.sample_rate} Hz {model.config.channels} ch" for model in models}
        if len(set(targets)) < len(targets) or len(formats) > 1:
            raise mss.UserError(f"-m: different targets, one format expected, found {', '.join([*targets, *formats])}")
        self.models, self.config = torch.nn.ModuleList(models), dataclasses.replace(models[0].config, targets=targets)
        self.stride = max(getattr(model, "stride", 1) for model in models)

    def forward(self, mixture):
        return torch.cat([model(mixture) for model in self.models], dim=1)

def load_models(names, device):
    """Checkpoints by path or name -> one model for all their targets, ready for inference."""
    models = [mss.fold_batch_norms(mss.load_checkpoint(checkpoint_path(name), device)[1]) for name in names]
    return Together(models) if len(models) > 1 else models[0]

# ---- One song --------------------------------------------------------------------------------------------------------

def estimate_blocks(model, mixture, rate, channels, **options):
    """A stream of (C, n) blocks at `rate` -> a stream of (estimates (S, C, n), mixture (C, n)), n in all as before."""
    (mixture, copy), config = itertools.tee(mixture), model.config
    blocks = mss.resample_blocks((mss.to_channels(x, config.channels) for x in copy), rate, config.sample_rate)
    blocks = mss.resample_blocks(mss.separate_blocks(model, blocks, **options), config.sample_rate, rate)
    ahead = next(mixture)
    for block in blocks:                                              # (S, C, n)
        while ahead.shape[-1] < block.shape[-1] and (more := next(mixture, None)) is not None:
            ahead = torch.cat([ahead, more], dim=-1)
        n = min(block.shape[-1], ahead.shape[-1])                     # resampling twice may add a sample or two
        yield mss.to_channels(block[..., :n], channels), ahead[..., :n]
        ahead = ahead[..., n:]

def write_stems(paths, stems, rate, channels, frames, subtype, clip_mode):
    """Write a stream of [(C, n), ...], a block for each path -> (highest absolute sample, gain)."""
    peak, gain = 0.0, 1.0
    with contextlib.ExitStack() as stack:
        if clip_mode == "rescale":                                    # as floats first: the last sample may be the peak
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".partial-", dir=paths[0].parent))
            floats = [Path(folder, f"{i}.wav") for i in range(len(paths))]
            peak, _ = write_stems(floats, stems, rate, channels, frames, "FLOAT", "none")
            gain = 1 / max(peak, 1.0)
            files = [stack.enter_context(mss.open_audio(path)) for path in floats]
            stems = ([gain * block for block in blocks] for blocks in zip(*map(mss.read_blocks, files)))
        writers = [stack.enter_context(mss.write_blocks(path, rate, channels, frames, subtype)) for path in paths]
        for blocks in stems:
            for write, block in zip(writers, blocks):
                peak = max([peak, *block.abs().amax(dim=-1).tolist()]) if block.numel() else peak
                write(block.clamp(-1, 1) if clip_mode == "clamp" else block)
    return peak, gain

def rests(targets, two_stems=None):
    """{name: number of the target} of what is left of the mixture without a target; None: if there is just one."""
    names = {mss.complement([target]) or f"no_{target}": i for i, target in enumerate(targets)}
    wanted = len(targets) == 1 if two_stems is None else two_stems
    return {name: i for name, i in names.items() if wanted and name not in targets}

def separate_file(model, path, folder, ext="wav", subtype=None, clip_mode="none", two_stems=None, start=0.0,
                  duration=math.inf, progress=lambda share: None, **options):
    """Separate a file of any length and rate into folder/TARGET.ext in constant memory -> (paths, seconds, peak, gain).

    Stems have its rate, channels and length; the rest is mixture - estimate, so that they sum to the file. `options`
    are those of mss.separate_blocks. UserError for a bad file.
    """
    rest, last = rests(model.config.targets, two_stems), getattr(getattr(model, "backbone", None), "rest", None)
    paths = [Path(folder, f"{name}.{ext}") for name in (*model.config.targets, *rest)]
    with mss.open_audio(path) as file:
        rate, first, done = file.samplerate, round(start * file.samplerate), 0
        frames = math.ceil(min(max(file.frames - first, 0), duration * rate))
        if not frames and (first or ext in ("flac", "mp3")):          # which can't hold no samples
            raise mss.UserError(f"{path}: more than {start:g} s expected (--start), found {file.frames / rate:g} s")
        def stems():
            nonlocal done
            blocks = mss.read_blocks(file, first, frames)
            for estimates, mixture in estimate_blocks(model, blocks, rate, file.channels, **options):
                done += mixture.shape[-1]
                progress(done / max(frames, 1))
                if last is not None:                                  # what the others leave, at the file's rate
                    estimates = [*estimates[:last], mixture - estimates.sum(0) + estimates[last], *estimates[last + 1:]]
                yield [*estimates, *(mixture - estimates[i] for i in rest.values())]
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        try:
            peak, gain = write_stems(paths, stems(), rate, file.channels, frames, subtype, clip_mode)
        finally:
            with contextlib.suppress(OSError):
                paths[0].parent.rmdir()                               # only if nothing was written
    if done < frames:
        print(f"notice: {path}: truncated? {frames / rate:.1f} s expected, found {done / rate:.1f} s", file=sys.stderr)
    return paths, done / rate, peak, gain

def audio_files(folder, out):
    """The audio files at any depth of a folder, but for hidden ones and stems in an `out` that lies in the folder."""
    stems = out.resolve() if folder.resolve() in out.resolve().parents else None
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO and path.is_file()
                  and not any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)
                  and stems not in path.resolve().parents)

def find_songs(inputs, out):
    """Files, and folders searched through -> [(audio file, folder for its stems)], each file once, no folder twice."""
    found = {}                                                        # by the file, resolved
    for given in inputs:
        for path in audio_files(given, out) or [given]:               # an empty folder will be one of the failures
            folder = out / path.relative_to(given).parent / (path.stem.rstrip(". ") or path.name)
            found.setdefault(path.resolve(), (path, folder))
    names, songs = collections.Counter(str(folder).casefold() for _, folder in found.values()), {}
    for path, folder in found.values():
        if names[str(folder).casefold()] > 1:                         # song.mp3 and song.wav
            folder = folder.with_name(f"{folder.name} ({path.suffix[1:]})")
        while str(folder).casefold() in songs:                        # song.mp3 of two folders
            folder = folder.with_name(folder.name + "+")
        songs[str(folder).casefold()] = path, folder
    return list(songs.values())

# ---- The command -----------------------------------------------------------------------------------------------------

def torchrun():
    """(the store that torchrun's processes share, this one's rank); without torchrun a store of its own and 0."""
    alone = "TORCHELASTIC_RUN_ID" not in os.environ
    return (torch.distributed.HashStore(), 0) if alone else next(torch.distributed.rendezvous("env://"))[:2]

def turns(store, count):
    """Yield the numbers below `count` that no other process took before: a free one takes the next."""
    while (i := store.add("turn", 1) - 1) < count:
        yield i

def measure(options, names, device, seconds):
    """Separate noise in this process, which is new, so that the peak is this run's; print a row of the table."""
    mss.keep_memory()
    device, dtype = mss.pick_device(device), torch.bfloat16 if options["bf16"] else torch.float32
    model = load_models(names, device)
    mixture = 0.1 * torch.randn(model.config.channels, round(seconds * model.config.sample_rate))
    mss.separate_track(model, mixture[:, :options["segment"]], **options)       # the first is slower
    blocks, rows, more = mss.separate_blocks(model, [mixture], **options), [], True
    while more:
        start = time.perf_counter()
        more = next(blocks, None) is not None
        rows.append((time.perf_counter() - start, mss.convolution_rate(device, dtype)))
    (wall, rates), peak = map(sum, zip(*rows)), mss.peak_memory(device)       # in turns: what slows one slows the other
    with FlopCounterMode(display=False, custom_mapping=mss.baselines.LSTM_FLOPS) as count:
        mss.separate_track(model, mixture, **{**options, "bf16": False})      # bfloat16 LSTMs fail when counted
    print(f"{str(dtype)[6:]:9} {wall:6.1f} {wall / seconds:17.3f} {(n := count.get_total_flops()) / wall / 1e9:8.1f} "
          f"{rates / len(rows) / 1e9:13.0f} {n / wall / rates * len(rows):5.0%} {peak:9.2f}", flush=True)

def benchmark(args):
    print(f"{args.benchmark:g} s of noise, {' '.join(args.model)}, {mss.pick_device(args.device)}, "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads\n"
          "          wall s  real-time factor  GFLOP/s  of a 3x3 convolution's  peak GiB", flush=True)
    for bf16 in (False, True):
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(measure, {**args.options, "bf16": bf16}, args.model, args.device, args.benchmark).result()

def parse(argv):
    parser = mss.parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, metavar="FILE", help="audio files, and folders to search")
    add("-m", "--model", nargs="+", action="extend", default=[], help="default, paper, paper-accompaniment or FILE")
    add("--list-models", action="store_true", help="print the models that have names")
    add("-o", "--out", default="separated", type=Path, help="output folder (default: %(default)s)")
    add("--ext", choices=("wav", "flac", "mp3", "ogg"), default="wav", help="default: wav, in float32")
    for bits in (24, 16):
        add(f"--int{bits}", dest="subtype", action="store_const", const=f"PCM_{bits}", help=f"{bits}-bit wav or flac")
    add("--clip-mode", choices=("none", "clamp", "rescale"), default="none", help="samples above full scale: leave "
        "them, limit them, or one gain for all stems of the song (default: %(default)s)")
    add("--two-stems", action=argparse.BooleanOptionalAction, help="also write the song without the target, or not")
    add("--start", type=float, default=0.0, metavar="S", help="seconds to skip at the beginning (default: %(default)s)")
    add("--duration", type=float, default=math.inf, metavar="S", help="seconds to separate (default: all)")
    add("--segment", type=float, default=mss.SEGMENT / 44100, metavar="S", help="seconds at a time (%(default)s)")
    add("--overlap", type=float, default=mss.OVERLAP / 44100, metavar="S", help="seconds that two share (%(default)s)")
    add("--batch-size", type=int, default=1, metavar="N", help="segments at once (default: %(default)s)")
    add("--benchmark", type=float, metavar="SECONDS", help="time noise of that length, in float32 and bf16")
    args = parser.parse_args(argv)
    models = [word for i, word in enumerate(args.model)               # of `-m MODEL song.wav` -m takes the song, too
              if i == 0 or word in ("default", *PUBLISHED) or Path(word).suffix in (".pt", ".pth")] or ["default"]
    args.model, args.inputs = models, args.inputs + [Path(word) for word in args.model if word not in models]
    for wrong, message in (
            (not (args.inputs or args.list_models or args.benchmark), "FILE expected: audio files or folders of them"),
            (args.subtype and args.ext not in ("wav", "flac"), f"--ext {args.ext}: has no --int16 or --int24"),
            (not 0 <= 1.5 * args.overlap < args.segment < math.inf, "a --segment of over 1.5 times --overlap expected"),
            (not 0 <= args.start < math.inf or not args.duration > 0, "--start from 0, --duration above 0 expected"),
            (args.batch_size < 1 or not 1 <= (args.benchmark or 1) < 1e6, "--batch-size, --benchmark from 1 expected")):
        if wrong:
            parser.error(message)
    args.options = dict(segment=round(args.segment * 44100), overlap=round(args.overlap * 44100),
                        batch_size=args.batch_size, bf16=args.bf16)
    return args

def separate_song(args, model, path, folder, title):
    """Separate one song as the command line says and report it -> whether that went well."""
    started, device = time.time(), next(model.parameters()).device
    def progress(share):
        if sys.stderr.isatty() and share:
            print(f"{title}{path.name}: {share:4.0%}, {(time.time() - started) * (1 / share - 1):.0f} s left"
                  * (share < 1), end="\033[K\r", file=sys.stderr, flush=True)
    try:
        how = (args.ext, args.subtype, args.clip_mode, args.two_stems, args.start, args.duration)
        paths, length, peak, gain = separate_file(model, path, folder, *how, progress, **args.options)
    except () if args.debug else (mss.UserError, OSError, UnicodeError) as error:
        print(f"separate.py: error: {'' if str(path) in str(error) else f'{path}: '}{error}", file=sys.stderr)
        return False
    if gain < 1:
        print(f"{path}: all stems x {gain:.4f} ({20 * math.log10(gain):.2f} dB): the highest peak was {peak:.3f}")
    elif peak > 1 and (args.clip_mode == "clamp" or args.ext != "wav" or args.subtype):
        print(f"notice: {path}: its peak, {peak:.3f}, clips above 1; --clip-mode rescale avoids it", file=sys.stderr)
    factor = f"{(time.time() - started) / length:.3f}" if length else "n/a"
    print(*paths, f"{title}{path}: {length:.1f} s, {'+'.join(args.model)} on {device}, real-time factor {factor}, "
          f"{mss.peak_memory(device):.2f} GiB at the peak", sep="\n", flush=True)
    return True

def main(argv=None):
    args = parse(argv)
    if args.list_models or args.benchmark:
        return (list_models() if args.list_models else benchmark(args)) or 0
    store, rank = torchrun()
    introduce(args.model * (rank == 0))
    songs = find_songs(args.inputs, args.out)
    while rank and not store.check(["downloaded"]):                   # by process 0; store.wait would hold up signals
        time.sleep(0.2)
    model = load_models(args.model, mss.pick_device(args.device))
    store.set("downloaded", "")
    stems = (*model.config.targets, *rests(model.config.targets, args.two_stems))
    outputs = {Path(folder, f"{stem}.{args.ext}").resolve() for _, folder in songs for stem in stems}
    if over := [str(path) for path, _ in songs if path.resolve() in outputs]:
        raise mss.UserError(f"{', '.join(over)}: stems would be written over it; choose another --out")
    for i in turns(store, len(songs)):
        title = f"[{i + 1}/{len(songs)}] " * (len(songs) > 1)
        store.set(f"song {i}", str(separate_song(args, model, *songs[i], title)))
    while not rank and not store.check([f"song {i}" for i in range(len(songs))]):     # process 0 speaks for all
        time.sleep(0.2)
    failed = [str(path) for i, (path, _) in enumerate(songs) if not rank and store.get(f"song {i}") != b"True"]
    if failed and len(songs) > 1:
        print(f"separate.py: {len(failed)} of {len(songs)} songs failed: {', '.join(failed)}", file=sys.stderr)
    return 0 if not failed else 2 if len(failed) == len(songs) else 1

if __name__ == "__main__":
    mss.run(main)
