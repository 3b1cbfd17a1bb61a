"""What the benchmarks share: running the scripts as a user would, and drawing masks from what they trained."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from guided_diffusion import checkpoint, pretrained, script_util
from guided_diffusion.flags import apply_stored_flags, defaults
from guided_diffusion.sampling.ensembles import EnsembleSampler

ROOT = Path(__file__).resolve().parents[1]


def fast_bf16():
    """Whether this machine computes in bfloat16 faster than in float32."""
    cpuinfo = Path("/proc/cpuinfo")
    return torch.cuda.is_available() or bool(
        cpuinfo.exists() and re.search("avx512_bf16|amx_bf16", cpuinfo.read_text()))


def run_script(name, *flags):
    """Run a script of scripts/ in a process of its own; it leaves this one with its exit code if that is not 0."""
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / name), *map(str, flags)])
    if done.returncode:
        sys.exit(done.returncode)


def load_sampler(model_path, respacing, seed=0, batch_size=64, sampler="ancestral", bf16=None, **drawing):
    """An EnsembleSampler of a checkpoint whose flags are stored, walking a --timestep_respacing; in bfloat16 where
    that is fast, unless told. drawing: further flags of sampling."""
    model_path, args = pretrained.path_of(model_path), SimpleNamespace(**defaults("model", "diffusion", "method"))
    apply_stored_flags(args, {}, *checkpoint.flags_of(model_path))
    args.timestep_respacing = respacing
    method = script_util.create_method(script_util.drawing_flags(args, sampler=sampler, **drawing), training=False)
    checkpoint.load_model(method.model, model_path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method.to(device).prepare(torch.bfloat16 if bf16 or bf16 is None and fast_bf16() else None)
    return EnsembleSampler(method, batch_size=batch_size, seed=seed)
