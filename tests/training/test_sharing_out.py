"""--shard True: each of two processes holds a part of all that is trained. Run and files are those of DDP."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.files import ROOT
from helpers.loops import make_loop
from helpers.models import awake, make_cimd
from helpers.processes import PATIENCE, free_port

from guided_diffusion import checkpoint, dist_util
from guided_diffusion.commands.train import refuse_to_share_out
from guided_diffusion.networks.base import units_of
from guided_diffusion.system.errors import InputError
from guided_diffusion.training.resume import resume

SETTINGS = {"lr": 1e-4, "ema_rate": "0.5,0.9", "batch_size": 1, "grad_accumulation": 2, "grad_clip": 0.5}

TRAIN = """
import json
import os
import sys
import torch
from helpers.loops import bad_steps, make_loop, saver_of, spoil
from helpers.models import WithFrozenEncoder, awake, make_cimd
from guided_diffusion import checkpoint, dist_util, logger, shards
from guided_diffusion.methods.cimd import CIMD
from guided_diffusion.training.resume import resume

dist_util.setup_dist()
logger.configure(enabled=False)
base, rank, common = sys.argv[1], dist_util.rank(), json.loads(sys.argv[2])

def trained(folder, steps, model=None, spoilt=(), shard=True, method=None, **settings):
    os.makedirs(f"{base}/{folder}", exist_ok=True)
    method = method or awake(make_cimd(learn_sigma=True))
    loop = make_loop(f"{base}/{folder}", method, max_steps=steps, shard=shard, save_interval=2, **common | settings)
    if model:
        resume(loop, f"{base}/{model}")
    loop.gradients, optimize = [], loop.optimize
    def noted():
        loop.gradients += [[shards.whole(p.grad).clone() for p in loop.trained]]
        return optimize()
    loop.optimize = noted
    spoil(loop, spoilt if rank else ()).run_loop()
    return loop

def held(loop):
    moments = [value for state in loop.optimizer.state.values() for value in state.values() if value.ndim]
    averages = [p for ema in loop.ema.values() for p in ema.parameters()]
    return [shards.bytes_held(tensors) for tensors in (loop.trained, moments, averages)]

def weights(network):
    return {name: shards.whole(value).clone() for name, value in network.state_dict().items()}

ddp, shared = trained("ddp", 3, spoilt=[1], shard=False), trained("shared", 3, spoilt=[1])
drawn = weights(shared.network_to_draw())
seen = {"held": [held(ddp), held(shared)], "gradients": [ddp.gradients[1], shared.gradients[1]],
        "bad": [bad_steps(ddp), bad_steps(shared)],
        "weights": [weights(loop.method) for loop in (ddp, shared)], "drawn": drawn,
        "averages": [weights(loop.ema["0.5"]) for loop in (ddp, shared)]}
again = trained("again", 3, "shared/savedmodel000002.pt")
seen["resumed"] = weights(again.method), weights(again.ema["0.9"])
seen["to the end"] = weights(shared.method), weights(shared.ema["0.9"])
other = trained("other", 3, "ddp/savedmodel000003.pt")  # which is at its end: nothing changes
seen["of ddp"] = weights(other.method), weights(ddp.method)
seen["bf16"] = trained("bf16", 1, wire_dtype="bfloat16", grad_clip=0.0).gradients[0]
scaled = trained("scaled", 1, dtype=torch.float16, grad_clip=0.0)
seen["scale"] = scaled.scaler.get_scale()
frozen = [trained(f"frozen{shard}", 2, shard=shard, method=CIMD(make_cimd().diffusion, WithFrozenEncoder()))
          for shard in (False, True)]
seen["frozen"] = [weights(loop.method) for loop in frozen]
seen["encoders"] = [shards.bytes_held(loop.ema["0.5"].encoder.parameters()) for loop in frozen]
checkpoint.save(f"{base}/rank{rank}.pt", seen)
dist_util.cleanup()
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What both ranks have seen, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("shared")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
           "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [sys.executable, "-c", TRAIN, str(folder), json.dumps(SETTINGS)]
    ranks = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True,
                              env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    errors = [process.communicate(timeout=PATIENCE)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    return [checkpoint.load(folder / f"rank{rank}.pt") for rank in range(2)], folder


def close(a, b, atol):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_unet_amn_acn_and_averages_become_those_of_ddp_also_with_a_step_that_one_rank_must_skip(shared):
    ranks, _ = shared
    for seen in ranks:
        assert seen["bad"] == [1, 1]
        close(*seen["weights"], 1e-4)
        close(*seen["averages"], 1e-4)
        for one, other in zip(*seen["gradients"]):
            torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-4)
        assert equal(seen["drawn"], {name.removeprefix("model."): value for name, value in seen["weights"][1].items()
                                     if name.startswith("model.")})
    assert equal(ranks[0]["weights"][1], ranks[1]["weights"][1])


def test_a_rank_holds_half_of_weights_moments_and_averages(shared):
    ranks, _ = shared
    parts = [seen["held"][1] for seen in ranks]
    for kind, all_of_it in enumerate(ranks[0]["held"][0]):
        assert sum(part[kind] for part in parts) == all_of_it
        assert max(part[kind] for part in parts) < 0.52 * all_of_it


def test_checkpoints_are_the_files_of_ddp_and_load_there_and_back(shared):
    ranks, folder = shared
    names = {path.name for path in (folder / "ddp").iterdir()}
    assert names == {path.name for path in (folder / "shared").iterdir()} and "optsavedmodel000003.pt" in names
    for name in names:
        one, other = (checkpoint.load(folder / kind / name) for kind in ("ddp", "shared"))
        assert layout(one) == layout(other), name
        assert (folder / "ddp" / name).stat().st_size == (folder / "shared" / name).stat().st_size
    for seen in ranks:
        assert all(equal(*pair) for pair in zip(seen["resumed"], seen["to the end"]))
        assert equal(*seen["of ddp"])
    (folder / "alone").mkdir()
    alone = make_loop(folder / "alone", awake(make_cimd(learn_sigma=True)), global_batch=4, max_steps=3, **SETTINGS)
    resume(alone, folder / "shared" / "savedmodel000002.pt")
    alone.run_loop()
    close(alone.method.state_dict(), ranks[0]["weights"][1], 1e-4)


def layout(state):
    """A checkpoint with tensors replaced by what they are like."""
    if isinstance(state, torch.Tensor):
        return state.dtype, state.shape, state.stride()
    if isinstance(state, dict):
        return {name: layout(value) for name, value in state.items()}
    return [*map(layout, state)] if isinstance(state, (list, tuple)) else type(state)


def test_gradients_are_sent_as_bf16_and_losses_are_scaled_as_with_ddp(shared):
    (first, second), _ = shared
    for one, other in zip(first["bf16"], second["bf16"]):
        assert torch.equal(one, other)
    assert first["scale"] == second["scale"] != 2 ** 20


def test_parts_that_are_never_trained_stay_whole(shared):
    ranks, folder = shared
    for seen in ranks:
        close(*seen["frozen"], 1e-6)
        assert seen["encoders"][0] == seen["encoders"][1]
    assert {path.name for path in (folder / "frozenTrue").iterdir()} == {
        path.name for path in (folder / "frozenFalse").iterdir()} >= {"frozenmodel.pt"}


def test_units_are_the_blocks_of_the_unet_and_none_lies_in_another():
    method = make_cimd()
    units = units_of(method)
    unet = method.model
    assert units == [*unet.input_blocks, unet.middle_block, *unet.output_blocks]
    inside = {module for unit in units for module in unit.modules() if module is not unit}
    assert not inside & set(units)


@pytest.mark.parametrize("ranks, changed, says", [
    (1, {}, "there is one process"), (2, {"optimizer": "muon"}, "--optimizer muon makes steps of whole matrices"),
    (2, {"compile": True}, "--compile True"), (2, {"global_batch": 5}, "give a multiple of 2")])
def test_what_cannot_be_shared_out_is_refused(monkeypatch, ranks, changed, says):
    monkeypatch.setattr(dist_util, "world_size", lambda: ranks)
    flags = {"shard": True, "optimizer": "adamw", "compile": False, "global_batch": 0, **changed}
    with pytest.raises(InputError, match=f"^--shard True: .*{says}"):
        refuse_to_share_out(SimpleNamespace(**flags))
    refuse_to_share_out(SimpleNamespace(**{**flags, "shard": False}))
