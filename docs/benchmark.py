"""Measure speed and memory of all that the project does, and print tables in markdown.

    python docs/benchmark.py                             # on a CPU: a quarter of an hour
    python docs/benchmark.py --musdb /data/musdb18hq     # on a GPU: five minutes, other tables
    python docs/benchmark.py separation -m paper         # 90 s of noise, in float32 and bfloat16
    python docs/benchmark.py training loader --musdb /data/musdb18hq

Machines are shared and differ: what is printed is best read as ratios within one run. For that
reason the convolution that the networks spend most of their time on is timed beside them.
"""
import concurrent.futures
import contextlib
import copy
import functools
import gc
import itertools
import math
import multiprocessing
import os
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.profiler
import torch.utils.benchmark
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import mss
import train

PRECISIONS = {"float32": torch.float32, "TF32": torch.float32, "bfloat16": torch.bfloat16}

# ---- Tools --------------------------------------------------------------------------------------

def in_new_process(function, *arguments):
    """function(*arguments) in a process of its own, so that its peak of memory is its own."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(function, *arguments).result()

def synchronise(device):
    """Wait until a GPU has done what it was told: it works while Python goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

def seconds_of(function, device=torch.device("cpu")):
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start

def heading(title, *columns):
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)

def row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)

def attempt(args, needed, measure, *arguments):
    """The cells that measure(args, ...) returns, or one that says why there are none.

    `needed`: about how many seconds it takes, which --limit has to leave.
    """
    if time.monotonic() + needed > args.end:
        return ("not measured: out of --limit",)
    try:
        return measure(args, *arguments)
    except Exception as error:                                        # such as a compiler's
        reason = f"{type(error).__name__}: {mss.one_line(error)}"
        return (f"failed: {reason.replace('|', '/')}",)
    finally:
        train.end_workers()

def use(precision, tuned=False):
    """Let a GPU compute as `precision` says, by the convolutions that are fastest if tuned."""
    tf32 = precision != "float32"                                     # train.py's, with --bf16, too
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = tuned

def fresh_memory(device):
    """Let the GPU's peak of memory be that of what follows."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

def memory(device):
    """The peak in GiB: of a GPU what tensors took, and what torch kept for them."""
    peak = f"{mss.peak_memory(device):.2f}"
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2 ** 30:.2f}, {peak}"
    return peak

# ---- What the machine can do --------------------------------------------------------------------

def median_seconds(statement, **variables):
    timer = torch.utils.benchmark.Timer(
        statement, globals=variables, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.2).median

@torch.inference_mode()
def convolution_rate(device, dtype):
    """The FLOP/s of a 3x3 convolution of 384 features, the ResUNet's widest: its ceiling here."""
    batch = 1 if device.type == "cpu" else 32
    convolution = nn.Conv2d(384, 384, 3, padding=1, bias=False)
    convolution = convolution.to(device, dtype, memory_format=torch.channels_last)
    x = torch.randn(batch, 384, 64, 64)
    x = x.to(device, dtype, memory_format=torch.channels_last)
    return 2 * 9 * 384 * x.numel() / median_seconds("convolution(x)", convolution=convolution, x=x)

def matmul_rate(device, dtype):
    """The FLOP/s of a product of square matrices."""
    n = 1024 if device.type == "cpu" else 8192
    x = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / median_seconds("x @ x", x=x)

def copy_rate(device, dtype):
    """Bytes per second, read and written, of a copy within the device's memory."""
    x = torch.zeros(1 << (24 if device.type == "cpu" else 28), device=device, dtype=dtype)
    return 2 * x.nbytes / median_seconds("y.copy_(x)", x=x, y=torch.empty_like(x))

@functools.cache
def rate_of(what, device, precision):
    """One of the above, measured once."""
    use(precision, tuned=True)
    return what(device, PRECISIONS[precision])

RATES = {               # function, unit
    "matrix product, TFLOP/s": (matmul_rate, 1e12),
    "3x3 convolution of 384 features, TFLOP/s": (convolution_rate, 1e12),
    "copy, GB/s": (copy_rate, 1e9),
}

def measure_rate(args, name, precision):
    what, unit = RATES[name]
    return (f"{rate_of(what, mss.pick_device(args.device), precision) / unit:.1f}",)

def rates(args):
    """What the shares of a GPU that are used refer to."""
    heading("Rates of the device", "", *PRECISIONS)
    for name in RATES:
        cells = [attempt(args, 5, measure_rate, name, precision) for precision in PRECISIONS]
        row(name, *sum(cells, ()))

# ---- FLOP ---------------------------------------------------------------------------------------

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

# ---- Networks -----------------------------------------------------------------------------------

OPEN_UNMIX = dict(model="Open-Unmix", targets=mss.SOURCES, window=4096, hop=1024)
NAMED = {               # what weights that have names are made from
    "paper": mss.Config(),
    "paper-fast": mss.Config("ResUNetDecouple+-subband", window=512, hop=110),
    "paper-small": mss.Config("MobileNet-subband", window=512, hop=110),
    "umxhq": mss.Config(width=512, **OPEN_UNMIX),
    "umxl": mss.Config(width=1024, **OPEN_UNMIX),
    "bundled": mss.Config("UNet-TDF-bands", hop=512),
}

def random_network(name, device):
    """A network of NAMED with random weights: their values don't matter here."""
    config = NAMED[name]
    with device:
        model = mss.MODELS[config.model](config)
    return model.to(device, memory_format=torch.channels_last).eval()

def network(name, device):
    """Of NAMED with random weights, or a checkpoint's, ready for inference."""
    if name in NAMED:
        return mss.fold_batch_norms(random_network(name, device))
    return mss.load_models([name], device)

# ---- Separation ---------------------------------------------------------------------------------

def measure_separation(args, precision):
    """Separate noise -> a row: the convolution is timed between the blocks."""
    mss.keep_memory()
    device = mss.pick_device(args.device)
    bf16 = precision == "bfloat16"
    model = network(args.model or "paper", device)
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
    for precision in ("float32", "bfloat16"):
        row(*in_new_process(measure_separation, args, precision))

# ---- Training -----------------------------------------------------------------------------------

BASE = dict(
    precision="float32", channels_last=True, compile=False, checkpoint_blocks=False, real=False)
BF16 = {**BASE, "precision": "bfloat16"}
TRAINING = {            # what differs; without --musdb real batches are of built-in songs
    "float32, plain": {**BASE, "channels_last": False},
    "float32": BASE,
    "bfloat16": BF16,
    "bfloat16, real batches": {**BF16, "real": True},
}

def training_args(args):
    """train.py's arguments for the songs of --musdb and the flags of --train."""
    words = ["--musdb", args.musdb, "--device", args.device, "--workers", str(args.workers)]
    return train.parse(words + args.train.split())

def noise_batch(size, options, config, device):
    """(mixture (B, C, L), targets (B, S, C, L)) of `size` examples."""
    length = round(options.segment * config.sample_rate)
    mixture = 0.1 * torch.randn(size, config.channels, length, device=device)
    targets = 0.1 * torch.randn(
        size, len(config.targets), config.channels, length, device=device)
    return mixture, targets

class TimedTraining:
    """Training, of which each step can be timed: on one batch of noise, or on real ones."""

    def __init__(self, args, what):
        self.options = options = training_args(args)
        vars(options).update(
            bf16=what["precision"] == "bfloat16", compile=what["compile"],
            checkpoint_blocks=what["checkpoint_blocks"], lr=0.0, steps=1 << 40)
        if what["channels_last"]:
            mss.keep_memory()
        self.device = device = mss.pick_device(args.device)
        fresh_memory(device)

        config = train.config_of(options)
        layout = torch.channels_last if what["channels_last"] else torch.contiguous_format
        model = mss.MODELS[config.model](config).to(device, memory_format=layout).train()
        self.optimizer = train.optimizer_of(model, options)
        size = options.batch_size // options.accumulate

        # Of one example, and before the network is compiled, which the counter can't see through.
        use(what["precision"])
        self.network = model
        self.batches = itertools.repeat(noise_batch(1, options, config, device))
        self.flops = size * count_flops(self.step)                    # of a step

        self.network = train.network_of(model, options)
        self.real = what["real"]
        if self.real:
            segments, _ = train.open_data(options, config)
            batches = train.remixed(train.loader(segments, options, 0), options, 0, device)
        else:
            batches = itertools.repeat(noise_batch(size, options, config, device))
        self.batches = train.Timed(batches)

        # On an H200 this row, tuned in float32, did not end within two minutes.
        use(what["precision"], tuned=what["precision"] != "float32" or device.type == "cpu")
        fresh_memory(device)

    def step(self):
        train.train_step(self.network, self.optimizer, self.batches, self.options)

    def time(self, at_least):
        """(s of a step, the share of it that is waiting for data)"""
        # The first ones may be compiled and tuned.
        for _ in range(2 if self.device.type == "cuda" else 1):
            one = seconds_of(self.step, self.device)

        # What workers have read ahead meanwhile would hide that they are too slow. Then all of them
        # begin a batch at once: until each has brought one, the wait is not what it will be.
        if self.real:
            for _ in range(2 * self.options.workers):
                next(self.batches)
            self.run(self.options.workers)

        count = max(2, math.ceil(at_least / one))
        self.batches.seconds = 0.0
        seconds = seconds_of(lambda: self.run(count), self.device)
        return seconds / count, self.batches.seconds / seconds

    def run(self, count):
        """Steps, of which a GPU has two at most ahead of it, as in train.train."""
        ends = []
        for i in range(count):
            self.step()
            if self.device.type == "cuda":
                ends.append(torch.cuda.Event())
                ends[i].record()
                ends[max(i - 1, 0)].synchronize()

def paper_hours(options, seconds):
    """The hours of the paper's steps and batches, a step of `options` taking so many seconds."""
    batches = train.PACE["steps"] * train.PAPER["batch_size"] / options.batch_size
    return f"{batches * seconds / 3600:,.0f} hours"

def measure_training(args, name, what):
    """Train for args.seconds -> a row."""
    steps = TimedTraining(args, what)
    dtype = PRECISIONS[what["precision"]]
    before = convolution_rate(steps.device, dtype)
    seconds, waiting = steps.time(args.seconds)
    ceiling = (before + convolution_rate(steps.device, dtype)) / 2
    train.end_workers()

    speed = steps.flops / seconds
    return (name, f"{1 / seconds:.3f}", f"{speed / 1e9:.0f}",
            f"{ceiling / 1e9:.0f}: {speed / ceiling:.0%}", f"{waiting:.1%}" if what["real"] else "",
            f"{mss.peak_memory(steps.device):.2f}", paper_hours(steps.options, seconds))

PAPERS_RUN = "300,000 steps of 16, at this rate"

def training_title(options):
    return (f"Training: {options.model}, width {options.width}, batch {options.batch_size} of "
            f"{options.segment:g} s, {options.workers} workers")

def training(args):
    """Steps per second and memory; the hours of the paper's steps and batches at that rate."""
    heading(training_title(training_args(args)), "", "steps/s", "GFLOP/s",
            "of a 3x3 convolution's", "waiting for data", "peak GiB", PAPERS_RUN)
    for name, what in TRAINING.items():
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

def measure_named(args, name):
    """Separate noise with a network of random weights -> (s, its row without the ratio)."""
    mss.keep_memory()
    device = mss.pick_device(args.device)
    config = NAMED[name]
    model = random_network(name, device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model = mss.fold_batch_norms(model)
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
    "ResUNetDecouple+-subband": 4, "MobileNet-subband": 64, "ResUNetDecouple+-bands": 4,
    "UNet-TDF-bands": 12}

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
    batches = itertools.repeat(noise_batch(4, options, config, "cpu"))
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

# ---- A GPU --------------------------------------------------------------------------------------
# All in one process, in which the peak of memory can be reset: starting CUDA takes seconds.

STEPS = {
    "bfloat16": BF16,
    "bfloat16, songs": {**BF16, "real": True},
    "bfloat16, --checkpoint-blocks": {**BF16, "checkpoint_blocks": True},
    "TF32": {**BASE, "precision": "TF32"},
    "float32": BASE,
}
COMPILED = {"bfloat16, --compile": {**BF16, "compile": True}}

def shares(speed, device, precision):
    """Cells: TFLOP/s, and their shares of what the device can do."""
    return (f"{speed / 1e12:.4g}",
            *(f"{speed / rate_of(what, device, precision):.0%}"
              for what in (convolution_rate, matmul_rate)))

SHARES = "TFLOP/s", "of a 3x3 convolution's", "of a matrix product's"

def measure_steps(args, what):
    """Train for args.seconds -> a row's cells."""
    steps = TimedTraining(args, what)
    seconds, waiting = steps.time(args.seconds)
    peak = memory(steps.device)
    return (f"{1 / seconds:.2f}", f"{steps.options.batch_size / seconds:.1f}",
            *shares(steps.flops / seconds, steps.device, what["precision"]),
            f"{waiting:.1%}" if what["real"] else "", peak, paper_hours(steps.options, seconds))

def steps(args, rows=STEPS, needed=30):
    """Training steps: speed, memory, and how much of the device they use."""
    heading(training_title(training_args(args)), "", "steps/s", "segments/s", *SHARES,
            "waiting for data", "peak GiB: tensors, kept", PAPERS_RUN)
    for name, what in rows.items():
        row(name, *attempt(args, needed, measure_steps, what))

SIZES = (1, 2, 4, 8, 16, 32)                                          # windows at once
USUAL = 4                                                             # the scripts' default
NETWORKS = ("paper", "paper-fast", "paper-small", "bundled")

def noise_for(model, windows):
    """(C, L) that becomes so many windows, and a last one, which always goes by itself."""
    segment, overlap = model.blocks
    hop = mss.grid_hop(segment, overlap, model.stride, overlap // 2)
    return 0.1 * torch.randn(model.config.channels, windows * hop + segment)

def measure_windows(args, name, precision, sizes, tuned=False, compiled=False):
    """Separate noise, so many windows at once -> a row's cells."""
    device = mss.pick_device(args.device)
    bf16 = precision == "bfloat16"
    fresh_memory(device)
    use(precision, tuned)
    model = network(name, device)

    noise = noise_for(model, max(SIZES))
    window = noise[None, :, :model.blocks[0]]                         # (1, C, n)
    with torch.inference_mode():
        flops = count_flops(lambda: model(window.to(device))) * (max(SIZES) + 1)
    if compiled:
        train.network_of(model, types.SimpleNamespace(compile=True, checkpoint_blocks=False))

    cells, fastest = [], math.inf
    for size in sizes:
        fresh_memory(device)
        mss.separate_windows(model, window.expand(size, -1, -1), bf16)
        with torch.compiler.set_stance("eager_on_recompile"):         # the last window's shape
            mss.separate_track(model, noise_for(model, size), batch_size=size, bf16=bf16)
            times = []
            while sum(times) < 0.5:
                times.append(seconds_of(
                    lambda: mss.separate_track(model, noise, batch_size=size, bf16=bf16), device))
        of_a_minute = 60 * model.config.sample_rate / noise.shape[1]
        cells.append(f"{1000 * min(times) * of_a_minute:.0f}; {memory(device)}")
        fastest = min(fastest, *times)
    factor = fastest * model.config.sample_rate / noise.shape[1]
    return (*cells, f"{factor:.5f}", *shares(flops / fastest, device, precision))

def windows_heading(title, sizes):
    heading(f"Separation{title}: ms for 60 s of noise; peak GiB: tensors, kept", "",
            *(f"{size} at once" for size in sizes), "best real-time factor", *SHARES)

def networks(args):
    return [args.model] if args.model else NETWORKS

def windows(args):
    """Separation by the number of windows at once."""
    windows_heading(", windows at once", SIZES)
    for name in networks(args):
        for precision in ("bfloat16", "TF32", "float32"):
            row(f"{name}, {precision}", *attempt(
                args, 15, measure_windows, name, precision, SIZES))

PARTS = {               # of the device's time: operators that stand within no other of these
    "convolutions": ("aten::convolution", "aten::convolution_backward"),
    "batch norms": ("aten::batch_norm", "aten::native_batch_norm_backward",
                    "aten::cudnn_batch_norm_backward"),
    "STFT and inverse": ("aten::stft", "aten::istft"),
}

def profiled(work, device):
    """Cells of a table of what a device does during work(), which has run before."""
    cuda = device.type == "cuda"
    seconds = seconds_of(work, device)                                # the profiler slows it down
    with torch.profiler.profile() as profiler:
        seconds_of(work, device)

    # On a GPU of its kernels and copies, which belong to operators; in microseconds.
    operators, busy, copies = {}, 0.0, 0.0
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CPU:
            took = event.device_time_total if cuda else event.cpu_time_total
            operators[event.name] = operators.get(event.name, 0.0) + took
            busy += 0 if cuda else event.self_cpu_time_total
        elif not event.is_user_annotation:
            busy += event.device_time_total
            if event.name.startswith(("Memcpy HtoD", "Memcpy DtoH")):
                copies += event.device_time_total
    if not busy:
        raise mss.UserError("the profiler saw nothing of the device")
    parts = [sum(operators.get(name, 0.0) for name in names) for names in PARTS.values()]
    return (f"{1000 * seconds:.0f}", f"{busy / 1000:.0f}",
            *(f"{part / busy:.1%}" for part in (*parts, copies)))

def profile_separation(args, name):
    device = mss.pick_device(args.device)
    fresh_memory(device)
    use("bfloat16")
    model = network(name, device)
    noise = 0.1 * torch.randn(model.config.channels, round(args.song * model.config.sample_rate))

    def work():
        mss.separate_track(model, noise, batch_size=USUAL, bf16=True)

    work()
    return profiled(work, device)

def profile_step(args):
    steps = TimedTraining(args, BF16)
    steps.time(0)
    return profiled(steps.step, steps.device)

def profiles(args):
    """What the device does meanwhile."""
    heading(f"Where the time goes: a training step, {args.song:g} s of noise; bfloat16",
            "", "wall ms", "device ms", *PARTS, "copies to and from the host")
    row("a step", *attempt(args, 20, profile_step))
    for name in networks(args):
        row(name, *attempt(args, 10, profile_separation, name))

def compiled(args):
    """What takes long: torch.compile; and, for separation, to try out convolutions."""
    steps(args, COMPILED, needed=100)
    name = networks(args)[0]
    windows_heading("", [USUAL])
    row(f"{name}, bfloat16, tuned", *attempt(
        args, 15, measure_windows, name, "bfloat16", [USUAL], True))
    row(f"{name}, bfloat16, compiled", *attempt(
        args, 50, measure_windows, name, "bfloat16", [USUAL], False, True))

# ---- The command --------------------------------------------------------------------------------

ON_CPU = (separation, training, loader, evaluation, overlap, named, models)
ON_CUDA = (rates, steps, windows, profiles, compiled)
SECTIONS = {section.__name__: section for section in (*ON_CPU, *ON_CUDA)}

def main(argv=None):
    parser = mss.parser(__doc__)
    add = parser.add_argument
    add("sections", nargs="*", metavar="SECTION",
        help=f"some of {', '.join(SECTIONS)} (default: on a GPU the last {len(ON_CUDA)}, else the "
             f"first {len(ON_CPU)})")
    add("-m", "--model", help="of separation (default: the paper's with random weights), overlap, "
        f"windows, profiles (default: {', '.join(NETWORKS)})")
    add("--song", type=float, default=90.0, metavar="S", help="seconds of noise (%(default)s)")
    add("--seconds", type=float, metavar="S", help="time for each row of training and steps, and "
        "four of the loader's (default: 20, on a GPU 3)")
    add("--musdb", help="songs (default: built-in ones)")
    add("--train", default="", metavar="FLAGS",
        help="train.py's, as one word; default: --batch-size 1 on a CPU, the paper's on a GPU")
    add("--workers", type=int,
        help="processes that read songs (default: 1, on a GPU one for each core, up to 14)")
    add("--limit", type=float, metavar="S", help="begin no row of "
        f"{', '.join(section.__name__ for section in ON_CUDA)} that may end later (default: none, "
        "on a GPU 270)")
    args = parser.parse_args(argv)
    for name in args.sections:
        if name not in SECTIONS:
            parser.error(f"{name}: some of {', '.join(SECTIONS)} expected")
    device = mss.pick_device(args.device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)                                 # of timers and events
    defaults = dict(
        train="" if cuda else "--batch-size 1", seconds=3.0 if cuda else 20.0,
        workers=min(14, os.cpu_count() or 1) if cuda else 1, limit=270.0 if cuda else math.inf)
    for name, value in defaults.items():
        if getattr(args, name) in (None, ""):
            setattr(args, name, value)
    start = time.monotonic()
    args.end = start + args.limit

    mss.keep_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}", end="")
    print(f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "", flush=True)
    with contextlib.ExitStack() as stack:
        if not args.musdb:
            args.musdb = stack.enter_context(tempfile.TemporaryDirectory())
            train.synthetic_musdb(args.musdb)
        for section in [SECTIONS[name] for name in args.sections] or (ON_CUDA if cuda else ON_CPU):
            section(args)
    print(f"\n{time.monotonic() - start:.0f} s in all")
    return 0

if __name__ == "__main__":
    mss.run(main)
