"""New images around a chosen prototype, from the checkpoint of quickstart.py.

python examples/sample.py 3                                   # eight new images around prototype 3, in samples.png
python examples/sample.py 3 7 --num-samples 16 --spread 0.7
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from quickstart import PrototypicalVAE

from proto_reg import plots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prototypes", type=int, nargs="+", help="the prototypes; each one gets a row of images")
    parser.add_argument("--checkpoint", type=Path, default=Path("quickstart.pt"))
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--spread", type=float, default=1.0, help="below 1, images are more typical")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("samples.png"))
    args = parser.parse_args()
    if not args.checkpoint.exists():
        parser.error(f"--checkpoint: {args.checkpoint} is not there. Run examples/quickstart.py first.")

    saved = torch.load(args.checkpoint, weights_only=True)
    model = PrototypicalVAE(**saved["config"])
    model.load_state_dict(saved["model"])
    model.eval()
    for k in args.prototypes:
        try:
            model.regularizer.head.check_index(k)
        except ValueError as error:
            parser.error(str(error))
    figure = plots.prototypes(
        model.decode,
        model.regularizer.head,
        indices=args.prototypes,
        num_samples=args.num_samples,
        spread=args.spread,
        image_shape=saved["shape"],
        generator=torch.Generator().manual_seed(args.seed),
    )
    figure.savefig(args.out, dpi=100)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
