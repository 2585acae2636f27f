"""Train one model; the same command resumes an interrupted run.

    python train.py --out runs/demo                          # built-in synthetic songs: minutes on a CPU
    python train.py --source vocals --musdb /data/musdb18hq  # the paper's system: the defaults are its numbers
    torchrun --nproc-per-node 8 train.py --source vocals ... # the same on 8 GPUs: same examples, same gradients
    python train.py --benchmark --musdb ...                  # what the step and the loader can do here

OUT holds last.pt (to resume from), best.pt (highest validation SDR), log.csv and curve.png.
"""
import argparse
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import datetime
import functools
import itertools
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import mss
import separate

LEARNING_RATE = {"vocals": 1e-3, "accompaniment": 5e-4, "bass": 1e-4, "drums": 2e-4, "other": 5e-4}     # section 4.2
PAPER = dict(model="ResUNetDecouple+", steps=300_000, validate_every=10_000, save_every=[(5000, 600)], log_every=100)
FOUR, TWO = "vocals,bass,drums,other", "vocals,accompaniment"
RECIPE = ("loss", "optimizer", "schedule", "lr", "clip", "weight_decay", "batch_size", "segment", "warmup", "mix_audio",
          "source", "augment")
RECIPES = {     # lr None: LEARNING_RATE; clip 0: none. Ours, where the seeds don't say: the number of steps, DPRNN's
                # batch, segment and schedule, Wave-U-Net-12's segment, which had context around it. Sizes: mss.SIZES
    **dict.fromkeys(list(mss.MODELS)[:7],
                     ("l1", "amsgrad", "steps", None, 0.0, 0.0, 16, 3.0, 1000, 2, "vocals", [])),
    "Wave-U-Net":    ("mse", "adam", "constant", 1e-3, 0.0, 0.0, 32, 1.0, 1, 1, FOUR, []),
    "Wave-U-Net-12": ("mse", "adam", "constant", 1e-4, 0.0, 0.0, 16, 3.0, 1, 1, TWO, []),
    "DPRNN":         ("phase", "adam", "steps", 1e-3, 5.0, 1e-5, 16, 3.0, 1, 1, TWO, []),
    **dict.fromkeys(("PM-Unet", "PM-Unet-conv"),
                     ("l1+spec", "radam", "cosine", 1.5e-3, 0.5, 0.0, 6, 5.0, 1, 1, FOUR, list(mss.AUGMENTATIONS))),
}
DEMO = dict(model="UNetDecouple+", width=8, steps=250, batch_size=4, segment=1.0, lr=2e-3, warmup=25,
            validate_every=50, save_every=[(50, 600)], log_every=10)               # without --musdb
SHAPE = ("width", "window", "hop")
SETTINGS = ("model", *SHAPE, *RECIPE, "seed", "bf16", "ema")
LOG = ("step", "loss", "lr", "grad_norm", "ms_per_step", "data_wait", "skipped", "unreadable")
RANK = int(os.environ.get("RANK", 0))           # torchrun's: the number of this process, and how many there are
WORLD = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1       # some schedulers set it alone
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

# ---- The built-in data: songs made of arithmetic ---------------------------------------------------------------------

def synthetic_song(seed, seconds, rate=44100):
    """{stem: (2, L) float32} of a short song: a vibrato formant voice, bass, drums and chords, on a beat."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    beat = 60 / rng.uniform(90, 140)
    i, age = (t // beat).astype(int), t % beat                        # the beat of each sample, and the time since it
    each = functools.partial(rng.choice, size=i[-1] + 1)              # something random for each beat
    root = rng.uniform(45, 65) * 2 ** (each([0, 3, 5, 7, 10]) / 12)   # Hz
    vowels = np.array([(700, 1100, 2600), (300, 2200, 3000), (450, 800, 2500), (350, 650, 2600)])[each(4)]

    def tone(frequency, amplitude):                                   # amplitude(k, f): of the k-th harmonic, at f Hz
        phase = 2 * np.pi * np.cumsum(frequency) / rate
        return sum(amplitude(k, k * frequency) * np.sin(k * phase) for k in range(1, 24))

    def decay(age, seconds):
        return np.minimum(1, age / 0.01) * np.exp(-age / seconds) * np.minimum(1, (beat - age) / 0.02)

    def formants(k, f):
        return sum(1 / (1 + ((f - peak) / 120) ** 2) for peak in vowels[i].T) + 0.02
    f0 = 4 * root[i] * 2 ** (each([0, 3, 7, 12])[i] / 12 + 0.04 * np.sin(2 * np.pi * 5.5 * t))
    sung = each(10)[i] < 7
    chord = [tone(3.98 * root[i] * 2 ** (step / 12), lambda k, f: 1 / k) for step in (0, 3, 7)]
    noise = rng.standard_normal(len(t))
    kick = (i % 2 == 0) * np.sin(2 * np.pi * 50 * age + 12 * (1 - np.exp(-age * 30))) * decay(age, 0.12)
    snare, hat = (i % 2) * noise * decay(age, 0.08), np.diff(noise, append=0) * decay((age + beat / 2) % beat, 0.03)
    mono = {"vocals": 0.15 * sung * tone(f0, formants) * decay(age, 2.0), "drums": 0.5 * kick + 0.2 * snare,
            "bass": 0.2 * tone(root[i], lambda k, f: k ** -1.5) * decay(age, 0.5)}
    stems = {name: np.sqrt([[0.5], [0.5]]) * sound for name, sound in mono.items()}
    stems["drums"] = stems["drums"] + np.sqrt([[0.35], [0.65]]) * 0.1 * hat
    stems["other"] = sum(np.sqrt([[1 - pan], [pan]]) * 0.05 * note * decay(age, 0.8)      # spread over the stereo field
                         for pan, note in zip((0.2, 0.5, 0.8), chord))
    return {name: audio.astype("float32") for name, audio in stems.items()}

def synthetic_musdb(root, songs=(("train", 8), ("valid", 2), ("test", 2)), seconds=8, seed=0):
    """Write synthetic songs in MUSDB's layout, as FLAC, unless they are there -> root."""
    jobs = [subset for subset, count in songs for _ in range(count)]
    for i, subset in enumerate(jobs):
        folder = Path(root, subset, f"Synthetic - Song {i}")
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            stems = synthetic_song((seed, i), seconds)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as temporary:
                for name, audio in {**stems, "mixture": sum(stems.values())}.items():
                    mss.write_audio(Path(temporary, "song", f"{name}.flac"), torch.from_numpy(audio), 44100)
                Path(temporary, "song").rename(folder)
    return root

# ---- What a step learns from, and how --------------------------------------------------------------------------------

def batches(segments, args, first):
    """Yield (mixture, targets) of this process for each micro-batch after step `first`; a dead worker is replaced.

    The examples of a step follow from its number: neither a resumed run nor other numbers of processes change them.
    """
    size, k = args.batch_size // args.accumulate, first * args.accumulate         # of all processes; micro-batches
    failed = None
    while k < args.steps * args.accumulate:
        mine = (range(j * size + size * RANK // WORLD, j * size + size * (RANK + 1) // WORLD)
                for j in range(k, args.steps * args.accumulate))
        loader = iter(torch.utils.data.DataLoader(
            segments, batch_sampler=mine, num_workers=args.workers, worker_init_fn=prepare_worker,
            pin_memory=args.device != "cpu" and torch.cuda.is_available()))
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)             # torch's would raise anywhere in the loop
        try:
            for batch in loader:
                k += 1
                yield batch
        except (RuntimeError, OSError, EOFError) as error:            # OSError, EOFError: it died handing a batch over
            if type(error) is RuntimeError and not str(error).startswith(("DataLoader worker", "Pin memory thread")):
                raise
            if failed == k:
                raise mss.UserError(f"the loader's workers die: fewer --workers, more memory? {error}") from error
            failed = k
            print(f"notice: starting the loader anew: {mss.one_line(error)}", file=sys.stderr)
            end_workers()

def prepare_worker(worker):
    torch.set_num_threads(1)
    for number in SIGNALS:                                            # a terminal or scheduler signals workers too:
        signal.signal(number, signal.SIG_IGN)                         # the loop needs them until its step is done

def end_workers():
    for worker in multiprocessing.active_children():                  # which ignore the SIGTERM of their parent's end
        worker.kill()

class Mean(torch.autograd.Function):
    """The mean of a tensor over the processes; its gradient is the mean of theirs."""
    @staticmethod
    def forward(context, x):
        x = x.clone()
        dist.all_reduce(x)
        return x / WORLD

    backward = forward

class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """nn.SyncBatchNorm, which knows GPUs only, for CPUs: one batch norm over the batches of all processes."""
    def _check_input_dim(self, x):                                    # any number will do
        pass

    def forward(self, x):                                             # (B, D, T, F) or (B, D, L)
        if not self.training:
            return super().forward(x)
        y = x.to(torch.promote_types(x.dtype, torch.float32))         # bfloat16 is too coarse for statistics
        var, mean = torch.var_mean(y, (0, *range(2, x.dim())), keepdim=True, correction=0)
        centre = Mean.apply(mean)
        var = Mean.apply(var + (mean - centre) ** 2)
        n = x.numel() / x.shape[1] * WORLD
        self.running_mean.lerp_(centre.detach().flatten(), self.momentum)
        self.running_var.lerp_(var.detach().flatten() * n / (n - 1), self.momentum)
        self.num_batches_tracked += 1
        weight, bias = self.weight.view(mean.shape[1:]), self.bias.view(mean.shape[1:])
        return ((y - centre) * (weight * (var + self.eps).rsqrt()) + bias).to(x.dtype)

@contextlib.contextmanager
def without_statistics(block):
    """The batch norms' running statistics stay: they have counted the batch that is computed again."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)

BLOCKS = (mss.ConvBlock, mss.ResBlock, mss.baselines.WaveBlock, mss.baselines.RecurrentBlock, mss.baselines.Inception)

def network_of(model, args):
    """The model as the step calls it: on many processes, compiled, with activations computed again, as args say."""
    if WORLD > 1 and next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)                # replaces the norms inside
    for module in model.modules():
        if WORLD > 1 and type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm
        if args.checkpoint_blocks and isinstance(module, BLOCKS):
            module.forward = functools.partial(
                torch.utils.checkpoint.checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False,
                context_fn=lambda block=module: (contextlib.nullcontext(), without_statistics(block)))
    if args.compile:
        model.backbone.compile()
    if WORLD == 1:
        return model
    network = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    network.broadcast_buffers = False                                 # SyncBatchNorm has made them equal
    return network

def compressed(audio, window, hop):
    """(..., L) -> magnitudes to the power 0.3, so that quiet bins count too, and these with the phase as (..., 2)."""
    X = mss.stft(audio, window, hop) / math.sqrt(window)
    magnitude = mss.magnitude_of(X) ** 0.3
    return magnitude, torch.view_as_real(magnitude * mss.phase_of(X))

def spectral_loss(estimates, targets, window, hop):
    """The mean squared differences of what `compressed` gives, added up, as in PHASEN (Yin et al. 2020)."""
    pairs = zip(compressed(estimates, window, hop), compressed(targets, window, hop))
    return sum(F.mse_loss(ours, theirs) for ours, theirs in pairs)

def si_sdr(estimates, targets):
    """Scale-invariant SDR (Le Roux et al. 2019) in dB of each channel: (..., L) twice -> (...)."""
    epsilon = torch.finfo(torch.float32).eps                          # for silence
    scale = ((estimates * targets).sum(-1, True) + epsilon) / ((targets ** 2).sum(-1, True) + epsilon)
    part = scale * targets
    signal, error = (x.square().sum(-1) + epsilon for x in (part, part - estimates))
    return 10 * torch.log10(signal / error)

LOSSES = {              # estimates, targets (B, S, C, L) -> their mean loss
    "l1": F.l1_loss,                                                  # the paper's, section 4.2
    "mse": F.mse_loss,
    "phase": lambda y, s: spectral_loss(y, s, 2048, 441),
    "l1+spec": lambda y, s: (F.l1_loss(y, s) + spectral_loss(y, s, 4096, 1024) - si_sdr(y, s).mean()) / 3,
}

def gradient(network, data, args):
    """Sum the gradients of a step's micro-batches -> (loss, s waited for data); all processes end with their mean."""
    device, loss, waited = next(network.parameters()).device, 0.0, 0.0
    for i in range(args.accumulate):
        start = time.perf_counter()
        mixture, targets = (x.to(device, non_blocking=True) for x in next(data))      # (B, C, L), (B, S, C, L)
        waited += time.perf_counter() - start
        more = WORLD > 1 and i < args.accumulate - 1                  # the last one's backward adds up all processes'
        with network.no_sync() if more else contextlib.nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                estimates = network(mixture)                          # (B, S, C, L)
            part = LOSSES[args.loss](estimates, targets) / args.accumulate
            part.backward()
        loss = loss + part.detach()
    return loss, waited

SCHEDULES = {           # step -> factor
    "steps": lambda step: 0.9 ** (step // 15_000),                    # the paper's, section 4.2
    "cosine": lambda step: 0.5 + 0.5 * math.cos(math.pi * (step % 130_000) / 130_000),    # PM-Unet's: restarts after
    "constant": lambda step: 1.0,                                     # 40 epochs, about as many steps with 86 songs
}

def learning_rate(step, base, warmup, schedule="steps"):
    """Of step 1, 2, ...: linear warm-up, and one of SCHEDULES."""
    return base * min(step / max(warmup, 1), 1.0) * SCHEDULES[schedule](step)

OPTIMIZERS = {"amsgrad": functools.partial(torch.optim.Adam, amsgrad=True),       # the published code's
              "adam": torch.optim.Adam, "radam": torch.optim.RAdam}

def optimizer_of(model, args):
    fused = {} if args.optimizer == "radam" else {"fused": next(model.parameters()).is_cuda}
    return OPTIMIZERS[args.optimizer](model.parameters(), args.lr, weight_decay=args.weight_decay, **fused)

# ---- A run: what it keeps, logs and validates ------------------------------------------------------------------------

COLUMNS = {"valid_sdr": ("estimate", "SDR", np.median), "valid_mixture_sdr": ("mixture", "SDR", np.median),
           "valid_usdr": ("estimate", "uSDR", np.mean)}               # of each target: system, metric, over songs

def gather(thing):
    """A list of all processes' things."""
    everyone = [thing] * WORLD
    if WORLD > 1:
        dist.all_gather_object(everyone, thing)
    return everyone

def validate(model, tracks, bf16, caught):
    """Whole held-out songs through separate_track -> {COLUMN_TARGET: dB}; {} when interrupted.

    Processes share the songs out. One that can't be read or scored is named and left out.
    """
    rows = []
    model.eval()
    for track in tracks[RANK::WORLD]:
        try:
            with torch.backends.cudnn.flags(enabled=True), torch.compiler.set_stance("force_eager"):  # lengths differ
                scores, _, _ = evaluate.compare(track, *evaluate.separated(model, track, bf16))
            rows += evaluate.summary(track.name, scores)
        except (mss.UserError, OSError, RuntimeError) as error:
            print(f"notice: not validated: {track.name}: {mss.one_line(error)}", file=sys.stderr)
        if caught:
            break
    model.train()
    everyone = gather(None if caught else rows)
    if None in everyone:
        return {}
    rows = sum(everyone, [])
    return {f"{column}_{target}": evaluate.median(
        [row[metric] for row in rows if (row["system"], row["target"]) == (system, target)], how)
        for target in model.config.targets for column, (system, metric, how) in COLUMNS.items()}

def catch_signals():
    """Return a list that SIGNALS append themselves to; one more, 2 s later, ends the program at once."""
    caught = []

    def handler(number, frame):
        caught.append((number, time.monotonic()))
        if caught[-1][1] > caught[0][1] + 2:                          # torchrun passes a Ctrl-C on as another signal
            sys.exit(128 + number)
        if len(caught) == 1 and RANK == 0:
            os.write(2, b"\nstopping after this step or song; again: at once, without saving\n")
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:                # SIGHUP, under nohup
            signal.signal(number, handler)
    return caught

def resume(out, settings, model, average, optimizer):
    """Load OUT/last.pt, where there is one, into all three -> what a run counts: {"step", "best", ...}.

    Raises UserError, naming the flags, where the run in OUT was started with other settings.
    """
    path = Path(out, "last.pt")
    if not path.exists():
        if path.with_name("best.pt").exists():
            raise mss.UserError(f"{out} holds a best.pt, but no last.pt to resume from; choose another --out")
        return {"step": 0, "best": -math.inf, "validated": 0, "skipped": 0, "unreadable": 0, "settings": settings}
    _, saved, state = mss.load_checkpoint(path)
    theirs = {**vars(saved.config), **state.get("settings", {})}
    if not theirs.get("augment"):                                     # a run from before there were recipes
        theirs = {**dict(zip(RECIPE, RECIPES[saved.config.model])), **theirs}
    differ = [f"--{name.replace('_', '-')} {theirs.get(name)} (this command: {settings[name]})" if name != "songs"
              else f"{len(theirs.get(name, ()))} songs (here {len(settings[name])}, compared by name and length)"
              for name in settings if theirs.get(name) != settings[name]]
    if differ:
        raise mss.UserError(f"{out} holds a run of another configuration: {', '.join(differ)}; choose another --out")
    average.load_state_dict(saved.state_dict())
    model.load_state_dict(state.get("raw", saved.state_dict()))
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = optimizer.defaults.get("fused")              # the run may have been on another device
    optimizer.load_state_dict(state["optimizer"])
    print(f"resuming {path} at step {state['step']}")
    return {key: state[key] for key in ("step", "best", "validated", "skipped", "unreadable", "settings")}

def attempt(function, *args, must=False, **named):
    """Call a function that writes -> whether that went well: a full disk is told, but ends a run only at its end."""
    try:
        if not RANK:
            function(*args, **named)
    except (ValueError, OSError) as error:                            # UserError is a ValueError
        if must:
            raise
        print(f"notice: going on without: {mss.one_line(error)}", file=sys.stderr, flush=True)
        return False
    return True

def save_last(args, run, model, average, optimizer):
    raw = {} if average is model else {"raw": model.state_dict()}
    mss.save_checkpoint(args.out / "last.pt", model.config, average, optimizer=optimizer.state_dict(), **raw, **run)

class Log:
    """log.csv, curve.png, and the figures of the steps since the last row."""
    def __init__(self, args, run):
        self.args, self.path, self.rows = args, args.out / "log.csv", []
        self.shown = self.next = -math.inf                            # when; when log.csv may be written again
        self.clear()
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            self.rows = [row for row in csv.DictReader(lines)         # without those of steps to be done again
                         if int(row["step"]) <= run["step" if row["loss"] else "validated"]]
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            print(f"notice: {self.path}: begun anew, for it was damaged: {mss.one_line(error)}", file=sys.stderr)

    def clear(self):
        self.steps, self.waited, self.began = [], 0.0, time.perf_counter()

    def step(self, run, lr, loss, norm, waited):
        """Take a step's figures; from time to time print their means, and make them a row."""
        args, now = self.args, time.perf_counter()
        self.steps.append((loss, norm))
        self.waited += waited
        due = run["step"] % args.log_every == 0 or run["step"] == args.steps
        seconds = (now - self.began) / len(self.steps)
        wait = self.waited / (now - self.began)
        loss, norm = (evaluate.median(column, np.mean) for column in zip(*self.steps))        # of those that are finite
        if due or now - self.shown > 30:
            skipped = f", {run['skipped']} steps skipped" if run["skipped"] else ""
            print(f"step {run['step']}/{args.steps}, loss {loss:.5f}, {1000 * seconds:.0f} ms/step, "
                  f"data wait {wait:.0%}, {(args.steps - run['step']) * seconds / 60:.0f} min left{skipped}   ",
                  end="\r" if sys.stdout.isatty() else "\n", flush=True)
            self.shown = now
        if due:
            figures = (run["step"], f"{loss:.8g}", lr, f"{norm:.4g}", f"{1000 * seconds:.1f}", f"{wait:.4f}",
                       run["skipped"], run["unreadable"])
            self.rows.append(dict(zip(LOG, figures)))
            if now > self.next:                                       # a long log takes long: 2 % of the time at most
                attempt(self.write)
                self.next = now + 50 * (time.perf_counter() - now)
            self.clear()

    def write(self):
        """The whole file anew: a kill or a full disk never leaves half a row."""
        columns = [*LOG, *(f"{column}_{target}" for target in self.args.source for column in COLUMNS)]
        with mss.replacing(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)

    def draw(self):
        """curve.png: the loss, and below it the validation SDR of each target."""
        charts = {"loss": "loss"}, {f"{target} SDR": f"valid_sdr_{target}" for target in self.args.source}
        lines = [{name: [(int(row["step"]), float(row[column])) for row in self.rows if row.get(column)]
                  for name, column in chart.items()} for chart in charts]
        with mss.replacing(self.path.with_name("curve.png")) as temporary:
            temporary.write_bytes(evaluate.png(np.concatenate([panel(chart) for chart in lines])))

COLOURS = (40, 120, 220), (220, 90, 20), (20, 140, 70), (150, 60, 190), (110, 110, 110)

def panel(lines, width=640, height=200):
    """{name: [(step, value)]} -> (H, W, 3): a line for each, the last values above, the ranges of both axes below."""
    top = 20 * len(lines) + 15
    image = np.full((top + height + 40, width + 20, 3), 255, dtype="uint8")
    lines = {name: np.array(finite) for name, points in lines.items()
             if (finite := [point for point in points if math.isfinite(point[1])])}
    if lines:
        low, high = (how(np.concatenate(list(lines.values())), axis=0) for how in (np.min, np.max))   # (step, value)
        evaluate.write(image, 10, top + height + 10, "steps {:.0f} to {:.0f}   {:.3g} to {:.3g}".format(
            low[0], high[0], low[1], high[1]))
    for i, ((name, points), colour) in enumerate(zip(lines.items(), COLOURS)):
        evaluate.write(image, 10, 10 + 20 * i, f"{name} {points[-1, 1]:.3g}", colour)
        y = np.interp(np.linspace(low[0], high[0], width), *points.T, left=np.nan, right=np.nan)
        y = top + (height - 2) * (high[1] - y) / max(high[1] - low[1], 1e-9)
        for x in np.flatnonzero(np.isfinite(y[:-1] + y[1:])):
            above, below = sorted(y[x:x + 2].astype(int))
            image[above:below + 2, 10 + x] = colour
    return image

# ---- The loop --------------------------------------------------------------------------------------------------------

def learn(network, optimizer, data, args, flags=()):
    """One step -> (loss, gradient norm, s waited for data, sums of all processes' flags, whether it was finite).

    From a loss or a gradient that isn't finite nothing is learned, in no process.
    """
    statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]       # batch norm's
    before = statistics and torch._foreach_mul(statistics, 1.0)      # which takes no empty list
    optimizer.zero_grad()
    loss, waited = gradient(network, data, args)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()])
    numbers = torch.cat([torch.stack([loss, norm]) / WORLD, loss.new_tensor([float(flag) for flag in flags])])
    if WORLD > 1:
        dist.all_reduce(numbers)
    loss, norm, *flags = numbers.tolist()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        if args.clip:
            torch.nn.utils.clip_grads_with_norm_(network.parameters(), args.clip, torch.tensor(norm))
        optimizer.step()
    elif statistics:
        torch._foreach_copy_(statistics, before)
    return loss, norm, waited, flags, finite

def keep_best(args, run, model, scores, log, must):
    """Log and print a validation's scores; save the model if their mean over the targets is the highest so far."""
    log.rows.append({"step": run["step"], **scores})
    run["validated"] = run["step"]
    print(f"step {run['step']}: validation {evaluate.SDR}: " + ", ".join(
        "{} {:.2f} dB, mixture as estimate {:.2f} dB".format(
            target, scores[f"valid_sdr_{target}"], scores[f"valid_mixture_sdr_{target}"]) for target in args.source),
        flush=True)
    score = float(np.mean([scores[f"valid_sdr_{target}"] for target in args.source]))
    if score > run["best"] and attempt(mss.save_checkpoint, args.out / "best.pt", model.config, model, must=must,
                                       step=run["step"], **scores):
        run["best"] = score
    attempt(log.write)
    attempt(log.draw)

def train(args, run, model, average, optimizer, segments, held_out):
    """Train until args.steps, args.hours or a signal; `run`, which resume returned, moves on -> exit code."""
    caught, log, clock = catch_signals(), Log(args, run), time.perf_counter
    network, data = network_of(model, args), batches(segments, args, run["step"])
    floats = [[x for x in thing.state_dict().values() if x.is_floating_point()] for thing in (average, model)]
    unreadable, first, start, saved, failed, end = run["unreadable"], run["step"], clock(), clock(), 0, None
    while True:
        # save; validate, keep the best, and save that this is done
        paused = clock()
        end = "done" if run["step"] >= args.steps and end != "stopped" else end
        due = (end == "done" or not end and run["step"] % args.validate_every == 0) and run["validated"] < run["step"]
        if run["step"] > first and (end or due or run["step"] % args.save_every[0] == 0
                                    or clock() - saved > args.save_every[1]):
            attempt(save_last, args, run, model, average, optimizer, must=end or not (args.out / "last.pt").exists())
            saved = clock()
        if due:
            scores = validate(average, held_out, args.bf16, caught)
            if scores:
                keep_best(args, run, average, scores, log, must=end)
                attempt(save_last, args, run, model, average, optimizer, must=end)
            else:
                end = "stopped"
        log.began += clock() - paused
        if end:
            attempt(log.write)
            print(f"{end} at step {run['step']}; best validation SDR {run['best']:.2f} dB")
            return 128 + (caught or [(signal.SIGTERM,)])[0][0] if end == "stopped" else 0

        # step
        run["step"] += 1
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run["step"], args.lr, args.warmup, args.schedule)
        flags = bool(caught), clock() - start > 3600 * args.hours, segments.unreadable.sum()
        loss, norm, waited, (signals, late, unread), finite = learn(network, optimizer, data, args, flags)
        end = "stopped" if signals else "out of --hours" if late else None
        failed = 0 if finite else failed + 1
        run["skipped"] += not finite
        run["unreadable"] = unreadable + int(unread)
        if finite and args.ema:                                       # the first steps are soon forgotten
            torch._foreach_lerp_(*floats, 1 - min(args.ema, (1 + run["step"]) / (10 + run["step"])))
        if failed == 20:
            raise mss.UserError(f"20 steps in a row without a finite loss and gradient, to step {run['step']}: loss "
                                f"{loss:.3g}, gradient norm {norm:.3g}; last.pt is older; try a lower --lr elsewhere")
        log.step(run, group["lr"], loss, norm, waited)

# ---- What the machine can do -----------------------------------------------------------------------------------------

def measure(args, name, changes, real):
    """A row of the benchmark's table: steps with one batch of noise, or with real ones, in this new process."""
    args = argparse.Namespace(**{**vars(args), **changes, "lr": 0.0})
    if args.channels_last:
        mss.keep_memory()
    config, device = config_of(args), mss.pick_device(args.device)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = args.tf32, True
    layout, dtype = ((torch.contiguous_format, torch.channels_last)[args.channels_last],
                     (torch.float32, torch.bfloat16)[args.bf16])
    model = mss.MODELS[config.model](config).to(device, memory_format=layout).train()
    optimizer = optimizer_of(model, args)
    length, size = round(args.segment * config.sample_rate), args.batch_size // args.accumulate
    noise = 0.1 * torch.randn(2, size, len(args.source), config.channels, length, device=device)
    data = batches(open_data(args, config)[0], args, 0) if real else itertools.repeat((noise[0, :, 0], noise[1]))
    with FlopCounterMode(display=False, custom_mapping=mss.baselines.LSTM_FLOPS) as counter:    # forward and backward
        learn(model, optimizer, data, args)
    network = network_of(model, args)
    learn(network, optimizer, data, args)                             # not timed: it may be compiled and tuned first
    waited, steps, rate, start = 0.0, 0, mss.convolution_rate(device, dtype), time.perf_counter()
    while (seconds := time.perf_counter() - start) < args.benchmark or steps < 2:
        waited += learn(network, optimizer, data, args)[2]
        steps += 1
    flops, rate = counter.get_total_flops() * steps / seconds, (rate + mss.convolution_rate(device, dtype)) / 2
    end_workers()
    return (f"{name:24} {steps / seconds:8.3f} {steps * args.batch_size / seconds:10.2f} {flops / 1e9:10.0f} "
            f"{rate / 1e9:12.0f} {flops / rate:5.0%} {waited / seconds:10.1%} {mss.peak_memory(device):8.2f}")

def benchmark(args):
    """Print what the steps and the loader do; each row is measured for args.benchmark seconds by a new process."""
    cuda, args.steps, args.initial = mss.pick_device(args.device).type == "cuda", 1 << 40, None
    segments, _ = open_data(args, config_of(args))                    # the rows find them, too
    print(f"{args.model}, {args.width}/{args.window}/{args.hop}, batch {args.batch_size} of {args.segment:g} s, "
          f"{mss.pick_device(args.device)}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{args.workers} workers\n"
          f"{'':25} steps/s  samples/s    GFLOP/s  3x3 conv's share  data wait peak GiB", flush=True)
    plain = dict(bf16=False, tf32=False, channels_last=True, compile=False)
    rows = {"float32, plain": {**plain, "channels_last": False}, "float32": plain}
    if cuda:
        rows["float32, TF32"] = {**plain, "tf32": True}
    rows["bfloat16"] = {**plain, "bf16": True}
    if cuda or args.compile:
        rows["bfloat16, compiled"] = {**plain, "bf16": True, "compile": True}
    rows["as told, real batches"] = {**plain, "bf16": args.bf16, "compile": args.compile, "tf32": cuda}
    for name, changes in rows.items():
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            print(pool.submit(measure, args, name, changes, "real" in name).result(), flush=True)
    data = batches(segments, args, 0)
    next(data)                                                        # when the workers have started
    n, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < args.benchmark:
        n += len(next(data)[0])
    print(f"the loader alone: {n / seconds:.0f} segments/s, {n / seconds / max(args.workers, 1):.0f} per worker")
    return 0

# ---- The command -----------------------------------------------------------------------------------------------------

def interval(text):
    """"5000" -> (5000 steps, any s), "600s" -> (any steps, 600 s)"""
    return (math.inf, float(text[:-1])) if text.endswith("s") else (int(text), math.inf)

def flags():
    parser = mss.parser(__doc__)
    add = parser.add_argument
    add("--source", "--target", help="such as vocals, or vocals,bass,drums,other with one network; paper: vocals")
    add("--musdb", default=os.environ.get("MUSDB_PATH"), help="dataset (env MUSDB_PATH; default: synthetic songs)")
    add("--cache", help="where .stem.mp4 (default: ROOT-wav beside ROOT) and, if given, flac and ogg are decoded to")
    add("--out", help="folder of checkpoints and log (default: runs/SOURCE)")
    add("--init", metavar="FILE", help="fine-tune these weights: a checkpoint, default, paper or paper-accompaniment")
    add("--model", choices=tuple(mss.MODELS), help="row of the paper's Table 3, or a relative; where the help says "
        "'paper', a relative has its own default, see RECIPES; without --musdb sizes are small and --lr is 0.002")
    add("--width", type=int, default=0, help="features of the first encoder; paper: 32; 0: the model's own")
    add("--window", type=int, default=0, help="samples of the STFT's window; paper: 2048")
    add("--hop", type=int, default=0, help="samples between its frames; paper: 441")
    add("--steps", type=int, help="paper: 300,000")
    add("--hours", type=float, default=1e9, help="save and stop after that long")
    add("--batch-size", type=int, help="of a step, whatever the number of processes; paper: 16")
    add("--accumulate", type=int, default=1, metavar="N", help="compute a step's batch in N parts")
    add("--segment", type=float, help="seconds of a training example; paper: 3")
    add("--lr", type=float, help=f"learning rate; paper: {LEARNING_RATE}; here the mean over the sources")
    add("--warmup", type=int, help="steps of linear warm-up; published code: 1000")
    add("--ema", type=float, default=0.0, help="average the weights, such as with 0.999; validate and keep these")
    add("--loss", choices=tuple(LOSSES), help="paper: l1")
    add("--optimizer", choices=tuple(OPTIMIZERS), help="paper: Adam; published code: amsgrad")
    add("--schedule", choices=tuple(SCHEDULES), help="of the learning rate; paper: steps")
    add("--clip", type=float, help="limit of the gradient's norm; paper: 0, none")
    add("--weight-decay", type=float, help="paper: 0")
    add("--mix-audio", type=int, help="segments summed per source, bass excepted; paper: 2")
    add("--augment", nargs="*", choices=tuple(mss.AUGMENTATIONS), help="paper: none, as without a name")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that read songs, for each GPU")
    add("--validate-every", type=int, help="steps")
    add("--save-every", nargs="+", type=interval, metavar="N", help="steps, or seconds as 600s; or both: 5000 600s")
    add("--log-every", type=int, help="steps")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--compile", action="store_true", help="torch.compile the backbone")
    either("--checkpoint-blocks", action="store_true", help="less memory: compute activations again, going backward")
    add("--benchmark", type=float, nargs="?", const=20.0, metavar="S", help="measure for S seconds a row, and exit")
    return parser

def config_of(args):
    return mss.Config(args.model, args.source, width=args.width, window=args.window, hop=args.hop)

def parse(argv):
    parser = flags()
    args = parser.parse_args(argv)
    defaults = {"initial": None, **(PAPER if args.musdb else DEMO)}
    if args.init:
        config, defaults["initial"], _ = mss.load_checkpoint(separate.checkpoint_path(args.init))
        defaults.update({name: getattr(config, name) for name in ("model", *SHAPE)}, source=",".join(config.targets))
    parser.set_defaults(**{**dict(zip(RECIPE, RECIPES[args.model or defaults["model"]])), **defaults})
    args = parser.parse_args(argv)
    args.source = tuple(args.source.split(","))
    vars(args).update({name: vars(config_of(args))[name] for name in SHAPE})
    args.augment = [name for name in mss.AUGMENTATIONS if name in args.augment]
    if not set(args.source) <= set(LEARNING_RATE) or len(set(args.source)) < len(args.source):
        parser.error(f"--source {','.join(args.source)}: some of {','.join(LEARNING_RATE)} expected, each once")
    args.out = Path(args.out or f"runs/{'-'.join(args.source)}")
    args.lr = float(np.mean([LEARNING_RATE[name] for name in args.source])) if args.lr is None else args.lr
    args.save_every = tuple(map(min, zip(*args.save_every)))          # steps, seconds
    for name in (*SHAPE, "steps", "hours", "batch_size", "accumulate", "segment", "lr", "mix_audio", "validate_every",
                 "log_every"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: a positive number expected")
    if args.window % 512 or args.hop > args.window // 3:              # the pooled bins; what istft inverts to the end
        parser.error(f"--window {args.window}, --hop {args.hop}: a multiple of 512, at most a third of it expected")
    if not (0 <= args.seed < 2 ** 63 and 0.1 <= args.segment and 0 <= args.ema < 1 and all(
            0 <= x < math.inf for x in (args.workers, args.warmup, args.weight_decay, args.clip))):
        parser.error("--seed, --workers, --warmup, --weight-decay, --clip from 0, --segment from 0.1, --ema in [0, 1)")
    if args.benchmark is not None and (WORLD > 1 or not 0 < args.benchmark < math.inf):
        parser.error("--benchmark: a positive number of seconds and one process expected")
    if min(args.save_every) <= 0 or args.batch_size % (args.accumulate * WORLD):
        parser.error(f"--save-every above 0, --batch-size in multiples of {args.accumulate * WORLD} expected")
    return args

def open_data(args, config):
    """The examples to train on and the songs to validate with -> (Segments, list of Track)."""
    if not args.musdb:
        if (args.out / "last.pt").exists() and not (args.out / "songs").exists():
            raise mss.UserError(f"{args.out} holds a run on songs of your own: --musdb PATH expected")
        args.musdb = synthetic_musdb(args.out / "songs")
        print(f"no --musdb: a small network on built-in synthetic songs, written to {args.musdb}")
    root = mss.musdb_root(args.musdb)
    tracks, held_out = (mss.musdb_tracks(root, subset, args.cache) for subset in ("train", "valid"))
    for source in config.targets:                                     # now, not at the first validation
        if not any(track.load(source).any() for track in held_out):
            raise mss.UserError(f"{root}: a validation song with {source} expected, found silence in all of them")
    return mss.Segments(tracks, config, args.segment, args.mix_audio, args.augment, args.seed), held_out

def train_on(args):
    """Meet the other processes, open the data, begin or resume the run in OUT, and train -> exit code."""
    device = mss.pick_device(args.device)
    torch.backends.cudnn.benchmark = True                             # all batches are of one shape
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1:
        dist.init_process_group(timeout=datetime.timedelta(hours=2))  # others may validate long songs for long
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    config = config_of(args)
    if args.initial:
        config = dataclasses.replace(theirs := args.initial.config, targets=args.source)
        if len(theirs.targets) != len(args.source) or any(vars(theirs)[x] != vars(args)[x] for x in ("model", *SHAPE)):
            raise mss.UserError(f"--init {args.init}: same model, sizes and number of sources expected, found {theirs}")
    if RANK:                                                          # rank 0 writes and decodes, the others then find
        dist.barrier()
    segments, held_out = open_data(args, config)
    if WORLD > 1 and not RANK:
        dist.barrier()
    torch.manual_seed(args.seed)
    model = mss.MODELS[config.model](config)
    if args.initial:
        try:
            model.load_state_dict(args.initial.state_dict())
        except RuntimeError as error:                                 # Wave-U-Net for sources that leave another
            raise mss.UserError(f"--init {args.init}: not for --source {','.join(args.source)}: {error}") from error
    model = model.to(device, memory_format=torch.channels_last).train()
    average, optimizer = copy.deepcopy(model) if args.ema else model, optimizer_of(model, args)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["songs"] = [[track.name, track.frames] for track in segments.tracks + held_out]
    run = resume(args.out, settings, model, average, optimizer)
    if len(set(gather(run["step"]))) > 1:
        raise mss.UserError(f"--out {args.out}: not the same folder for all processes")
    for partial in args.out.glob(".partial-*") if not RANK else ():   # of a process that was killed
        partial.unlink()
    print(f"{config.model}, {sum(p.numel() for p in model.parameters()):,} parameters, for {', '.join(args.source)}, "
          f"on {WORLD} x {device}; {args.musdb}: {len(segments.tracks)} songs to train on, {len(held_out)} to validate"
          f"; {args.out}")
    code = train(args, run, model, average, optimizer, segments, held_out)
    if WORLD > 1:
        dist.destroy_process_group()                                  # not after an error: it would wait for the others
    return code

def main(argv=None):
    args = parse(argv)
    try:
        return train_on(args) if args.benchmark is None else benchmark(args)
    finally:
        end_workers()

if __name__ == "__main__":
    mss.run(main)
