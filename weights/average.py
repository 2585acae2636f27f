"""Average the weights of trainings that go back to the same ones.

    python weights/average.py FILE ... --out OUT [--shares N ...] [--card CARD.json]

OUT becomes a checkpoint of the mean: a "model soup" (Wortsman et al. 2022), as fast as one FILE.
Each FILE counts as often as its share says, by default once. --card is for weights to be given
away: OUT is in 8 bits then (mss.in_8_bits), and holds what CARD.json says, too.
"""
import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mss

def averaged(files, shares):
    """-> (config, model) with the mean of the files' weights. UserError where networks differ."""
    configs, models, _ = zip(*map(mss.load_checkpoint, files))
    for file, config in zip(files, configs):
        if config != configs[0]:
            raise mss.UserError(f"{file}: the network of {files[0]} expected, found another")

    states = [model.state_dict() for model in models]
    mean = {}
    for name in states[0]:
        mean[name] = sum(share / sum(shares) * state[name].float()
                         for share, state in zip(shares, states))
    models[0].load_state_dict(mean)                                   # in each tensor's own type
    return configs[0], models[0]

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+")
    parser.add_argument("--out", metavar="OUT", type=Path, required=True)
    parser.add_argument("--shares", metavar="N", type=float, nargs="+")
    parser.add_argument("--card", metavar="CARD.json", type=Path)
    args = parser.parse_args(argv)
    shares = args.shares or [1] * len(args.files)
    if len(shares) != len(args.files) or not all(0 < share < math.inf for share in shares):
        parser.error(f"--shares: {len(args.files)} positive numbers expected, found {shares}")

    card = json.loads(args.card.read_text(encoding="utf-8")) if args.card else {}
    config, model = averaged(args.files, shares)
    mss.save_checkpoint(args.out, config, model, small=bool(args.card), **card)
    return 0

if __name__ == "__main__":
    mss.run(main)
