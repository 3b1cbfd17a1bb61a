"""How long training takes to start on a folder of cases, how fast it is then fed, and how much memory that takes.

    python benchmarks/loader.py --data_dir LIDC/train

Times are of the processor, which other programs on the machine do not change much; examples come without augmentation.
With --kept file the cases are kept in a file, as those of a larger data set are; give that twice, since the second
start finds the file.
"""

import argparse
import os
import time
from pathlib import Path

from guided_diffusion.commands.cli import run_script as run_main
from guided_diffusion.data import cases
from guided_diffusion.data.stream import ShuffledCases

BATCH, BATCHES = 32, 300


def megabytes() -> float:
    """Resident memory, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2 ** 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder with one folder a case")
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--image_channels", type=int, default=1)
    parser.add_argument("--kept", choices=("memory", "file"), default="memory", help="where decoded cases are kept")
    args = parser.parse_args()
    if args.kept == "file":
        cases.MEMORY_BYTES = 0

    before, start = megabytes(), time.process_time()
    found = cases.SegmentationCases(args.data_dir, args.image_size, args.image_channels)
    print(f"{len(found)} cases, {found.kept}: {time.process_time() - start:.1f} s of the processor to start,"
          f" {megabytes() - before:.0f} MB")
    batches, start = ShuffledCases(found).batches(BATCH), time.process_time()
    for _ in range(BATCHES):
        next(batches)
    print(f"{BATCH * BATCHES / (time.process_time() - start):.0f} examples for each second of the processor,"
          f" {megabytes() - before:.0f} MB")


if __name__ == "__main__":
    run_main(main)
