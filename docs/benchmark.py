"""Measure speed and memory of all that the project does, and print tables in markdown.

    python docs/benchmark.py                             # everything: a quarter of an hour on a CPU
    python docs/benchmark.py separation -m paper         # 60 s of noise, in float32 and bfloat16
    python docs/benchmark.py training loader --musdb /data/musdb18hq

Machines are shared and differ: what is printed is best read as ratios within one run. For that
reason the convolution that the networks spend most of their time on is timed beside them.
"""
import concurrent.futures
import contextlib
import copy
import itertools
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.utils.benchmark
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import mss
import train

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# ---- Tools --------------------------------------------------------------------------------------

def in_new_process(function, *arguments):
    """function(*arguments) in a process of its own, so that its peak of memory is its own."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(function, *arguments).result()

def seconds_of(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start

def heading(title, *columns):
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)

def row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)

@torch.inference_mode()
def convolution_rate(device, dtype):
    """The FLOP/s of a 3x3 convolution of 384 features, the ResUNet's widest: its ceiling here."""
    batch = 1 if device.type == "cpu" else 32
    convolution = nn.Conv2d(384, 384, 3, padding=1, bias=False)
    convolution = convolution.to(device, dtype, memory_format=torch.channels_last)
    x = torch.randn(batch, 384, 64, 64)
    x = x.to(device, dtype, memory_format=torch.channels_last)
    timer = torch.utils.benchmark.Timer(
        "convolution(x)", globals={"convolution": convolution, "x": x},
        num_threads=torch.get_num_threads())
    return 2 * 9 * 384 * x.numel() / timer.blocked_autorange(min_run_time=0.2).median

def lstm_flops(factor, weights):
    """What FlopCounterMode needs to count LSTMs.

    Each weight is used once for each example and each frame. `weights`: where among an operator's
    arguments the weights' shapes stand; `factor`: 1, and 2 for a backward pass.
    """
    def count(x, *shapes, **_):
        matrices = [shape.numel() for shape in shapes[weights] if len(shape) == 2]
        return 2 * factor * x[0] * x[1] * sum(matrices)
    return count

LSTM_FLOPS = {
    torch.ops.aten.lstm: lstm_flops(1, 1),
    torch.ops.aten.mkldnn_rnn_layer: lstm_flops(1, slice(2)),
    torch.ops.aten.mkldnn_rnn_layer_backward: lstm_flops(2, slice(2)),
    torch.ops.aten._cudnn_rnn: lstm_flops(1, 0),
    torch.ops.aten._cudnn_rnn_backward: lstm_flops(2, 0),
}

def count_flops(function):
    """The floating-point operations of function(): two for a multiply-add."""
    with FlopCounterMode(display=False, custom_mapping=LSTM_FLOPS) as counter:
        function()
    return counter.get_total_flops()

# ---- Separation ---------------------------------------------------------------------------------

def model_to_measure(args, device):
    """The checkpoint of -m, or the paper's network with random weights."""
    if args.model:
        return mss.load_models([args.model], device)
    model = mss.MODELS["ResUNetDecouple+"](mss.Config())
    model = model.to(device, memory_format=torch.channels_last).eval()
    return mss.fold_batch_norms(model)

def measure_separation(args, precision):
    """Separate noise -> a row: the convolution is timed between the blocks."""
    mss.keep_memory()
    device = mss.pick_device(args.device)
    bf16 = precision == "bfloat16"
    model = model_to_measure(args, device)
    config = model.config
    noise = 0.1 * torch.randn(config.channels, round(args.song * config.sample_rate))
    mss.separate_track(model, noise[:, :mss.SEGMENT], bf16=bf16)      # the first one is slower

    # In turns, so that what slows one slows the other.
    blocks = mss.separate_blocks(model, [noise], bf16=bf16)
    seconds, rates = 0.0, []
    while True:
        start = time.perf_counter()
        block = next(blocks, None)
        seconds += time.perf_counter() - start
        rates.append(convolution_rate(device, PRECISIONS[precision]))
        if block is None:
            break
    peak = mss.peak_memory(device)

    # In float32, for bfloat16 LSTMs fail when they are counted.
    rate = count_flops(lambda: mss.separate_track(model, noise)) / seconds
    ceiling = float(np.mean(rates))
    return (precision, f"{seconds:.1f}", f"{seconds / args.song:.3f}", f"{rate / 1e9:.0f}",
            f"{ceiling / 1e9:.0f}: {rate / ceiling:.0%}", f"{peak:.2f}")

def separation(args):
    """Real-time factor and memory of a whole song."""
    name = args.model or "ResUNetDecouple+, random weights"
    heading(f"Separation: {name}, {args.song:g} s of noise",
            "", "wall s", "real-time factor", "GFLOP/s", "of a 3x3 convolution's", "peak GiB")
    for precision in PRECISIONS:
        row(*in_new_process(measure_separation, args, precision))

# ---- Training -----------------------------------------------------------------------------------

BASE = dict(bf16=False, tf32=False, channels_last=True, compile=False, real=False)

def training_rows(args, cuda):
    """{name: what differs}"""
    rows = {
        "float32, plain": {**BASE, "channels_last": False},
        "float32": BASE,
    }
    if cuda:
        rows["float32, TF32"] = {**BASE, "tf32": True}
    rows["bfloat16"] = {**BASE, "bf16": True}
    if cuda:
        rows["bfloat16, compiled"] = {**BASE, "bf16": True, "compile": True}
    rows["bfloat16, real batches"] = {**BASE, "bf16": True, "tf32": cuda, "real": True}
    return rows

def training_args(args):
    """train.py's arguments for the songs of --musdb and the flags of --train."""
    words = ["--musdb", args.musdb, "--device", args.device, "--workers", str(args.workers)]
    return train.parse(words + args.train.split())

def measure_training(args, name, what):
    """Train on one batch of noise, or on real ones, for args.seconds -> a row."""
    options = training_args(args)
    vars(options).update(bf16=what["bf16"], compile=what["compile"], lr=0.0, steps=1 << 40)
    if what["channels_last"]:
        mss.keep_memory()
    device = mss.pick_device(args.device)
    torch.backends.cudnn.allow_tf32 = what["tf32"]
    torch.backends.cudnn.benchmark = True

    config = train.config_of(options)
    layout = torch.channels_last if what["channels_last"] else torch.contiguous_format
    model = mss.MODELS[config.model](config).to(device, memory_format=layout).train()
    optimizer = train.optimizer_of(model, options)
    if what["real"]:
        segments, _ = train.open_data(options, config)
        batches = train.loader(segments, options, 0)
    else:
        batches = itertools.repeat(noise_batch(options, config, device))
    batches = train.Timed(batches)

    def step():
        train.train_step(network, optimizer, batches, options)

    # Before the network is compiled, which the counter can't see through; then a step that isn't
    # timed, for it may be compiled and tuned first.
    network = model
    flops = count_flops(step)
    network = train.network_of(model, options)
    step()

    dtype = PRECISIONS["bfloat16" if what["bf16"] else "float32"]
    before = convolution_rate(device, dtype)
    batches.seconds, steps, start = 0.0, 0, time.perf_counter()
    while time.perf_counter() < start + args.seconds or steps < 2:
        step()
        steps += 1
    seconds = time.perf_counter() - start
    ceiling = (before + convolution_rate(device, dtype)) / 2
    train.end_workers()

    rate = flops * steps / seconds
    hours = train.PACE["steps"] * train.PAPER["batch_size"] / options.batch_size
    hours *= seconds / steps / 3600
    wait = f"{batches.seconds / seconds:.1%}" if what["real"] else ""
    return (name, f"{steps / seconds:.3f}", f"{rate / 1e9:.0f}",
            f"{ceiling / 1e9:.0f}: {rate / ceiling:.0%}", wait,
            f"{mss.peak_memory(device):.2f}", f"{hours:,.0f} hours")

def noise_batch(options, config, device):
    """(mixture (B, C, L), targets (B, S, C, L)) of a step's part."""
    size = options.batch_size // options.accumulate
    length = round(options.segment * config.sample_rate)
    mixture = 0.1 * torch.randn(size, config.channels, length, device=device)
    targets = 0.1 * torch.randn(
        size, len(config.targets), config.channels, length, device=device)
    return mixture, targets

def training(args):
    """Steps per second and memory; the hours of the paper's steps and batches at that rate."""
    options = training_args(args)
    cuda = mss.pick_device(args.device).type == "cuda"
    heading(f"Training: {options.model}, width {options.width}, batch {options.batch_size} of "
            f"{options.segment:g} s, {options.workers} workers",
            "", "steps/s", "GFLOP/s", "of a 3x3 convolution's", "waiting for data", "peak GiB",
            "300,000 steps of 16, at this rate")
    for name, what in training_rows(args, cuda).items():
        row(*in_new_process(measure_training, args, name, what))

# ---- The loader ---------------------------------------------------------------------------------

def segments_per_second(examples, size, seconds):
    """How many come of an iterator of `size` segments at a time."""
    for _ in range(3):                                                # workers have started by then
        next(examples)
    count, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        next(examples)
        count += size
    return count / (time.perf_counter() - start)

def loader(args):
    """Training examples per second, without a network."""
    torch.set_num_threads(1)
    options = training_args(args)
    segments, _ = train.open_data(options, train.config_of(options))
    suffix = segments.tracks[0].files["vocals"].suffix
    heading(f"Segments of {options.segment:g} s per second, from {suffix}",
            "in this process", *(f"{n} workers" for n in (1, 2)))
    cells = [segments_per_second(map(segments.__getitem__, itertools.count()), 1, args.seconds / 4)]
    for workers in (1, 2):
        vars(options).update(workers=workers, batch_size=16, accumulate=1, steps=1 << 40)
        batches = train.loader(segments, options, 0)
        cells.append(segments_per_second(batches, 16, args.seconds / 4))
        train.end_workers()
    row(*(f"{cell:.0f}" for cell in cells))

# ---- Evaluation ---------------------------------------------------------------------------------

def measure_evaluation(system, length):
    """BSS Eval of four stereo sources -> (s, peak GiB)."""
    mss.keep_memory()
    rate = 44100
    s = np.random.default_rng(0).integers(-3000, 3000, (4, length * rate, 2)) / 32768
    y = s + 0.1 * s.sum(axis=0)
    if system == "museval":
        import museval
        seconds = seconds_of(lambda: museval.metrics.bss_eval(s, y, rate, rate))
    else:
        filters = "ISR" in system
        seconds = seconds_of(lambda: evaluate.bss_eval(s, y, rate, filters))
    return seconds, mss.peak_memory(torch.device("cpu"))

def evaluation(args):
    """BSS Eval, beside museval's where that is installed."""
    heading(f"BSS Eval: {args.song:g} s of four stereo sources", "", "s", "peak GiB")
    for system in ("museval", "here: SDR, ISR, SIR, SAR", "here: SDR alone"):
        try:
            seconds, peak = in_new_process(measure_evaluation, system, round(args.song))
            row(system, f"{seconds:.2f}", f"{peak:.2f}")
        except ImportError:
            row(system, "not installed", "")

# ---- Overlap ------------------------------------------------------------------------------------

OVERLAPS = (0.10, 0.31, 0.63, 0.95, 1.00, 1.27, 1.91)                 # s

def overlap(args):
    """Blocks of a song against the whole: of the minute, at most, with the loudest vocals."""
    device = mss.pick_device(args.device)
    model = mss.load_models([args.model or "bundled"], device)
    track = mss.musdb_tracks(args.musdb, "valid")[0]
    rate = track.sample_rate
    n = min(60 * rate, track.frames)
    if n < 1.25 * mss.SEGMENT:
        raise mss.UserError(f"{track.name}: at least 8 s expected, found {n / rate:.1f} s")
    start = evaluate.loudest(track.load("vocals"), n)
    mixture = track.load("mixture", start, n)
    whole = mss.separate_track(model, mixture, segment=n, overlap=0)

    heading(f"Overlap: {args.model or 'bundled'}, {n / rate:.0f} s of {track.name}",
            "shared by neighbours, s", "SNR against the whole, dB", "within 0.25 s of a join, dB",
            "more work")
    for seconds in OVERLAPS:
        samples = round(seconds * 100) * rate // 100
        blocks = mss.separate_track(model, mixture, overlap=samples)
        hop = mss.grid_hop(model.blocks[0], samples, model.stride, samples // 2)
        joins = torch.arange(hop + samples // 2, n, hop)
        near = (torch.arange(n)[:, None] - joins).abs().min(dim=1).values < rate // 4
        row(f"{seconds:.2f}", f"{mss.sdr(whole, blocks):.1f}",
            f"{mss.sdr(whole[..., near], blocks[..., near]):.1f}",
            f"{model.blocks[0] / hop - 1:.0%}")

# ---- Weights that have names --------------------------------------------------------------------

OPEN_UNMIX = dict(model="Open-Unmix", targets=mss.SOURCES, window=4096, hop=1024)
NAMED = {               # what they are made from; the values of weights don't matter here
    "paper": mss.Config(),
    "paper-fast": mss.Config("ResUNetDecouple+-subband", window=512, hop=110),
    "paper-small": mss.Config("MobileNet-subband", window=512, hop=110),
    "umxhq": mss.Config(width=512, **OPEN_UNMIX),
    "umxl": mss.Config(width=1024, **OPEN_UNMIX),
}

def measure_named(args, name):
    """Separate noise with a network of random weights -> (s, its row without the ratio)."""
    mss.keep_memory()
    device = mss.pick_device(args.device)
    config = NAMED[name]
    model = mss.MODELS[config.model](config).to(device, memory_format=torch.channels_last)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model = mss.fold_batch_norms(model.eval())
    noise = 0.1 * torch.randn(config.channels, round(args.song * config.sample_rate))
    mss.separate_track(model, noise[:, :mss.SEGMENT], bf16=args.bf16)  # the first one is slower
    seconds = seconds_of(lambda: mss.separate_track(model, noise, bf16=args.bf16))
    peak = mss.peak_memory(device)

    # Of a segment, without what overlaps.
    with torch.inference_mode():
        example = torch.randn(1, config.channels, mss.SEGMENT, device=device)
        macs = count_flops(lambda: model(example)) / 2
    per_second = macs * config.sample_rate / example.shape[-1]
    return seconds, (f"`{name}`", f"`{config.model}`", f"{parameters:,}", f"{per_second / 1e9:.2f}",
                     f"{seconds / args.song:.3f}", f"{peak:.2f}")

def named(args):
    """Speed and memory of the networks whose weights have names, and their times' ratio."""
    heading(f"Named weights: {args.song:g} s of noise, {'bfloat16' if args.bf16 else 'float32'}",
            "", "model", "parameters", "GMAC per s of sound", "real-time factor", "peak GiB",
            "time, the first one's being 1")
    first = None
    for name in NAMED:
        seconds, cells = in_new_process(measure_named, args, name)
        first = first or seconds
        row(*cells, f"{seconds / first:.3f}")

# ---- All rows of MODELS -------------------------------------------------------------------------

WIDTHS = {              # that give about a million parameters; others have the paper's
    "UNetPhase": 8, "UNet": 8, "UNetDecouple": 8, "UNetDecouple+": 8, "ResUNet": 4,
    "ResUNetDecouple": 4, "ResUNetDecouple+": 4, "Wave-U-Net": 16, "Wave-U-Net-12": 8,
    "DPRNN": 64, "PM-Unet": 4, "PM-Unet-conv": 4, "Open-Unmix": 64,
    "ResUNetDecouple+-subband": 4, "MobileNet-subband": 64}

def measure_model(args, name):
    """A row: size, work, speed of separation and of a training step of four seconds."""
    mss.keep_memory()
    words = ["--musdb", "-", "--model", name, "--width", str(WIDTHS.get(name, 32)), "--bf16",
             "--source", "vocals,accompaniment", "--batch-size", "4", "--segment", "1"]
    options = train.parse(words)
    config = train.config_of(options)
    model = mss.MODELS[name](config).to(memory_format=torch.channels_last)
    parameters = sum(parameter.numel() for parameter in model.parameters())

    still = mss.fold_batch_norms(copy.deepcopy(model).eval())
    song = 0.1 * torch.randn(2, 30 * 44100)
    with torch.inference_mode():
        flops = count_flops(lambda: still(song[None, :, :mss.SEGMENT]))
    per_second = flops / 2e9 * 44100 / mss.SEGMENT
    mss.separate_track(still, song[:, :mss.SEGMENT])
    factor = seconds_of(lambda: mss.separate_track(still, song)) / 30

    model.train()
    optimizer = train.optimizer_of(model, options)
    batches = itertools.repeat(noise_batch(options, config, "cpu"))
    steps = [seconds_of(lambda: train.train_step(model, optimizer, batches, options))
             for _ in range(6)]
    return (f"`{name}`", str(config.width), f"{parameters:,}", f"{per_second:.2f}",
            f"{factor:.3f}", f"{1000 * min(steps[1:]):.0f}")

def models(args):
    """All networks at about a million parameters, on the CPU."""
    heading("All rows of MODELS, 30 s in float32; a step of 4 x 1 s in bfloat16",
            "", "width", "parameters", "GMAC per s of sound", "real-time factor", "ms/step")
    for name in mss.MODELS:
        row(*in_new_process(measure_model, args, name))

# ---- The command --------------------------------------------------------------------------------

SECTIONS = {section.__name__: section for section in (
    separation, training, loader, evaluation, overlap, named, models)}

def main(argv=None):
    parser = mss.parser(__doc__)
    add = parser.add_argument
    add("sections", nargs="*", metavar="SECTION",
        help=f"some of {', '.join(SECTIONS)} (default: all)")
    add("-m", "--model", help="of separation (default: the paper's with random weights), overlap")
    add("--song", type=float, default=60.0, metavar="S", help="seconds of noise (%(default)s)")
    add("--seconds", type=float, default=20.0, metavar="S",
        help="time for each row of training, and four of the loader's (%(default)s)")
    add("--musdb", help="songs (default: built-in ones)")
    add("--train", default="", metavar="FLAGS",
        help="train.py's, as one word; default: --batch-size 1 on a CPU, the paper's on a GPU")
    add("--workers", type=int, default=1, help="processes that read songs (%(default)s)")
    args = parser.parse_args(argv)
    for name in args.sections:
        if name not in SECTIONS:
            parser.error(f"{name}: some of {', '.join(SECTIONS)} expected")
    device = mss.pick_device(args.device)
    if not args.train and device.type == "cpu":
        args.train = "--batch-size 1"

    mss.keep_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}", end="")
    print(f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "", flush=True)
    with contextlib.ExitStack() as stack:
        if not args.musdb:
            args.musdb = stack.enter_context(tempfile.TemporaryDirectory())
            train.synthetic_musdb(args.musdb)
        for name in args.sections or SECTIONS:
            SECTIONS[name](args)
    return 0

if __name__ == "__main__":
    mss.run(main)
