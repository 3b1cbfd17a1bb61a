"""What SLURM, MPI and torchrun say of a process, and the addresses of machines."""

import os
import shutil
import subprocess
import sys

import pytest

from guided_diffusion import dist_util
from guided_diffusion.system import launchers
from guided_diffusion.system.errors import InputError

STEP = {"SLURM_JOB_ID": "5000", "SLURM_STEP_ID": "2", "SLURM_NTASKS": "64", "SLURM_STEP_NUM_TASKS": "11",
        "SLURM_STEP_NODELIST": "gpu[007-008,12]", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2",
        "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize("nodes, first", [
    ("node1", "node1"), ("node1,node2", "node1"), ("gpu[007-009,12],login", "gpu007"), ("a[3]-ib,b", "a3-ib"),
    ("rack[2-3]n[04,06]", "rack2n04"), ("a-b-01.c.org,d", "a-b-01.c.org")])
def test_first_host_of_a_list_of_slurm(nodes, first):
    assert launchers.first_host(nodes) == first


def test_ranks_come_from_the_step_of_slurm():
    assert launchers.variables_from_slurm(STEP) == {
        "RANK": "9", "WORLD_SIZE": "11", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "gpu007",
        "MASTER_PORT": "25002"}
    assert launchers.variables_from_slurm({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) == {}  # a shell in a job of 64 tasks


@pytest.mark.parametrize("other", ["TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_ranks_come_from_slurm_only_without_another_launcher(other):
    assert launchers.by_slurm(STEP) and not launchers.by_slurm({**STEP, other: "2"})
    assert not launchers.by_slurm({name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"})


@pytest.mark.parametrize("wrong, words", [
    ({"RANK": "0", "WORLD_SIZE": "11"}, "RANK is 0, but srun's SLURM_PROCID is 9; unset RANK"),
    ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but srun's SLURM_NTASKS is 11"),
    ({"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "0", "RANK": "0"},
     "srun started 11 tasks, and torchrun in each of them a run of its own")])
def test_launchers_that_contradict_slurm_are_refused(wrong, words):
    with pytest.raises(InputError, match=words):
        launchers.refuse_contradictions({**STEP, **wrong})


@pytest.mark.parametrize("right", [
    {}, {"RANK": "9", "WORLD_SIZE": "11"},
    {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "11", "TORCHELASTIC_MAX_RESTARTS": "0", "RANK": "3"},
    {"OMPI_COMM_WORLD_SIZE": "4", "RANK": "2"}])
def test_launchers_that_agree_with_slurm_are_not(right):
    launchers.refuse_contradictions({**STEP, **right})


def test_gpu_of_a_task_that_sees_no_other(monkeypatch):
    """With --gpus-per-task=1 every task counts its own GPU as 0."""
    import torch

    chosen = []
    for name, value in {**launchers.variables_from_slurm(STEP), "SLURM_GPUS_PER_TASK": "1", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    dist_util.setup_dist()
    assert chosen == [0]


def test_a_name_that_does_not_resolve_is_refused():
    launchers.refuse_unknown_host("localhost")
    with pytest.raises(InputError, match=r"MASTER_ADDR .* nowhere\.invalid: does not resolve on"):
        launchers.refuse_unknown_host("nowhere.invalid")


HOST = """
import os, socket
from guided_diffusion.system import launchers

socket.gethostbyname = lambda name: "127.0.1.1"  # as Debian's /etc/hosts has it
os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", RANK="0", MASTER_ADDR="10.9.8.2")
launchers.complete_environment()
print(launchers.routed_address("10.9.8.2"), os.environ["GLOO_SOCKET_IFNAME"], launchers.known_address("me"))
"""


@pytest.mark.parametrize("routed", [True, False])
def test_address_and_interface_are_those_of_the_way_to_the_others(routed):
    """On a host with a network of its own: 10.9.8.1 on a device, and, where it is routed, a way to elsewhere."""
    commands = ["ip link set lo up", "ip tuntap add host0 mode tap", "ip addr add 10.9.8.1/24 dev host0",
                "ip link set host0 up", *(["ip route add default via 10.9.8.2"] if routed else [])]
    if not (shutil.which("unshare") and shutil.which("ip")):
        pytest.skip("unshare or ip is missing")
    script = " && ".join([*commands, 'exec "$0" -c "$1"'])
    done = subprocess.run(["unshare", "--net", "sh", "-c", script, sys.executable, HOST], text=True,
                          capture_output=True, env={name: value for name, value in os.environ.items()
                                                    if name != "GLOO_SOCKET_IFNAME"})
    if done.returncode and "guided_diffusion" not in done.stderr:
        pytest.skip(f"no namespace of its own: {done.stderr.strip()}")
    assert done.stdout.split() == ["10.9.8.1", "host0", "10.9.8.1"], done.stderr
