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
    config, model, _ = mss.load_checkpoint(files[0])
    mean = {name: 0 for name in model.state_dict()}
    for file, share in zip(files, shares):
        other_config, other, _ = mss.load_checkpoint(file)
        if other_config != config:
            raise mss.UserError(f"{file}: the network of {files[0]} expected, found another")
        for name, x in other.state_dict().items():
            mean[name] = mean[name] + share / sum(shares) * x.float()

    model.load_state_dict(mean)                                       # in each tensor's own type
    return config, model

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
