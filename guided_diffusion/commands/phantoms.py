"""Make synthetic lung nodules on CT with several expert outlines each and a known distribution over them.

Writes one folder per case, in the layout that training and sampling read:

    phantom-000012/image_12.jpg   the CT patch, 8-bit grey
                   label0_.jpg    the outline of the first expert, 0 or 255; label1_.jpg, label2_.jpg, ...
                   truth.npz      every outline an expert could draw, and with what probability
                                  (guided_diffusion.data.phantoms.load_truth reads it)

A case depends on --seed and its index only: ask for more later with --first_index, and cases made before stay valid.
Experts who disagree do so for visible reasons: a faint nodule, a ground-glass halo, spicules, a vessel.

The example data of this repository were made by

    python scripts/make_phantoms.py --output_dir data/training --count 24 --seed 3
    python scripts/make_phantoms.py --output_dir data/testing --count 8 --seed 8
"""

import argparse
from collections.abc import Sequence

from ..data.phantoms import write_cases
from ..system.errors import InputError
from ..system.terminal import program_name, progress
from .program import add_version, as_called


def main(argv: Sequence[str] | None = None) -> None:
    parser = create_argparser()
    args = parser.parse_args(argv)
    try:
        folders = write_cases(args.output_dir, args.count, args.seed, args.size, args.num_raters, args.first_index,
                              progress=lambda indices: progress(indices, "making phantoms", unit="case"))
    except InputError as error:
        parser.exit(2, f"{program_name()}: error: {error}\n")
    except OSError as error:
        parser.exit(2, f"{program_name()}: error: --output_dir {args.output_dir} cannot be written"
                       f" ({error.strerror}: {error.filename}); give another folder\n")
    print(f"{len(folders)} cases in {args.output_dir}, from {folders[0].name} to {folders[-1].name}")


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(program_name(), description=as_called(__doc__),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_version(parser)
    parser.add_argument("--output_dir", required=True, help="folder that receives the case folders; made if missing")
    parser.add_argument("--count", type=int, default=100, help="number of cases (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="the series of cases; use another one for testing than for training (default %(default)s)")
    parser.add_argument("--first_index", type=int, default=0, help="index of the first case (default %(default)s)")
    parser.add_argument("--size", type=int, default=128,
                        help="side in pixels, a multiple of 16 from 32 up; the anatomy scales with it "
                             "(default %(default)s)")
    parser.add_argument("--num_raters", type=int, default=4, help="experts per case (default %(default)s)")
    return parser


run = main
