"""Separate songs with a trained checkpoint.

    python separate.py song.mp3 -m runs/vocals/best.pt        # separated/song/{vocals,accompaniment}.wav

The stems are float32 WAV with the song's length, sample rate and level, and vocals + accompaniment = song.
"""
import contextlib
import sys
import time
from pathlib import Path

import soundfile

import mss


def separate_file(model, path, folder, bf16=False, progress=lambda done, total: None):
    """Separate an audio file of any length and sample rate into folder/TARGET.wav -> list of paths, in constant memory.

    The stems have the file's rate, channels and length. A single target's complement is mixture - estimate, made at
    the file's rate, so that the two sum to the file. Raises UserError for unreadable files and non-finite samples.
    """
    config = model.config
    complement = mss.complement(config.targets)
    paths = [Path(folder, f"{name}.wav") for name in list(config.targets) + [complement] * bool(complement)]
    for output in paths:
        if output.resolve() == Path(path).resolve():
            raise mss.UserError(f"{path}: its stems would be written over it; choose another --out")
    with mss.open_audio(path) as file, soundfile.SoundFile(file.name) as again, contextlib.ExitStack() as stack:
        rate, channels, total = file.samplerate, file.channels, file.frames
        blocks = (mss.to_channels(block, config.channels) for block in mss.read_blocks(file))
        blocks = mss.resample_blocks(blocks, rate, config.sample_rate)
        stems = mss.resample_blocks(mss.separate_blocks(model, blocks, bf16=bf16), config.sample_rate, rate)
        writers = [stack.enter_context(mss.write_blocks(output, rate, channels, total)) for output in paths]
        for block in stems:                                           # (S, C, n)
            mixture = mss.read_samples(again, min(block.shape[-1], total - again.tell()))
            block = block[..., :mixture.shape[-1]]                    # resampling twice may add a sample or two
            estimates = list(mss.to_channels(block, channels))
            for write, audio in zip(writers, estimates + [mixture - sum(estimates)] * bool(complement)):
                write(audio)
            progress(again.tell(), total)
    return paths


def progress_line(start):
    """A function that rewrites one line on a terminal: share done and time left."""
    def show(done, total):
        if sys.stderr.isatty() and 0 < done:
            left = (time.time() - start) * (total - done) / done
            print(f"\r{100 * done / total:3.0f} %, {left:.0f} s left \033[K", end="\r", file=sys.stderr, flush=True)
    return show


def main(argv=None):
    parser = mss.parser(__doc__)
    parser.add_argument("inputs", nargs="+", type=Path, metavar="FILE", help="audio files")
    parser.add_argument("-m", "--model", required=True, help="checkpoint file")
    parser.add_argument("-o", "--out", default="separated", type=Path, help="output folder (default: %(default)s)")
    args = parser.parse_args(argv)
    device = mss.pick_device(args.device)
    config, model, _ = mss.load_checkpoint(args.model, device)
    folders = [args.out / path.stem for path in args.inputs]
    same = [str(path) for path, folder in zip(args.inputs, folders) if folders.count(folder) > 1]
    if same:
        raise mss.UserError(f"inputs of different names expected, found {', '.join(same)}; give each its own --out")

    failed = 0
    for path, folder in zip(args.inputs, folders):
        start = time.time()
        try:
            paths = separate_file(model, path, folder, args.bf16, progress_line(start))
        except (mss.UserError, OSError) as error:
            if args.debug:
                raise
            print(f"separate.py: error: {error}", file=sys.stderr)
            failed += 1
            continue
        with mss.open_audio(paths[0]) as file:
            seconds = file.frames / file.samplerate
        factor = f"{(time.time() - start) / seconds:.2f}" if seconds else "n/a"
        print(*paths, sep="\n")
        print(f"{path}: {seconds:.1f} s of audio, {config.model} on {device}, real-time factor {factor}")
    return 0 if not failed else 2 if failed == len(folders) else 1


if __name__ == "__main__":
    mss.run(main)
