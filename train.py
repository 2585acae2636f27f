"""Train one model for one source; the same command resumes an interrupted run.

    python train.py --out runs/demo                          # built-in synthetic songs: minutes on a CPU
    python train.py --source vocals --musdb /data/musdb18hq  # the paper's system: the defaults are its numbers

OUT holds last.pt (to resume from), best.pt (highest validation SDR) and log.csv.
"""
import csv
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
import torch.nn.functional as F

import evaluate
import mss

LEARNING_RATE = {"vocals": 1e-3, "accompaniment": 5e-4, "bass": 1e-4, "drums": 2e-4, "other": 5e-4}     # section 4.2
PAPER = dict(model="ResUNetDecouple+", width=32, steps=300_000, batch_size=16, segment=3.0, warmup=1000,
             validate_every=10_000, save_every=1000, log_every=100)
DEMO = dict(model="UNetDecouple+", width=8, steps=250, batch_size=4, segment=1.0, lr=2e-3, warmup=25,
            validate_every=50, save_every=50, log_every=10)                           # without --musdb
SETTINGS = ("source", "model", "width", "batch_size", "segment", "lr", "warmup", "mix_audio", "augment", "seed", "bf16")
LOG = ("step", "loss", "lr", "ms_per_step", "data_wait", "valid_sdr", "valid_mixture_sdr", "valid_usdr")

# ---- The built-in data: songs made of arithmetic ---------------------------------------------------------------------

def tone(frequency, harmonics, rate):
    """Harmonics of a frequency given per sample (Hz); harmonics(k, f) is the amplitude of the k-th at f Hz -> (L,)."""
    phase = 2 * np.pi * np.cumsum(frequency) / rate
    return sum(harmonics(k, k * frequency) * np.sin(k * phase) for k in range(1, 25) if k * frequency.max() < rate / 2)

def envelope(n, rate, decay):
    t = np.arange(n) / rate
    return np.minimum(1, t / 0.01) * np.exp(-t / decay) * np.minimum(1, t[::-1] / 0.02)

def synthetic_song(seed, seconds, rate=44100):
    """{stem: (2, L) float32} of a short song: a vibrato formant voice, bass, drums and chords."""
    rng = np.random.default_rng(seed)
    beat = round(rate * 60 / rng.uniform(90, 140))
    length = round(seconds * rate)
    stems = {name: np.zeros((2, length + 4 * beat), dtype="float32") for name in mss.SOURCES}

    def add(stem, start, sound, pan=0.5):
        stems[stem][:, start:start + len(sound)] += np.sqrt([[1 - pan], [pan]]) * sound

    vowels = rng.permutation([(700, 1100, 2600), (300, 2200, 3000), (450, 800, 2500), (350, 650, 2600)])
    tonic = rng.uniform(45, 65)
    t = np.arange(4 * beat) / rate
    for i, start in enumerate(range(0, length, beat)):
        root = tonic * 2 ** (rng.choice([0, 3, 5, 7, 10]) / 12)
        if rng.random() < 0.7:                                        # a sung note: vibrato and formants
            n = int(beat * rng.choice([0.5, 1, 1.5]))
            f0 = 4 * root * 2 ** (rng.choice([0, 3, 7, 12]) / 12 + 0.04 * np.sin(2 * np.pi * 5.5 * t[:n] + i))
            peaks = vowels[rng.integers(len(vowels))]
            voice = tone(f0, lambda k, f: sum(1 / (1 + ((f - p) / 120) ** 2) for p in peaks) + 0.02, rate)
            add("vocals", start, 0.15 * voice * envelope(n, rate, 2.0))
        add("bass", start, 0.2 * tone(np.full(beat, root), lambda k, f: 1 / k ** 1.5, rate) * envelope(beat, rate, 0.5))
        for pan, step in zip((0.2, 0.5, 0.8), (0, 3, 7)):             # a chord, its notes spread over the stereo field
            note = np.full(beat, 3.98 * root * 2 ** (step / 12))
            add("other", start, 0.05 * tone(note, lambda k, f: 1 / k, rate) * envelope(beat, rate, 0.8), pan)
        kick = np.sin(2 * np.pi * 50 * t[:beat] + 12 * (1 - np.exp(-t[:beat] * 30))) * envelope(beat, rate, 0.12)
        noise = rng.standard_normal(beat)
        add("drums", start, 0.5 * kick if i % 2 == 0 else 0.2 * noise * envelope(beat, rate, 0.08))
        add("drums", start + beat // 2, 0.1 * np.diff(noise, append=0) * envelope(beat, rate, 0.03), 0.65)
    return {name: audio[:, :length] for name, audio in stems.items()}

def synthetic_musdb(root, songs=(("train", 8), ("valid", 2), ("test", 2)), seconds=8, seed=0):
    """Write synthetic songs in MUSDB's layout, as FLAC, unless they are there -> root."""
    first = 0
    for subset, count in songs:
        for i in range(count):
            folder = Path(root, subset, f"Synthetic - Song {first + i}")
            if not folder.is_dir():
                folder.parent.mkdir(parents=True, exist_ok=True)
                stems = synthetic_song((seed, first + i), seconds)
                with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as temporary:
                    for name, audio in {**stems, "mixture": sum(stems.values())}.items():
                        mss.write_audio(Path(temporary, "song", f"{name}.flac"), torch.from_numpy(audio), 44100)
                    Path(temporary, "song").rename(folder)
        first += count
    return root

# ---- Training --------------------------------------------------------------------------------------------------------

def learning_rate(step, base, warmup):
    """Of step 1, 2, ...: linear warm-up, then x0.9 after every 15,000 steps (section 4.2)."""
    return base * min(step / max(warmup, 1), 1.0) * 0.9 ** (step // 15_000)

def validate(model, tracks, bf16, caught):
    """Whole held-out songs through separate_track -> {column of LOG: median or mean over them}; {} when interrupted."""
    model.eval()
    rows = []
    for track in tracks:
        scores, _, _ = evaluate.compare(track, *evaluate.separated(model, track, bf16))
        rows += [row for row in evaluate.summary(track.name, scores) if row["target"] in model.config.targets]
        if caught:
            return {}
    model.train()
    ours, mixture = ([row for row in rows if row["system"] == system] for system in ("estimate", "mixture"))
    return {"valid_sdr": evaluate.median([row["SDR"] for row in ours]),
            "valid_mixture_sdr": evaluate.median([row["SDR"] for row in mixture]),
            "valid_usdr": evaluate.median([row["uSDR"] for row in ours], np.mean)}

def catch_signals():
    """Return a list that SIGINT and SIGTERM append themselves to; a second one ends the program at once."""
    caught = []

    def handler(number, frame):
        if caught:
            sys.exit(128 + number)
        caught.append(number)
        os.write(2, b"\nstopping after this step or song; again: at once, without saving\n")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return caught

def ignore_signals(worker):
    for number in (signal.SIGINT, signal.SIGTERM):                    # a terminal or scheduler signals workers too:
        signal.signal(number, signal.SIG_IGN)                         # the loop needs them until its step is done

def end_workers():
    """End the loader's workers, which would ignore the SIGTERM that ends them when this process exits."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)                 # torch's handler would call their end an error
    for worker in multiprocessing.active_children():
        worker.kill()

def resume(out, settings, model, optimizer):
    """Load OUT/last.pt, where there is one, into model and optimizer -> {"step", "best", "validated", "settings"}.

    Raises UserError, naming the flags, where the run in OUT was started with other settings.
    """
    path = Path(out, "last.pt")
    if not path.exists():
        if path.with_name("best.pt").exists():
            raise mss.UserError(f"{out} holds a best.pt, but no last.pt to resume from; choose another --out")
        return {"step": 0, "best": -math.inf, "validated": 0, "settings": settings}
    _, saved, state = mss.load_checkpoint(path)
    theirs = state.get("settings", {})
    differ = [f"--{name.replace('_', '-')} {theirs.get(name)} (this command: {settings[name]})"
              for name in settings if theirs.get(name) != settings[name] and name != "songs"]
    if differ:
        raise mss.UserError(f"{out} holds a run of another configuration: {', '.join(differ)}; choose another --out")
    if theirs["songs"] != settings["songs"]:
        raise mss.UserError(f"{out} holds a run on other songs ({len(theirs['songs'])} then, {len(settings['songs'])} "
                            "now, compared by name and length); choose another --out")
    model.load_state_dict(saved.state_dict())
    optimizer.load_state_dict(state["optimizer"])
    print(f"resuming {path} at step {state['step']}")
    return {key: state[key] for key in ("step", "best", "validated", "settings")}

def open_log(path, run):
    """Drop the rows that an interrupted run wrote after its last save; return a function that appends a row."""
    rows = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file)
                    if int(row["step"]) <= run["validated" if row["valid_sdr"] else "step"]]
    with mss.replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, LOG)
        writer.writeheader()
        writer.writerows(rows)

    def append(row):
        with open(path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, LOG).writerow(row)
    return append

def parse(argv):
    parser = mss.parser(__doc__)
    parser.add_argument("--source", "--target", default="vocals", choices=tuple(LEARNING_RATE), help="what to separate")
    parser.add_argument("--musdb", default=os.environ.get("MUSDB_PATH"), help="dataset folder (env MUSDB_PATH); "
                        "without it a small network trains on built-in synthetic songs")
    parser.add_argument("--cache", help="where .stem.mp4 files are decoded to (default: ROOT-wav beside ROOT)")
    parser.add_argument("--out", help="folder of checkpoints and log (default: runs/SOURCE)")
    parser.add_argument("--model", choices=tuple(mss.MODELS), help="row of the paper's Table 3")
    parser.add_argument("--width", type=int, help="features of the first encoder; paper: 32")
    parser.add_argument("--steps", type=int, help="paper: 300,000")
    parser.add_argument("--batch-size", type=int, help="paper: 16")
    parser.add_argument("--segment", type=float, help="seconds of a training example; paper: 3")
    parser.add_argument("--lr", type=float, help=f"learning rate; paper: {LEARNING_RATE}")
    parser.add_argument("--warmup", type=int, help="steps of linear warm-up; published code: 1000")
    parser.add_argument("--mix-audio", type=int, default=2, help="segments summed per source, bass excepted; paper: 2")
    parser.add_argument("--augment", nargs="*", default=[], choices=tuple(mss.AUGMENTATIONS), help="paper: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that read songs")
    parser.add_argument("--validate-every", type=int, help="steps")
    parser.add_argument("--save-every", type=int, help="steps")
    parser.add_argument("--log-every", type=int, help="steps")
    musdb = parser.parse_args(argv).musdb
    parser.set_defaults(**(PAPER if musdb else DEMO))
    args = parser.parse_args(argv)
    args.out = Path(args.out or f"runs/{args.source}")
    args.lr = LEARNING_RATE[args.source] if args.lr is None else args.lr
    for name in ("width", "steps", "batch_size", "segment", "lr", "mix_audio", "validate_every", "save_every",
                 "log_every"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: a positive number expected")
    if args.workers < 0 or not 0 <= args.seed < 2 ** 63 or args.segment < 0.1:
        parser.error("--workers and --seed from 0 up and --segment from 0.1 s up expected")
    return args

def save_last(args, run, model, optimizer):
    mss.save_checkpoint(args.out / "last.pt", model.config, model, optimizer=optimizer.state_dict(), **run)

def keep_best(args, run, model, scores, log):
    """Log and print a validation's scores; save the model if they are the highest so far."""
    log({"step": run["step"], **scores})
    print(f"step {run['step']}: validation {evaluate.SDR} {scores['valid_sdr']:.2f} dB, "
          f"mixture as estimate {scores['valid_mixture_sdr']:.2f} dB", flush=True)
    run["validated"] = run["step"]
    if scores["valid_sdr"] > run["best"]:
        run["best"] = scores["valid_sdr"]
        mss.save_checkpoint(args.out / "best.pt", model.config, model, step=run["step"], **scores)

def train(args, run, model, optimizer, segments, held_out, log):
    """Train until args.steps or a signal; `run` ("step", "best", "validated", "settings") moves on -> exit code."""
    device = next(model.parameters()).device
    caught = catch_signals()
    loader = iter(torch.utils.data.DataLoader(                        # what a step sees follows from its number alone
        segments, args.batch_size, sampler=range(run["step"] * args.batch_size, args.steps * args.batch_size),
        num_workers=args.workers, worker_init_fn=ignore_signals, pin_memory=device.type == "cuda"))
    first, losses, waited, began, shown = run["step"], [], 0.0, time.perf_counter(), -math.inf
    while True:
        # save; validate, keep the best, and save that this is done
        last = run["step"] >= args.steps
        stop = last or bool(caught)
        due = (last or run["step"] % args.validate_every == 0) and run["validated"] < run["step"] and not caught
        if run["step"] > first and (stop or due or run["step"] % args.save_every == 0):
            save_last(args, run, model, optimizer)
        if due:
            paused = time.perf_counter()
            scores = validate(model, held_out, args.bf16, caught)
            if scores:
                keep_best(args, run, model, scores, log)
                save_last(args, run, model, optimizer)
            stop = stop or not scores
            began += time.perf_counter() - paused
        if stop:
            print(f"{'stopped' if caught else 'done'} at step {run['step']}; best validation SDR {run['best']:.2f} dB")
            return 128 + caught[0] if caught else 0

        # step
        start = time.perf_counter()
        mixture, targets = (x.to(device, non_blocking=True) for x in next(loader))    # (B, C, L), (B, S, C, L)
        waited += time.perf_counter() - start
        run["step"] += 1
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run["step"], args.lr, args.warmup)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            estimates = model(mixture)                                # (B, S, C, L)
        loss = F.l1_loss(estimates, targets)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        if not math.isfinite(losses[-1]) or not torch.isfinite(norm):
            raise mss.UserError(f"step {run['step']}: loss {losses[-1]:.3g}, gradient norm {norm:.3g}: not learned "
                                "from, and nothing saved since; try a lower --lr in another --out")
        optimizer.step()

        # log
        now = time.perf_counter()
        seconds, n = now - began, len(losses)
        if run["step"] % args.log_every == 0 or run["step"] == args.steps or now - shown > 30:
            left = (args.steps - run["step"]) * seconds / n / 60
            print(f"step {run['step']}/{args.steps}, loss {np.mean(losses):.5f}, {1000 * seconds / n:.0f} ms/step, "
                  f"data wait {100 * waited / seconds:.0f} %, {left:.0f} min left   ",
                  end="\r" if sys.stdout.isatty() else "\n", flush=True)
            shown = now
        if run["step"] % args.log_every == 0 or run["step"] == args.steps:
            log({"step": run["step"], "loss": f"{np.mean(losses):.6g}", "lr": group["lr"],
                 "ms_per_step": f"{1000 * seconds / n:.1f}", "data_wait": f"{waited / seconds:.4f}"})
            losses, waited, began = [], 0.0, now

def main(argv=None):
    args = parse(argv)
    device = mss.pick_device(args.device)
    if not args.musdb:
        if (args.out / "last.pt").exists() and not (args.out / "songs").exists():
            raise mss.UserError(f"{args.out} holds a run on songs of your own: --musdb PATH expected")
        args.musdb = synthetic_musdb(args.out / "songs")
        print(f"no --musdb: a small network on built-in synthetic songs, written to {args.musdb}")
    root = mss.musdb_root(args.musdb)
    tracks, held_out = (mss.musdb_tracks(root, subset, args.cache) for subset in ("train", "valid"))
    if not any(track.load(args.source).any() for track in held_out):      # now, not at the first validation
        raise mss.UserError(f"{root}: a validation song with {args.source} expected, found silence in all of them")
    config = mss.Config(model=args.model, targets=(args.source,), width=args.width)
    segments = mss.Segments(tracks, config, args.segment, args.mix_audio, args.augment, args.seed)

    torch.manual_seed(args.seed)
    model = mss.MODELS[config.model](config).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), args.lr, amsgrad=True)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["songs"] = [[track.name, track.frames] for track in tracks + held_out]
    run = resume(args.out, settings, model, optimizer)
    print(f"{config.model}, {sum(p.numel() for p in model.parameters()):,} parameters, for {args.source}, on {device}; "
          f"{root}: {len(tracks)} songs to train on, {len(held_out)} to validate; {args.out}")
    try:
        return train(args, run, model, optimizer, segments, held_out, open_log(args.out / "log.csv", run))
    finally:
        end_workers()

if __name__ == "__main__":
    mss.run(main)
