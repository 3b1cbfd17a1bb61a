"""A real SLURM on this machine: is a job that reaches its time limit saved, queued again, and as if nothing had been?

    apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
    python benchmarks/slurm.py                  # about eight minutes on one core, mostly of waiting

slurmctld and a slurmd run on one of the hosts of benchmarks/hosts.py, another slurmd on a second one; munged, which
both reach by a socket on the disk, on this machine itself. Nodes claim 32 CPUs and four GPUs each, as the recipe asks
for them. scripts/launch/slurm.sbatch is given to sbatch as it is, with a time limit of two minutes and one task a node.
It trains, is signalled before the limit, saves, queues itself again, goes on, and must end with the weights, averages
and optimiser of two local processes that nobody disturbed, to the bit. Before it, SLURM's own variables are
contradicted, which must be refused.

Until the job is queued again each step of it takes a second, so that it cannot be done before. Needs root. Exit code 1
if anything was wrong, 77 where there can be no hosts or SLURM is not installed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hosts
from common import ROOT
from hosts import Wrong, read, same_weights, wait_until

from guided_diffusion import checkpoint
from guided_diffusion.data import phantoms

STEPS = 100  # more than fit into the time limit, at a second each
GPUS = "null", "zero", "full", "random"  # devices that stand for them, which nobody opens
CONF = """ClusterName=test
SlurmctldHost=host1
SlurmUser=root
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
ReturnToService=2
KillWait=30
MpiDefault=none
NodeName=host[1-2] CPUs=32 RealMemory=1000 Gres=gpu:4
PartitionName=all Nodes=host[1-2] Default=YES MaxTime=INFINITE State=UP
"""
TRAIN = """#!{python}
import os, runpy, sys, time
sys.path.insert(0, {root!r})
from guided_diffusion.train_util import TrainLoop
step = TrainLoop.run_step
if "SLURM_RESTART_COUNT" not in os.environ:
    TrainLoop.run_step = lambda *args: (time.sleep(1), step(*args))[1]
sys.argv[0] = {script!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def missing():
    """Why this cannot be done here; "" if it can."""
    names = [name for name in ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol") if not shutil.which(name)]
    if names:
        return f"{', '.join(names)} not found; install slurmctld, slurmd, slurm-client and munge"
    return "SLURM's processes must be root's" if os.geteuid() else hosts.permitted()


def munged(root):
    """munged, in the foreground."""
    (root / "munge.key").write_bytes(os.urandom(128))
    (root / "munge.key").chmod(0o600)
    root.chmod(0o755)
    return subprocess.Popen(["munged", "--foreground", "--force", f"--key-file={root}/munge.key",
                             f"--socket={root}/munge.socket", f"--pid-file={root}/munged.pid",
                             f"--log-file={root}/munged.log", f"--seed-file={root}/munged.seed"],
                            stdout=subprocess.DEVNULL, stderr=open(root / "munged.txt", "w"))


class Cluster:
    """SLURM on two hosts; `ask(command)` runs a command on the first."""

    def __init__(self, root, two):
        self.root, self.two = root, two
        (root / "slurm.conf").write_text(CONF.format(root=root))
        (root / "gres.conf").write_text("".join(f"Name=gpu File=/dev/{name}\n" for name in GPUS))
        (root / "state").mkdir()
        (root / "bin").mkdir()
        (root / "bin" / "cimd-train").write_text(TRAIN.format(
            python=sys.executable, root=str(ROOT), script=str(hosts.SCRIPTS / "segmentation_train.py")))
        (root / "bin" / "cimd-train").chmod(0o755)
        self.env = {"SLURM_CONF": str(root / "slurm.conf"),
                    "PATH": os.pathsep.join([str(root / "bin"), os.environ["PATH"]])}
        two[0].start(["slurmctld", "-D"], root, **self.env)
        for host in two:
            host.start(["slurmd", "-D", "-N", host.name], root, **self.env)
        wait_until(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%T %D") and "2" in self.ask(
            "sinfo", "-h", "-t", "idle", "-o", "%D"), "two idle nodes", 60)

    def ask(self, *command, **env):
        """What a command prints on the first host."""
        output = self.root / "ask"
        output.mkdir(exist_ok=True)
        path = output / f"{self.two[0].name}.txt"
        path.unlink(missing_ok=True)
        self.two[0].start(command, output, **self.env, **env).wait()
        return read(path)


def job(root, cluster):
    """The recipe, from sbatch to its end; returns what became of it."""
    folder, begin = root / "job", time.monotonic()
    folder.mkdir()
    said = cluster.ask("sbatch", "--time=2", "--signal=B:USR1@60", "--ntasks-per-node=1", f"--chdir={folder}",
                       ROOT / "scripts" / "launch" / "slurm.sbatch", *flags(root / "data", folder / "results"))
    if "Submitted batch job" not in said:
        raise Wrong(said)
    number = said.split()[-1]
    out = folder / f"cimd-{number}.out"

    def state(word):
        return word in cluster.ask("scontrol", "show", "job", number)

    wait_until(lambda: f"saved; job {number} is queued again" in read(out), "the signal and the save", 240)
    saved = checkpoint.steps_in(folder / "results")[-1]
    print(f"signalled, saved at step {saved} and queued again after {time.monotonic() - begin:.0f} seconds", flush=True)
    wait_until(lambda: state("JobState=COMPLETED") or state("JobState=FAILED"), "the end", 600)
    text = read(out)
    restarts = text.count("is queued again")  # more than one where the machine is slow
    if not state("JobState=COMPLETED") or not state(f"Restarts={restarts}"):
        raise Wrong(text[-2000:])
    if f"resumed at step {saved}" not in text or "2 process(es)" not in text or "Traceback" in text:
        raise Wrong(text)
    same_weights(folder / "results", root / "reference", STEPS)
    return (f"saved at step {saved}, queued again {restarts} time(s), went on to step {STEPS}; as two"
            f" undisturbed local processes, to the bit ({time.monotonic() - begin:.0f} seconds)")


def contradictions(root, cluster):
    """What is refused, in the program's words."""
    found = []
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "3")):
        said = cluster.ask("srun", "--nodes=2", "--ntasks-per-node=1", f"--chdir={root}", "cimd-train",
                           *flags(root / "data", root / "refused"), **{name: value})
        lines = [line for line in said.splitlines() if "error:" in line and "srun:" not in line]
        if not lines or f"{name} is {value}, but srun's" not in lines[0] or "Traceback" in said:
            raise Wrong(said)
        found.append(lines[0].split("error: ")[1])
    if (root / "refused").exists():
        raise Wrong("a refused run has written something")
    return found


def flags(data, results):
    return hosts.training(data, results, max_steps=STEPS, save_interval=50)[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep all that was written")
    args = parser.parse_args()
    if reason := missing():
        print(f"nothing was done: {reason}")
        sys.exit(77)
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    phantoms.write_cases(root / "data", hosts.CASES, 0, 32)
    script = hosts.SCRIPTS / "segmentation_train.py"
    hosts.local([sys.executable, script, *flags(root / "data", root / "reference"), "--ngpu", 2], root)
    passes = munged(root)
    try:
        with hosts.hosts(2, root, 0) as two:
            wait_until(lambda: (root / "munge.socket").exists(), "munged", 20)
            cluster = Cluster(root, two)
            print(cluster.ask("sinfo", "--version").strip(), flush=True)
            for line in contradictions(root, cluster):
                print(f"refused: {line}", flush=True)
            print(job(root, cluster))
    except Wrong as error:
        print(f"wrong: {error}; all that was written is kept in {root}")
        sys.exit(1)
    finally:
        passes.terminate()
        passes.wait()
    if not args.keep:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
