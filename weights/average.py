"""Average the weights of trainings that began with the same ones.

    python weights/average.py OUT FILE ... [--shares N ...] [--card CARD.json]

OUT becomes a checkpoint of the mean, in which each FILE counts as often as its share says, by
default once: a "model soup" (Wortsman et al. 2022). It is as fast as one of them. With --card OUT
is to be given away: in float16, with what CARD.json says beside the weights.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mss

def averaged(files, shares):
    """-> (config, model, state): the first file's, with the mean of all files' weights."""
    config, model, state = mss.load_checkpoint(files[0])
    mean = {name: 0 for name in model.state_dict()}
    for file, share in zip(files, shares):
        other_config, other, _ = mss.load_checkpoint(file)
        if other_config != config:
            raise mss.UserError(f"{file}: the network of {files[0]} expected, found another")
        for name, x in other.state_dict().items():
            mean[name] = mean[name] + share / sum(shares) * x.float()

    model.load_state_dict(mean)                                       # in each tensor's own type
    return config, model, state

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+")
    parser.add_argument("--shares", metavar="N", type=float, nargs="+")
    parser.add_argument("--card", metavar="CARD.json", type=Path)
    args = parser.parse_args(argv)
    shares = args.shares or [1] * len(args.files)
    if len(shares) != len(args.files) or min(shares) <= 0:
        parser.error(f"--shares: {len(args.files)} positive numbers expected, found {shares}")

    config, model, state = averaged(args.files, shares)
    card = json.loads(args.card.read_text(encoding="utf-8")) if args.card else {}
    mss.save_checkpoint(args.out, config, model.half() if args.card else model,
                        step=state.get("step"), **card)
    return 0

if __name__ == "__main__":
    mss.run(main)
