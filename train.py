"""Train one model; the same command resumes an interrupted run.

    python train.py --out runs/demo                          # built-in songs: minutes on a CPU
    python train.py --source vocals --musdb /data/musdb18hq  # the paper's system: its numbers
    torchrun --nproc-per-node 8 train.py --source vocals ... # on 8 GPUs: the same gradients

OUT holds last.pt (to resume from), best.pt (highest validation SDR), log.csv and curve.svg.
"""
import collections
import contextlib
import copy
import csv
import dataclasses
import datetime
import functools
import io
import itertools
import math
import multiprocessing
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

import baselines
import evaluate
import mss

# Whether torchrun started this process, its number, and how many there are. Some schedulers set
# the latter without torchrun.
LAUNCHED = "RANK" in os.environ
RANK = mss.launcher_number("RANK", 0)
WORLD = mss.launcher_number("WORLD_SIZE", 1) if LAUNCHED else 1

# ---- Recipes: what is trained, with what --------------------------------------------------------

LEARNING_RATE = {                               # section 4.2
    "vocals": 1e-3, "accompaniment": 5e-4, "bass": 1e-4, "drums": 2e-4, "other": 5e-4}

PAPER = dict(                                   # section 4.2, and where it is silent the code
    model="ResUNetDecouple+", width=32, window=2048, hop=441, source="vocals",
    loss="l1", optimizer="amsgrad", lr=None, warmup=1000, schedule="steps", clip=0.0,
    weight_decay=0.0, batch_size=16, segment=3.0, mix_audio=2, augment=[])
PACE = dict(steps=300_000, validate_every=10_000, save_every=[(5000, 600)], log_every=100)

# Where other models differ. Ours, since their authors don't say: the number of steps; DPRNN's
# batch, segment and schedule; Wave-U-Net-12's segment, which had context around it.
STEMS = "vocals,bass,drums,other"
PAIR = "vocals,accompaniment"
PM_UNET = dict(
    width=28, window=4096, hop=1024, source=STEMS, loss="l1+spec", optimizer="radam", lr=1.5e-3,
    warmup=1, schedule="cosine", clip=0.5, batch_size=6, segment=5.0, mix_audio=1,
    augment="shift pitch speed swap flip gain mask mono reverse".split())
SUBBANDS = dict(window=512, hop=110)            # of a band; else as in the paper
RECIPES = {
    "Wave-U-Net": dict(
        width=64, source=STEMS, loss="mse", optimizer="adam", lr=1e-3, warmup=1,
        schedule="constant", batch_size=32, segment=1.0, mix_audio=1),
    "Wave-U-Net-12": dict(
        width=24, source=PAIR, loss="mse", optimizer="adam", lr=1e-4, warmup=1,
        schedule="constant", mix_audio=1),
    "DPRNN": dict(
        width=128, source=PAIR, loss="phase", optimizer="adam", lr=1e-3, warmup=1, clip=5.0,
        weight_decay=1e-5, mix_audio=1),
    "PM-Unet": PM_UNET,
    "PM-Unet-conv": PM_UNET,
    "Open-Unmix": dict(
        width=512, window=4096, hop=1024, source=STEMS, loss="magnitude", optimizer="adam",
        lr=1e-3, warmup=1, schedule="constant", weight_decay=1e-5, segment=6.0, mix_audio=1,
        augment=["swap", "gain"]),
    "ResUNetDecouple+-subband": SUBBANDS,
    "MobileNet-subband": SUBBANDS,
}

DEMO = dict(                                    # without --musdb: two minutes on two cores
    model="UNetDecouple+", width=8, window=1024, hop=341, steps=120, batch_size=3, segment=1.0,
    lr=5e-3, warmup=15, validate_every=30, save_every=[(30, 600)], log_every=10)

# ---- Losses: estimates, targets (B, S, C, L) -> a number ----------------------------------------

LOSSES = {              # those of the relatives, longer ones, are further down
    "l1": F.l1_loss,                                                  # the paper's, section 4.2
    "mse": F.mse_loss,
}

# ---- Learning rate and optimizer ----------------------------------------------------------------

def decay_steps(step):
    return 0.9 ** (step // 15_000)                                    # the paper's, section 4.2

def decay_cosine(step):
    """PM-Unet's, which restarts after 40 epochs: with 86 songs about as many steps as here."""
    return 0.5 + 0.5 * math.cos(math.pi * (step % 130_000) / 130_000)

def no_decay(step):
    return 1.0

# Functions of the step alone, so that a finished run can go on with more steps.
SCHEDULES = {"steps": decay_steps, "cosine": decay_cosine, "constant": no_decay}

def learning_rate(step, base, warmup, schedule="steps"):
    """Of step 1, 2, ...: linear warm-up, and one of SCHEDULES."""
    return base * min(step / max(warmup, 1), 1.0) * SCHEDULES[schedule](step)

OPTIMIZERS = {
    "amsgrad": functools.partial(torch.optim.Adam, amsgrad=True),     # the published code's
    "adam": torch.optim.Adam,
    "radam": torch.optim.RAdam,
}

def optimizer_of(model, args):
    options = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimizer != "radam":
        options["fused"] = next(model.parameters()).device.type in ("cpu", "cuda")
    return OPTIMIZERS[args.optimizer](model.parameters(), **options)

# ---- The loop -----------------------------------------------------------------------------------

MAX_FAILURES = 20       # steps in a row that aren't finite: the run ends

# A GPU works while Python goes on. So that it never waits, a step's loss is read when this many
# more steps have been begun; before saving and validating all are read. 0 on other devices.
AHEAD = {"cuda": 1}

@dataclasses.dataclass
class Run:
    """What a run counts; last.pt holds it."""
    settings: dict                              # of the command: a resumed run must have the same
    step: int = 0
    best: float = -math.inf                     # the highest validation SDR, dB
    validated: int = 0                          # the step of the last validation
    skipped: int = 0                            # steps whose loss or gradient wasn't finite
    unreadable: int = 0                         # draws of songs that can't be read
    rows: list = dataclasses.field(default_factory=list)              # of log.csv

def train_step(network, optimizer, batches, args, flags=()):
    """Learn from the next batch -> (loss, the gradient's norm before clipping, flags).

    They are tensors on the network's device: (), (), and one of all flags. The step doesn't wait
    until a GPU has computed them; whoever reads them does.

    Loss and norm are means over all processes, each flag is the sum of theirs. If loss or norm
    isn't finite no process learns: weights and batch norm's statistics stay.
    """
    device = next(network.parameters()).device
    statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    before = joined(statistics) if statistics else None

    optimizer.zero_grad()
    loss = 0.0
    for part in range(args.accumulate):
        mixture, targets = next(batches)                              # (B, C, L), (B, S, C, L)
        mixture = mixture.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        last = part == args.accumulate - 1                            # adds up all processes'
        with network.no_sync() if LAUNCHED and not last else contextlib.nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                estimates = network(mixture)                          # (B, S, C, L)
            part_loss = LOSSES[args.loss](estimates, targets) / args.accumulate
            part_loss.backward()
        loss = loss + part_loss.detach()
    norm = nn.utils.clip_grad_norm_(network.parameters(), args.clip or math.inf)

    loss, norm, flags = agree(loss, norm, flags)
    failed = ~are_finite(loss, norm)
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = failed.float()                          # 1: step changes nothing
        optimizer.step()
    elif not failed:                                                  # waits for the device
        optimizer.step()
    if statistics:
        split_into(statistics, torch.where(failed, before, joined(statistics)))
    return loss, norm, flags

def are_finite(loss, norm):
    return torch.isfinite(loss) & torch.isfinite(norm)

def joined(tensors):
    """All of them as one of one axis: many small ones cost more time than large ones."""
    return torch.cat([x.flatten() for x in tensors])

def split_into(tensors, values):
    """Copy back what `joined` gave."""
    parts = values.split([x.numel() for x in tensors])
    torch._foreach_copy_(tensors, [part.view_as(x) for part, x in zip(parts, tensors)])

def floats(model):
    """All tensors that a step changes: the weights, and batch norm's statistics."""
    return [x for x in model.state_dict().values() if x.is_floating_point()]

def update_average(average, tensors, step, decay, learned=1.0):
    """average <- decay * average + (1 - decay) * tensors, both as `floats` gives them.

    In the first steps the decay is lower, so that the initial weights are soon forgotten. The
    average stays where `learned` is 0, which may be a tensor.
    """
    decay = min(decay, (1 + step) / (10 + step))
    change = torch._foreach_sub(tensors, average)
    torch._foreach_mul_(change, (1 - decay) * learned)
    torch._foreach_add_(average, change)

def seed_of(args, step):
    """For what is random in the network: it follows from the step, too, but differs by process."""
    return int(np.random.default_rng((args.seed, step, RANK)).integers(2 ** 63))

def why_to_stop(run, args, signals, late):
    """None, or why the run ends now: "stopped", "done" or "out of --hours"."""
    if signals:
        return "stopped"
    if run.step >= args.steps:
        return "done"
    return "out of --hours" if late else None

def train(args, run, model, average, optimizer, segments, held_out):
    """Train until args.steps, args.hours or a signal -> exit code; `run` moves on.

    `average` is the model that is validated and kept: `model` itself without --ema.
    """
    network = network_of(model, args)
    device = next(model.parameters()).device
    batches = Timed(remixed(loader(segments, args, run.step), args, run.step, device))
    log = Log(args, run)
    caught = catch_signals()
    clock = time.perf_counter
    start = saved = clock()
    first_step = run.step
    steps = Steps(run, log, batches)
    averaged, current = floats(average), floats(model)
    while True:
        stop = why_to_stop(run, args, steps.signals, steps.late)

        # What is due: also a validation that was interrupted before the run was resumed.
        validation_due = stop == "done" or (not stop and run.step % args.validate_every == 0)
        validation_due = validation_due and run.validated < run.step
        save_due = run.step % args.save_every[0] == 0 or clock() - saved > args.save_every[1]

        # Save; validate, and save that this is done.
        if stop or validation_due or save_due:
            steps.read()
        paused = clock()
        if run.step > first_step and (stop or validation_due or save_due):
            save_last(args, run, model, average, optimizer, fatal=bool(stop))
            saved = clock()
        if validation_due:
            scores = validate(average, held_out, args.bf16, caught)
            if scores:
                record_scores(args, run, average, scores, log, fatal=bool(stop))
                save_last(args, run, model, average, optimizer, fatal=bool(stop))
            else:
                stop = "stopped"                                      # by a signal meanwhile
        log.pause(clock() - paused)
        if stop:
            return finish(args, run, log, stop, caught)

        # One step. All processes have to agree on the flags, which travel with the loss.
        run.step += 1
        rate = learning_rate(run.step, args.lr, args.warmup, args.schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(seed_of(args, run.step))
        flags = len(caught), clock() - start > 3600 * args.hours, segments.unreadable.sum()
        loss, norm, flags = train_step(network, optimizer, batches, args, flags)

        # Average the weights, count, log.
        if args.ema:
            update_average(averaged, current, run.step, args.ema, are_finite(loss, norm))
        steps.add(rate, loss, norm, flags)
        steps.read(AHEAD.get(loss.device.type, 0))

class Steps:
    """Those that were begun: counted and logged when they are read, which may be later."""

    def __init__(self, run, log, batches):
        self.run, self.log, self.batches = run, log, batches
        self.unread = collections.deque()
        self.first_unreadable = run.unreadable
        self.failures = 0                                             # in a row
        self.signals = self.late = 0                                  # what all agreed on last

    def add(self, rate, loss, norm, flags):
        figures = OnItsWay(torch.cat([torch.stack([loss, norm]), flags]))
        self.unread.append((self.run.step, rate, figures))

    def read(self, left=0):
        """Read all but the last few; UserError where too many weren't finite."""
        while len(self.unread) > left:
            step, rate, figures = self.unread.popleft()
            loss, norm, self.signals, self.late, unreadable = figures.numbers()

            failed = not (math.isfinite(loss) and math.isfinite(norm))
            self.run.skipped += failed
            self.failures = self.failures + 1 if failed else 0
            if self.failures == MAX_FAILURES:
                raise mss.UserError(
                    f"{MAX_FAILURES} steps in a row without a finite loss and gradient, to step "
                    f"{step}: loss {loss:.3g}, gradient norm {norm:.3g}; last.pt is older; try a "
                    "lower --lr elsewhere")
            self.run.unreadable = self.first_unreadable + int(unreadable)
            self.log.step(self.run, step, rate, loss, norm, self.batches.seconds)

class OnItsWay:
    """A tensor's numbers. A GPU goes on meanwhile; to ask for them at once would make it wait."""

    def __init__(self, tensor):
        self.copy = tensor.to("cpu", non_blocking=tensor.is_cuda)
        self.arrival = torch.cuda.Event() if tensor.is_cuda else None
        if self.arrival:
            self.arrival.record()

    def numbers(self):
        if self.arrival:
            self.arrival.synchronize()
        return self.copy.tolist()

def finish(args, run, log, stop, caught):
    """Write the log and say why the run ends -> exit code."""
    write_or_say(log.write)
    print(f"{stop} at step {run.step}; best validation SDR {run.best:.2f} dB")
    if stop == "done" and run.best == -math.inf:
        raise mss.UserError("no validation gave a score, so that there is no best.pt: are the "
                            "estimates silent?")
    if stop != "stopped":
        tell_what_is_next(args)
        return 0
    number = caught[0][0] if caught else signal.SIGTERM               # another process's
    return 128 + number

def tell_what_is_next(args):
    """After the demo: the commands that let one hear and see what was learned."""
    best = args.out / "best.pt"
    if not args.demo or not best.exists():
        return

    def word(path):
        """As it is typed here: relative if it lies in this folder, and quoted."""
        return shlex.quote(str(path).removeprefix(os.getcwd() + os.sep))

    scripts = Path(__file__).resolve().parent
    separating = f"{word(sys.executable)} {word(scripts / 'separate.py')}"
    evaluating = f"{word(sys.executable)} {word(scripts / 'evaluate.py')}"
    song = sorted(Path(args.musdb, "test").glob("*/mixture.flac"))[0]
    report = args.out / "report"
    print("Hear and see what it learned:\n"
          f"    {separating} {word(song)} -m {word(best)}\n"
          f"    {evaluating} -m {word(best)} --musdb {word(args.musdb)} --report {word(report)}")

# ---- Validation, checkpoints, log ---------------------------------------------------------------

SCORES = {              # columns of log.csv for each target: system, metric, over the songs
    "valid_sdr": ("estimate", "SDR", np.median),
    "valid_mixture_sdr": ("mixture", "SDR", np.median),
    "valid_usdr": ("estimate", "uSDR", np.mean),
}

@contextlib.contextmanager
def eagerly():
    """Without compiling or tuning: the last block of each song has another length."""
    cudnn = torch.backends.cudnn
    no_tuning = cudnn.flags(enabled=cudnn.enabled, benchmark=False, allow_tf32=cudnn.allow_tf32,
                            deterministic=cudnn.deterministic)
    with torch.compiler.set_stance("force_eager"), no_tuning:
        yield

def validate(model, tracks, bf16, caught):
    """Separate held-out songs, whole -> {SCORE_TARGET: dB}; {} when interrupted.

    Processes share the songs out. One that can't be read or scored is named and left out.
    """
    rows = []
    model.eval()

    for track in tracks[RANK::WORLD]:
        try:
            with eagerly():
                mixture, estimates = evaluate.separated(model, track, bf16)
            scores, _, _ = evaluate.compare(track, mixture, estimates)
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
    if not rows:
        raise mss.UserError("none of the validation songs could be separated and scored")
    return {f"{name}_{target}": evaluate.aggregate(rows, system, target, metric, how)
            for target in model.config.targets
            for name, (system, metric, how) in SCORES.items()}

def check_held_out(root, tracks, config):
    """Raise UserError unless validation will score each target: now, not after hours.

    One song that can be scored is enough: validation, too, leaves out those that can't be read.
    """
    missing = set(config.targets)
    reasons = []
    for track in tracks:
        try:
            mixture = mss.to_channels(track.load("mixture"), config.channels)
            estimates = dict.fromkeys(config.targets, mixture / 2)    # neither it nor its rest: 0
            scores, _, _ = evaluate.compare(track, mixture, estimates)
        except (mss.UserError, OSError, RuntimeError) as error:
            reasons.append(mss.one_line(error))
            continue

        missing = {target for target in missing
                   if np.isnan(scores["estimate"][target]["SDR"]).all()}
        if not missing:
            return
    reasons = "; ".join(reasons) or "silence in all of them"
    raise mss.UserError(f"{root}: a validation song with {', '.join(missing)} expected, found "
                        f"{reasons}")

def record_scores(args, run, average, scores, log, fatal):
    """Log, draw and print a validation's scores; keep the weights if their mean is the best yet."""
    run.validated = run.step
    told = ", ".join(f"{target} {scores[f'valid_sdr_{target}']:.2f} dB, mixture as estimate "
                     f"{scores[f'valid_mixture_sdr_{target}']:.2f} dB" for target in args.source)
    print(f"step {run.step}: validation {evaluate.SDR}: {told}", flush=True)

    score = float(np.mean([scores[f"valid_sdr_{target}"] for target in args.source]))
    if score > run.best:
        def save():
            path = args.out / "best.pt"
            mss.save_checkpoint(path, average.config, average, step=run.step, **scores)

        if write_or_say(save, fatal):
            run.best = score

    log.rows.append({"step": run.step, **scores})
    write_or_say(log.write)
    write_or_say(log.draw)

def save_last(args, run, model, average, optimizer, fatal):
    """Write OUT/last.pt; that this fails is fatal at the end of a run and at its first time."""
    path = args.out / "last.pt"
    state = {"optimizer": optimizer.state_dict(), **dataclasses.asdict(run)}
    if average is not model:
        state["raw"] = model.state_dict()
    write_or_say(lambda: mss.save_checkpoint(path, model.config, average, **state),
                 fatal or not path.exists())

def write_or_say(write, fatal=False):
    """Call a function that writes -> whether that went well: a full disk need not end a run."""
    try:
        if RANK == 0:
            write()
    except (ValueError, OSError) as error:                            # UserError is a ValueError
        if fatal:
            raise
        print(f"notice: going on without: {mss.one_line(error)}", file=sys.stderr, flush=True)
        return False
    return True

def resume(out, settings, model, average, optimizer):
    """Load OUT/last.pt, where there is one, into all three -> Run.

    Raises UserError, naming the flags, where the run in OUT was started with other settings.
    """
    path = Path(out, "last.pt")
    if not path.exists():
        if path.with_name("best.pt").exists():
            raise mss.UserError(f"{out} holds a best.pt, but no last.pt to resume from; choose "
                                "another --out")
        return Run(settings)

    _, saved, state = mss.load_checkpoint(path)
    check_settings(out, settings, state.get("settings", {}))
    try:
        average.load_state_dict(saved.state_dict())
        model.load_state_dict(state.get("raw", saved.state_dict()))
        for group in state["optimizer"]["param_groups"]:              # of another device, perhaps
            group["fused"] = optimizer.defaults.get("fused")
        optimizer.load_state_dict(state["optimizer"])
        names = [field.name for field in dataclasses.fields(Run)]
        run = Run(**{name: state[name] for name in names if name in state})
        for field in dataclasses.fields(Run):
            if not isinstance(getattr(run, field.name), field.type):
                raise TypeError(f"{field.name}: {field.type.__name__} expected")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise mss.UserError(f"{path}: a run of train.py expected, found another checkpoint: "
                            f"{mss.one_line(error)}") from error
    print(f"resuming {path} at step {run.step}")
    return run

def check_settings(out, ours, theirs):
    """Raise UserError where a run in `out` has other settings than the command."""
    differ = []
    theirs = {"echo": 1, **theirs}                                    # which older runs don't name
    for name, value in ours.items():
        if name != "songs" and theirs.get(name) != value:
            flag = name.replace("_", "-")
            differ.append(f"--{flag} {theirs.get(name)} (this command: {value})")
    if theirs.get("songs") != ours["songs"]:
        differ.append(f"{len(theirs.get('songs', ()))} songs (here {len(ours['songs'])}, compared "
                      "by name and length)")

    if differ:
        raise mss.UserError(f"{out} holds a run of another configuration: {', '.join(differ)}; "
                            "choose another --out")

class Log:
    """log.csv, curve.svg, and the figures of the steps since the last row."""
    STEP = ("step", "loss", "lr", "grad_norm", "ms_per_step", "data_wait", "skipped", "unreadable")

    def __init__(self, args, run):
        self.args = args
        self.path = args.out / "log.csv"
        self.columns = [*self.STEP]
        for target in args.source:
            self.columns += [f"{name}_{target}" for name in SCORES]
        self.rows = run.rows
        self.keep_foreign()
        self.shown = -math.inf                                        # when the last line was
        self.write_next = -math.inf                                   # when the file may be written
        self.waited = 0.0                                             # s for data, to the last row
        self.clear()

    def keep_foreign(self):
        """Rename a log.csv that isn't this run's, or that something else has changed since.

        last.pt holds the rows. The file holds them and perhaps more, of steps to be done again; or
        it is older, and ends before them.
        """
        if RANK > 0 or not self.path.exists():
            return
        ours, found = self.content(), self.path.read_bytes()
        if self.rows and (found.startswith(ours) or ours.startswith(found)):
            return

        names = (self.path.with_name(f"log-{i}.csv") for i in itertools.count(1))
        kept = next(path for path in names if not path.exists())
        self.path.rename(kept)
        print(f"notice: {self.path} is not as last.pt says: kept as {kept.name}; the new one "
              f"has the {len(self.rows)} rows that last.pt holds", file=sys.stderr)

    def content(self):
        """The bytes of log.csv."""
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(self.rows)
        return file.getvalue().encode()

    def clear(self):
        self.losses, self.norms = [], []
        self.began = time.perf_counter()

    def pause(self, seconds):
        self.began += seconds

    def step(self, run, step, rate, loss, norm, waited):
        """Take a step's figures; from time to time print their means, and make them a row."""
        self.losses.append(loss)
        self.norms.append(norm)
        now = time.perf_counter()
        due = step % self.args.log_every == 0 or step == self.args.steps
        if not due and now - self.shown <= 30:
            return

        # Means of those that are finite.
        loss = evaluate.finite(np.mean, self.losses)
        norm = evaluate.finite(np.mean, self.norms)
        seconds = (now - self.began) / len(self.losses)
        wait = (waited - self.waited) / (now - self.began)
        left = (self.args.steps - step) * seconds / 60
        skipped = f", {run.skipped} steps skipped" if run.skipped else ""
        print(f"step {step}/{self.args.steps}, loss {loss:.5f}, {1000 * seconds:.0f} ms/step, "
              f"data wait {wait:.0%}, {left:.0f} min left{skipped}   ",
              end="\r" if mss.on_terminal(sys.stdout) else "\n", flush=True)
        self.shown = now
        if not due:
            return

        self.rows.append({
            "step": step, "loss": f"{loss:.8g}", "lr": rate, "grad_norm": f"{norm:.4g}",
            "ms_per_step": f"{1000 * seconds:.1f}", "data_wait": f"{wait:.4f}",
            "skipped": run.skipped, "unreadable": run.unreadable})
        if now > self.write_next:                                     # 2 % of the time at most
            write_or_say(self.write)
            self.write_next = now + 50 * (time.perf_counter() - now)
        self.waited = waited
        self.clear()

    def write(self):
        """The whole file anew: a kill or a full disk never leaves half a row."""
        with mss.replacing(self.path) as temporary:
            temporary.write_bytes(self.content())

    def draw(self):
        """curve.svg: the loss, and below it the validation SDR of each target."""
        charts = [{"loss": self.points("loss")},
                  {f"{target} SDR, dB": self.points(f"valid_sdr_{target}")
                   for target in self.args.source}]
        with mss.replacing(self.path.with_name("curve.svg")) as temporary:
            temporary.write_text(svg(charts), encoding="utf-8")

    def points(self, column):
        """[(step, value)] of a column, where finite."""
        points = [(int(row["step"]), float(row[column])) for row in self.rows if row.get(column)]
        return [(step, value) for step, value in points if math.isfinite(value)]

COLOURS = ("#2878dc", "#dc5a14", "#148c46", "#963cbe", "#6e6e6e")

def svg(charts, width=640, height=200):
    """[{name: [(step, value)]}] -> an SVG, a chart below the other, a line for each name."""
    parts = []
    for k, lines in enumerate(charts):
        values = np.array([point for points in lines.values() for point in points] or [(0, 0)])
        (first, low), (last, high) = values.min(axis=0), values.max(axis=0)

        top = 30 + k * (height + 80)
        scale_x = width / max(last - first, 1)
        scale_y = height / max(high - low, 1e-9)
        label = f"steps {first:.0f} to {last:.0f}, {low:.3g} to {high:.3g}"
        parts.append(f'<text x="10" y="{top + height + 20}" fill="#666">{label}</text>')

        for i, (name, points) in enumerate(lines.items()):
            if not points:
                continue

            colour = COLOURS[i % len(COLOURS)]
            x = [10 + (step - first) * scale_x for step, _ in points]
            y = [top + (high - value) * scale_y for _, value in points]
            places = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
            parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}"/>')
            parts.append(f'<text x="{10 + 160 * i}" y="{top - 10}" fill="{colour}">{name} '
                         f'{points[-1][1]:.3g}</text>')

    total = len(charts) * (height + 80)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 20} {total}" '
            f'font-family="sans-serif" font-size="14"><rect width="100%" height="100%" '
            f'fill="white"/>{"".join(parts)}</svg>\n')

# ---- Losses of the relatives --------------------------------------------------------------------

def compressed(audio, window, hop):
    """(..., L) -> magnitudes to the power 0.3, so that quiet bins count, and these with phases."""
    X = mss.stft(audio, window, hop) / math.sqrt(window)
    magnitude = mss.magnitude_of(X) ** 0.3                            # (..., T, F)
    return magnitude, torch.view_as_real(magnitude * mss.phase_of(X))

def spectral_loss(estimates, targets, window, hop):
    """The mean squared differences of both that `compressed` gives: PHASEN (Yin et al. 2020)."""
    magnitude, spectrum = compressed(estimates, window, hop)
    target_magnitude, target_spectrum = compressed(targets, window, hop)
    return F.mse_loss(magnitude, target_magnitude) + F.mse_loss(spectrum, target_spectrum)

def si_sdr(estimates, targets):
    """Scale-invariant SDR (Le Roux et al. 2019) of each channel in dB: (..., L) twice -> (...)."""
    epsilon = torch.finfo(torch.float32).eps                          # for silence
    product = (estimates * targets).sum(-1, keepdim=True)
    energy = targets.square().sum(-1, keepdim=True)
    target_part = (product + epsilon) / (energy + epsilon) * targets
    signal = target_part.square().sum(-1) + epsilon
    error = (target_part - estimates).square().sum(-1) + epsilon
    return 10 * torch.log10(signal / error)

def phase_loss(estimates, targets):
    """DPRNN's: the spectrograms alone."""
    return spectral_loss(estimates, targets, 2048, 441)

def compound_loss(estimates, targets):
    """PM-Unet's: waveform, spectrogram and SDR in equal parts."""
    spectrum = spectral_loss(estimates, targets, 4096, 1024)
    return (F.l1_loss(estimates, targets) + spectrum - si_sdr(estimates, targets).mean()) / 3

def magnitude_loss(estimates, targets):
    """Open-Unmix's: mean squared differences of magnitudes, here of the waveforms' own."""
    X, Y = mss.stft(estimates, 4096, 1024), mss.stft(targets, 4096, 1024)
    return F.mse_loss(mss.magnitude_of(X), mss.magnitude_of(Y))

LOSSES |= {"phase": phase_loss, "l1+spec": compound_loss, "magnitude": magnitude_loss}

# ---- The built-in songs: made of arithmetic -----------------------------------------------------

VOWELS = ((700, 1100, 2600), (300, 2200, 3000), (450, 800, 2500), (350, 650, 2600))   # formants, Hz

class Beats:
    """The time of a song: the number of each sample's beat, and the seconds since it began."""

    def __init__(self, rng, seconds, rate):
        self.rng, self.rate = rng, rate
        self.t = np.arange(round(seconds * rate)) / rate
        self.beat = 60 / rng.uniform(90, 140)                         # s
        self.number = (self.t // self.beat).astype(int)
        self.age = self.t % self.beat

    def choose(self, choices):
        """A random choice for each beat."""
        return self.rng.choice(choices, size=self.number[-1] + 1)

    def decay(self, age, seconds):
        """What a struck sound does in a beat, without clicks at its ends."""
        fade_in = np.minimum(1, age / 0.01)
        fade_out = np.minimum(1, (self.beat - age) / 0.02)
        return fade_in * np.exp(-age / seconds) * fade_out

    def tone(self, frequency, amplitude):
        """23 harmonics, amplitude(k, f) of the k-th, at f Hz."""
        phase = 2 * np.pi * np.cumsum(frequency) / self.rate
        return sum(amplitude(k, k * frequency) * np.sin(k * phase) for k in range(1, 24))

def voice(beats, root):
    """Sung vowels with vibrato, silent in three beats of ten."""
    peaks = np.array(VOWELS)[beats.choose(4)][beats.number].T         # (3, L) Hz

    def formants(k, f):
        return sum(1 / (1 + ((f - peak) / 120) ** 2) for peak in peaks) + 0.02

    steps = beats.choose([0, 3, 7, 12])[beats.number] / 12
    vibrato = 0.04 * np.sin(2 * np.pi * 5.5 * beats.t)
    f0 = 4 * root * 2 ** (steps + vibrato)
    sung = beats.choose(10)[beats.number] < 7
    return 0.15 * sung * beats.tone(f0, formants) * beats.decay(beats.age, 2.0)

def bass(beats, root):
    return 0.2 * beats.tone(root, lambda k, f: k ** -1.5) * beats.decay(beats.age, 0.5)

def drums(beats):
    """(kick and snare, hi-hat)"""
    noise = beats.rng.standard_normal(len(beats.t))
    odd, age = beats.number % 2, beats.age
    glide = 12 * (1 - np.exp(-age * 30))
    kick = (odd == 0) * np.sin(2 * np.pi * 50 * age + glide) * beats.decay(age, 0.12)
    snare = odd * noise * beats.decay(age, 0.08)
    off_beat = (age + beats.beat / 2) % beats.beat
    hat = np.diff(noise, append=0) * beats.decay(off_beat, 0.03)
    return 0.5 * kick + 0.2 * snare, 0.1 * hat

def chords(beats, root):
    """Three notes, panned from left to right: (2, L)"""
    stereo = 0
    for pan, step in ((0.2, 0), (0.5, 3), (0.8, 7)):
        note = beats.tone(3.98 * root * 2 ** (step / 12), lambda k, f: 1 / k)
        stereo = stereo + panned(0.05 * note * beats.decay(beats.age, 0.8), pan)
    return stereo

def panned(mono, pan):
    """(L,) -> (2, L), left at 0, right at 1."""
    return np.sqrt([[1 - pan], [pan]]) * mono

def synthetic_song(seed, seconds, rate=44100):
    """{stem: (2, L) float32} of a short song: a vibrato formant voice, bass, drums and chords."""
    rng = np.random.default_rng(seed)
    beats = Beats(rng, seconds, rate)
    root = rng.uniform(45, 65) * 2 ** (beats.choose([0, 3, 5, 7, 10]) / 12)
    root = root[beats.number]                                         # (L,) Hz

    vocals = voice(beats, root)
    struck, hat = drums(beats)
    stems = {
        "vocals": panned(vocals, 0.5),
        "drums": panned(struck, 0.5) + panned(hat, 0.65),
        "bass": panned(bass(beats, root), 0.5),
        "other": chords(beats, root),
    }
    return {name: audio.astype("float32") for name, audio in stems.items()}

def synthetic_musdb(root, songs=(("train", 8), ("valid", 2), ("test", 2)), seconds=8, seed=0):
    """Write synthetic songs in MUSDB's layout, as FLAC, unless they are there -> root."""
    subsets = [subset for subset, count in songs for _ in range(count)]
    for i, subset in enumerate(subsets):
        folder = Path(root, subset, f"Synthetic - Song {i}")
        if folder.is_dir():
            continue

        stems = synthetic_song((seed, i), seconds)
        stems["mixture"] = sum(stems.values())
        with mss.new_folder(folder) as work:
            for name, audio in stems.items():
                mss.write_audio(work / f"{name}.flac", torch.from_numpy(audio), 44100)
    return root

# ---- The loader ---------------------------------------------------------------------------------

class Timed:
    """An iterator that counts the seconds spent waiting for its items."""

    def __init__(self, items):
        self.items = iter(items)
        self.seconds = 0.0

    def __next__(self):
        start = time.perf_counter()
        item = next(self.items)
        self.seconds += time.perf_counter() - start
        return item

def batches_to_read(args):
    """How many a run needs: one for each part of a step, or for several with --echo."""
    return math.ceil(args.steps * args.accumulate / args.echo)

def my_examples(args, first):
    """Yield the numbers of this process's examples in each batch to be read, from `first` on.

    They follow from the step's number alone: neither a resumed run nor, without --echo, other
    numbers of processes change what a step learns from.
    """
    size = args.batch_size // args.accumulate                         # of all processes
    for k in range(first, batches_to_read(args)):
        yield range(k * size + size * RANK // WORLD, k * size + size * (RANK + 1) // WORLD)

def loader(segments, args, first_step):
    """Yield (mixture, targets) for each part of each step after `first_step`; see remixed.

    A worker that dies is replaced, and the examples that it had are read again.
    """
    done = first_step * args.accumulate // args.echo
    failed = None
    while done < batches_to_read(args):
        batches = iter(torch.utils.data.DataLoader(
            segments, batch_sampler=my_examples(args, done), num_workers=args.workers,
            worker_init_fn=prepare_worker,
            generator=torch.Generator(),                              # not what the network draws
            pin_memory=args.device != "cpu" and torch.cuda.is_available()))

        if hasattr(signal, "SIGCHLD"):                                # torch's would raise anywhere
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

        try:
            for batch in batches:
                done += 1
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            # The latter two: it died while it handed a batch over.
            told = str(error).startswith(("DataLoader worker", "Pin memory thread"))
            if type(error) is RuntimeError and not told:
                raise

            if failed == done:
                raise mss.UserError("the loader's workers die: fewer --workers, more memory? "
                                    f"{error}") from error

            failed = done
            print(f"notice: starting the loader anew: {mss.one_line(error)}", file=sys.stderr)
            end_workers()

def remixed(batches, args, first_step, device="cpu"):
    """Let each batch serve args.echo parts of steps, the later ones with its sources mixed anew.

    Where reading takes longer than learning that is almost as good as new batches (Choi et al.
    2019, Faster neural network training with data echoing). Each process mixes its own examples.
    """
    part = first_step * args.accumulate
    for batch in batches:
        # Moved here already, so that mixing is the device's work.
        mixture, targets = (x.to(device, non_blocking=True) for x in batch)
        end = part - part % args.echo + args.echo
        for k in range(part, end):
            if k % args.echo:
                yield mixed_anew(mixture, targets, (args.seed, k, RANK))
            else:
                yield mixture, targets
        part = end

def mixed_anew(mixture, targets, seed):
    """(B, C, L), (B, S, C, L) -> the same of other mixtures: each source is in a random order."""
    rng = np.random.default_rng(seed)
    rest = mixture - targets.sum(1)                                   # what is no target
    mixed = []
    for source in (*targets.unbind(1), rest):                         # (B, C, L)
        order = torch.from_numpy(rng.permutation(len(source)))
        mixed.append(source[order.to(source.device, non_blocking=True)])
    return sum(mixed), torch.stack(mixed[:-1], dim=1)

def prepare_worker(worker):
    """A terminal or scheduler signals workers, too: the loop needs them until its step is done."""
    torch.set_num_threads(1)
    mss.make_streams_safe()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

def end_workers():
    for worker in multiprocessing.active_children():                  # they ignore SIGTERM
        worker.kill()

# ---- The network as the step calls it -----------------------------------------------------------

BLOCKS = (mss.ConvBlock, mss.ResBlock, *baselines.BLOCKS)             # of --checkpoint-blocks

def network_of(model, args):
    """The model, on many processes, compiled, with activations computed again, as args say."""
    if LAUNCHED:
        synchronise_batch_norms(model)

    if args.checkpoint_blocks:
        blocks = [module for module in model.modules() if isinstance(module, BLOCKS)]
        if not blocks:
            raise mss.UserError(f"--checkpoint-blocks: {args.model} has none of train.BLOCKS")
        for block in blocks:
            checkpoint_block(block)

    if args.compile:
        # Neither heads nor STFTs. A model on bands has another one inside.
        for child in (model.separator if isinstance(model, mss.Subbands) else model).children():
            child.compile()

    if not LAUNCHED:
        return model
    network = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    network.broadcast_buffers = False                                 # they are equal already
    return network

def checkpoint_block(block):
    """Compute the block's activations again in the backward pass: less memory, the same bits."""
    def contexts():
        return contextlib.nullcontext(), without_statistics(block)

    block.forward = functools.partial(
        torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False,
        preserve_rng_state=False, context_fn=contexts)

@contextlib.contextmanager
def without_statistics(block):
    """The batch norms' running statistics stay: they have counted what is computed again."""
    norms = [module for module in block.modules()
             if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0

    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)

def standardise(model, segments, count=100):
    """Let Open-Unmix's networks begin with inputs of mean 0 and deviation 1 in each bin.

    Over the mixtures of the first examples, as far as they are read; other models have no such
    parameters.
    """
    networks = [module for module in model.modules()
                if isinstance(module, baselines.OpenUnmixTarget)]
    if not networks:
        return

    frames, total, squares = 0, 0, 0
    for i in range(count):
        mixture, _ = segments[i]
        X = mss.stft(mixture, model.config.window, model.config.hop)  # (C, T, F)
        magnitude = X.abs().double().flatten(0, 1)                    # (C T, F)
        frames += len(magnitude)
        total += magnitude.sum(0)
        squares += magnitude.square().sum(0)
    mean = total / frames
    deviation = (squares / frames - mean ** 2).clamp(min=0).sqrt()
    deviation = deviation.clamp(min=1e-4 * deviation.max().item())    # of bins that are silent

    for network in networks:
        network.input_mean.data = -mean[:network.bins_read].float()
        network.input_scale.data = 1 / deviation[:network.bins_read].float()

# ---- Several processes --------------------------------------------------------------------------

def start_processes(args):
    """Meet the other processes, if torchrun started some -> the torch device of this one."""
    device = mss.pick_device(args.device)
    torch.backends.cudnn.benchmark = True                             # all batches are of one shape
    torch.backends.cudnn.allow_tf32 = True                            # nor need steps be exact
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if LAUNCHED:
        # Two hours, for others may validate long songs for long.
        with mss.meeting():
            dist.init_process_group(timeout=datetime.timedelta(hours=2))
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
    return device

def lock(file):
    """Lock an open file until this process ends, however that happens, or closes it.

    OSError where another process has locked it. The loader's workers don't inherit the lock.
    """
    with contextlib.suppress(ImportError):
        import fcntl
        return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with contextlib.suppress(ImportError):                            # on Windows
        import msvcrt
        return msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

@contextlib.contextmanager
def alone_in(out):
    """Keep other runs out of OUT meanwhile; a new folder goes where nothing was written to it.

    UserError where another run is there, or where nothing can be written: before the first step.
    """
    if RANK > 0:
        yield
        return

    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "a")
    except OSError as error:
        raise mss.UserError(f"--out {out}: a folder to write to expected: {mss.one_line(error)}"
                            ) from error
    try:
        with file:
            try:
                lock(file)
            except (BlockingIOError, PermissionError):
                raise mss.UserError(f"--out {out}: another run is at work there") from None
            except OSError as error:
                print(f"notice: {out}: a second run there would not be noticed, for this disk has "
                      f"no locks: {mss.one_line(error)}", file=sys.stderr)
            yield
    finally:
        with contextlib.suppress(OSError):
            if new and os.listdir(out) == [".lock"]:
                os.remove(out / ".lock")
                out.rmdir()

@contextlib.contextmanager
def first_process_first():
    """Process 0 writes and decodes; the others then find what it made."""
    if RANK > 0:
        dist.barrier()
    yield
    if LAUNCHED and RANK == 0:
        dist.barrier()

def gather(thing):
    """The list of all processes' things."""
    everyone = [thing] * WORLD
    if LAUNCHED:
        dist.all_gather_object(everyone, thing)
    return everyone

def agree(loss, norm, flags):
    """(loss, norm, flags) as tensors: means, and sums of the flags, over all processes."""
    means = torch.stack([loss, norm]) / WORLD
    sums = torch.tensor([float(flag) for flag in flags]).to(loss.device, non_blocking=True)
    numbers = torch.cat([means, sums])
    if LAUNCHED:
        dist.all_reduce(numbers)
    return numbers[0], numbers[1], numbers[2:]

def synchronise_batch_norms(model):
    """Let each batch norm see the batches of all processes."""
    if next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)                # replaces the norms inside
        return
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm

class Mean(torch.autograd.Function):
    """The mean of a tensor over the processes; its gradient is the mean of theirs."""

    @staticmethod
    def forward(context, x):
        x = x.clone()
        dist.all_reduce(x)
        return x / WORLD

    backward = forward

class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """For CPUs; torch's knows GPUs only. One batch norm over the batches of all processes."""

    def _check_input_dim(self, x):                                    # any number will do
        pass

    def forward(self, x):                                             # (B, D, T, F) or (B, D, L)
        if not self.training:
            return super().forward(x)

        # bfloat16 is too coarse for statistics.
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        axes = (0, *range(2, x.dim()))
        var, mean = torch.var_mean(y, axes, keepdim=True, correction=0)
        centre = Mean.apply(mean)
        var = Mean.apply(var + (mean - centre) ** 2)

        n = x.numel() / x.shape[1] * WORLD
        self.running_mean.lerp_(centre.detach().flatten(), self.momentum)
        self.running_var.lerp_(var.detach().flatten() * n / (n - 1), self.momentum)
        self.num_batches_tracked += 1

        weight = self.weight.view(mean.shape[1:])
        bias = self.bias.view(mean.shape[1:])
        return ((y - centre) * (weight * (var + self.eps).rsqrt()) + bias).to(x.dtype)

# ---- Signals ------------------------------------------------------------------------------------

# Ctrl-C; the end of a terminal; what schedulers send before a job's time is over.
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]  # Windows: two

def catch_signals():
    """Return a list to which SIGNALS append (number, time); one 2 s later ends the program.

    Later, because torchrun passes a Ctrl-C on as another signal.
    """
    caught = []

    def handler(number, frame):
        caught.append((number, time.monotonic()))

        if caught[-1][1] > caught[0][1] + 2:
            sys.exit(128 + number)
        if len(caught) == 1 and RANK == 0:
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step or song; again: at once, "
                         b"without saving\n")

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:                # SIGHUP, under nohup
            signal.signal(number, handler)
    return caught

# ---- The command --------------------------------------------------------------------------------

SETTINGS = (*PAPER, "seed", "bf16", "ema", "echo")      # what a resumed run must have as it was
SIZES = ("model", "width", "window", "hop")     # what --init decides on

def interval(text):
    """"5000" -> (5000 steps, any s), "600s" -> (any steps, 600 s)"""
    if text.endswith("s"):
        return math.inf, float(text[:-1])
    return int(text), math.inf

def build_parser():
    parser = mss.parser(__doc__)
    add = parser.add_argument
    add("--source", "--target",
        help="such as vocals, or vocals,bass,drums,other with one network; paper: vocals")
    add("--musdb", default=os.environ.get("MUSDB_PATH"),
        help="dataset (env MUSDB_PATH; default: built-in songs, and a small network)")
    add("--cache", help="where .stem.mp4 (default: ROOT-wav beside ROOT) and, if given, flac and "
        "ogg are decoded to")
    add("--out", help="folder of checkpoints and log (default: runs/SOURCE)")
    add("--init", metavar="FILE",
        help="fine-tune these weights: a checkpoint, or a name of separate.py --list-models")

    add("--model", choices=tuple(mss.MODELS), help="row of the paper's Table 3, or a relative; "
        "where the help says 'paper', a relative has its own default, see RECIPES")
    add("--width", type=int, help="features of the first encoder; paper: 32")
    add("--window", type=int, help="samples of the STFT's window; paper: 2048")
    add("--hop", type=int, help="samples between its frames; paper: 441")

    add("--steps", type=int, help="paper: 300,000")
    add("--hours", type=float, default=1e9, help="save and stop after that long")
    add("--batch-size", type=int, help="of a step, whatever the number of processes; paper: 16")
    add("--accumulate", type=int, default=1, metavar="N", help="compute a step's batch in N parts")
    add("--echo", type=int, default=1, metavar="N",
        help="read a batch for N batches, in which its sources are mixed anew: where reading takes "
        "longer than learning")
    add("--segment", type=float, help="seconds of a training example; paper: 3")
    add("--lr", type=float,
        help=f"learning rate; paper: {LEARNING_RATE}; here the mean over the sources")
    add("--warmup", type=int, help="steps of linear warm-up; published code: 1000")
    add("--ema", type=float, default=0.0,
        help="average the weights, such as with 0.999; validate and keep these")
    add("--loss", choices=tuple(LOSSES), help="paper: l1")
    add("--optimizer", choices=tuple(OPTIMIZERS), help="paper: Adam; published code: amsgrad")
    add("--schedule", choices=tuple(SCHEDULES), help="of the learning rate; paper: steps")
    add("--clip", type=float, help="limit of the gradient's norm; paper: 0, none")
    add("--weight-decay", type=float, help="paper: 0")
    add("--mix-audio", type=int, help="segments summed per source, bass excepted; paper: 2")
    add("--augment", nargs="*", choices=tuple(mss.AUGMENTATIONS),
        help="paper: none, as without a name")
    add("--seed", type=int, default=0)

    add("--workers", type=int, default=min(8, os.cpu_count() or 1),
        help="processes that read songs, for each GPU")
    add("--validate-every", type=int, help="steps")
    add("--save-every", nargs="+", type=interval, metavar="N",
        help="steps, or seconds as 600s; or both: 5000 600s")
    add("--log-every", type=int, help="steps")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--compile", action="store_true", help="torch.compile the network")
    either("--checkpoint-blocks", action="store_true",
           help="less memory: compute activations again, going backward")
    return parser

def apply_recipe(args):
    """Fill in what no flag says: from --init, the demo, the model's recipe, the paper's."""
    initial = {}
    if args.init == "default":
        raise mss.UserError("--init: a file, or a name such as bundled or paper-small expected; "
                            "default is now this, now that")
    if args.init:
        args.init_model = mss.load_model(args.init)
        args.init_config = args.init_model.config
        initial = {name: getattr(args.init_config, name) for name in SIZES}
        initial["source"] = ",".join(args.init_config.targets)

    args.demo = not args.musdb
    demo = DEMO if args.demo else {}
    model = args.model or {**PAPER, **demo, **initial}["model"]
    for recipe in (initial, demo, RECIPES.get(model, {}), PAPER, PACE):
        for name, value in recipe.items():
            if getattr(args, name) is None:
                setattr(args, name, value)

    args.source = tuple(args.source.split(","))
    args.out = Path(args.out or f"runs/{'-'.join(args.source)}")
    args.augment = [name for name in mss.AUGMENTATIONS if name in args.augment]
    args.save_every = tuple(map(min, zip(*args.save_every)))          # steps, seconds
    if args.lr is None:
        args.lr = float(np.mean([LEARNING_RATE.get(name, math.nan) for name in args.source]))

def check(parser, args):
    """End with a line that says what is wrong about the flags, if something is."""
    known = ",".join(LEARNING_RATE)
    if not set(args.source) <= set(LEARNING_RATE) or len(set(args.source)) < len(args.source):
        parser.error(f"--source {','.join(args.source)}: some of {known} expected, each once")
    for name in ("width", "window", "hop", "steps", "hours", "batch_size", "accumulate", "echo",
                 "segment", "lr", "mix_audio", "validate_every", "log_every"):
        value = getattr(args, name)
        if not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: a positive number expected")
    for name in ("workers", "warmup", "weight_decay", "clip", "seed"):
        value = getattr(args, name)
        if not 0 <= value < 2 ** 63:
            parser.error(f"--{name.replace('_', '-')} {value}: a number from 0 on expected")

    # What the pooling divides; what istft inverts to the end.
    if args.window % 512 or args.hop > args.window // 3:
        parser.error(f"--window {args.window}, --hop {args.hop}: a multiple of 512, at most a "
                     "third of it expected")
    if args.segment < 0.1:
        parser.error(f"--segment {args.segment}: at least 0.1 expected")
    if not 0 <= args.ema < 1:
        parser.error(f"--ema {args.ema}: from 0 on and below 1 expected")
    if min(args.save_every) <= 0:
        parser.error("--save-every: above 0 expected")
    parts = {"vocals", "accompaniment"}, set(mss.SOURCES)
    if args.echo > 1 and not any(set(args.source) <= known for known in parts):
        parser.error(f"--echo {args.echo}: sources that don't overlap expected, found "
                     f"{','.join(args.source)}")
    if args.echo > 1 and args.batch_size < 2 * args.accumulate * WORLD:
        parser.error(f"--echo {args.echo}: --batch-size of at least {2 * args.accumulate * WORLD} "
                     "expected, for there must be something to mix")
    if args.batch_size % (args.accumulate * WORLD):
        parser.error(f"--batch-size {args.batch_size}: in multiples of {args.accumulate * WORLD} "
                     "expected")

def parse(argv):
    parser = build_parser()
    args = parser.parse_args(argv)
    apply_recipe(args)
    check(parser, args)
    return args

def config_of(args):
    """The model's Config; with --init, which has to fit, in its sample rate and channels."""
    config = mss.Config(
        args.model, args.source, width=args.width, window=args.window, hop=args.hop)
    if not args.init:
        return config

    theirs = args.init_config
    config = dataclasses.replace(
        config, sample_rate=theirs.sample_rate, channels=theirs.channels)
    same = config == dataclasses.replace(theirs, targets=config.targets)
    if not same or len(theirs.targets) != len(config.targets):
        raise mss.UserError(f"--init {args.init}: same model, sizes and number of sources "
                            f"expected, found {theirs}")
    return config

def open_data(args, config):
    """The examples to train on and the songs to validate with -> (Segments, list of Track)."""
    if args.demo:
        if (args.out / "last.pt").exists() and not (args.out / "songs").exists():
            raise mss.UserError(f"{args.out} holds a run on songs of your own: --musdb PATH "
                                "expected")
        args.musdb = synthetic_musdb(args.out / "songs")
        print(f"no --musdb: a small network on built-in songs, written to {args.musdb}")
    root = mss.musdb_root(args.musdb)
    tracks = mss.musdb_tracks(root, "train", args.cache)
    held_out = mss.musdb_tracks(root, "valid", args.cache)
    mss.check_rates(tracks + held_out, config.sample_rate)
    check_held_out(root, held_out, config)
    segments = mss.Segments(
        tracks, config, args.segment, args.mix_audio, args.augment, args.seed)
    return segments, held_out

def build(args, config, device, segments):
    """The model to train, with random weights by --seed, or those of --init."""
    torch.manual_seed(args.seed)

    model = mss.MODELS[config.model](config)
    if args.init:
        try:
            model.load_state_dict(args.init_model.state_dict())
        except RuntimeError as error:                                 # of another residual target
            raise mss.UserError(f"--init {args.init}: not for --source {','.join(args.source)}: "
                                f"{mss.one_line(error)}") from error
        del args.init_model                                           # its memory is needed
    elif not Path(args.out, "last.pt").exists():                      # else they are read from it
        standardise(model, segments)
    return model.to(device, memory_format=torch.channels_last).train()

def main(argv=None):
    if LAUNCHED:
        mss.check_launcher()
    args = parse(argv)
    device = start_processes(args)
    with contextlib.ExitStack() as stack:
        stack.callback(end_workers)
        config = config_of(args)
        stack.enter_context(alone_in(args.out))
        with first_process_first():
            segments, held_out = open_data(args, config)
        model = build(args, config, device, segments)
        # .to lets the weights of an LSTM lie in one piece again, as cuDNN wants them.
        average = copy.deepcopy(model).to(device) if args.ema else model
        optimizer = optimizer_of(model, args)

        settings = {name: getattr(args, name) for name in SETTINGS}
        settings["songs"] = [[track.name, track.frames] for track in segments.tracks + held_out]
        run = resume(args.out, settings, model, average, optimizer)
        if len(set(gather(run.step))) > 1:
            raise mss.UserError(f"--out {args.out}: not the same folder for all processes")
        if RANK == 0:
            for partial in args.out.glob(".partial-*"):               # of a process that was killed
                partial.unlink()

        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{args.model}, {parameters:,} parameters, for {', '.join(args.source)}, on "
              f"{WORLD} x {device}; {args.musdb}: {len(segments.tracks)} songs to train on, "
              f"{len(held_out)} to validate; {args.out}")
        code = train(args, run, model, average, optimizer, segments, held_out)
        if LAUNCHED:
            dist.destroy_process_group()                              # after an error it would wait
        return code

if __name__ == "__main__":
    mss.run(main)
