"""Write the weights of a model, and the flags it was built with, as one safetensors file, which cannot run code.

    python scripts/segmentation_export.py results/emasavedmodel_0.9999_010000.pt lidc.safetensors

Sampling, training and Python read such a file wherever they read weights. The flags are those of flags.json beside the
checkpoint. Weights of the published code come without them: give their model and diffusion flags.
"""

import torch

from .. import checkpoint, pretrained
from ..data.cases import SegmentationCases
from ..flags import apply_stored_flags, identity_flags, settle
from ..script_util import create_method, drawing_flags
from ..system import storage
from ..system.errors import InputError
from ..system.terminal import progress, summary
from .cli import parse_flags, run_script
from .program import command


def main() -> None:
    args, given = parse_flags("export", __doc__)
    if not checkpoint.is_safetensors(args.output):
        raise InputError(f"{args.output}: must end in .safetensors, by which such a file is known")
    facts = parse_facts(args.facts)
    path = pretrained.path_of(args.checkpoint)
    apply_stored_flags(args, given, *checkpoint.flags_of(path))
    settle(args, given)
    method = create_method(drawing_flags(args), training=False)
    checkpoint.load_model(network := method.model, path, "checkpoint")

    step = checkpoint.step_of(path)
    said = checkpoint.metadata_of(path) if checkpoint.is_safetensors(path) else {"step": str(step)} if step else {}
    if args.calibrate and args.fit == "tile":
        raise InputError("--fit tile: whether experts mark anything is calibrated on scans that are seen at once; give"
                         " --fit crop, or another")
    if args.calibrate:
        cases = SegmentationCases(args.calibrate, args.image_size, args.image_channels, args.fit, flag="--calibrate")
        said["calibrated"] = method.prepare().calibrate(progress(cases, "calibrating", len(cases), "case"))
        print(said["calibrated"])
    facts = {**said, **facts, "method": args.method}
    flags = {flag.name: getattr(args, flag.name) for flag in identity_flags() if hasattr(args, flag.name)}
    storage.make_folder(storage.folder_of(args.output), "OUT.safetensors")
    moved = checkpoint.export(args.output, network, flags, getattr(torch, args.dtype), facts)
    count = sum(p.numel() for p in network.parameters()) / 1e6
    print(summary(f"{count:.1f} million parameters in {args.dtype}; rounding moved the weights by {moved:.2g} of their"
                  f" norm", [("weights and flags", args.output), ("SHA-256", storage.digest_path(args.output))],
                  command("segmentation_sample.py", ["--model_path", args.output])))


def parse_facts(text: str) -> dict[str, str]:
    """"name=value; other=value" -> a dict. :raises InputError: for anything else, or names that are taken."""
    facts = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        name, is_one, value = map(str.strip, part.partition("="))
        if not (name and is_one and value) or name in ("flags", "format", "method", "sha256"):
            raise InputError(f"--facts {part}: is not name=value with a name other than flags, format, method, sha256")
        facts[name] = value
    return facts


def run() -> None:
    run_script(main)
