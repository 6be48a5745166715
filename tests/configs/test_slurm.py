"""A SLURM of one node: apt-get install slurm-wlm && pytest -m slurm tests/configs/test_slurm.py

A job of two ranks is stopped in each of the ways in which clusters stop jobs, and goes on, or not.
"""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ravine.datamodules.text import python_docs_text
from ravine.strategies.checkpoint.atomic_io import latest_valid_checkpoint

pytestmark = pytest.mark.slurm

SCRIPT = Path(__file__).resolve().parents[2] / "configs" / "cluster" / "slurm.sh"
OPTIONS = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1"]
WORDS = [
    *("--model=LanguageModel", "--model.num_layers=1", "--model.d_model=16", "--model.num_heads=2"),
    *("--data=TextDataModule", "--data.path=text.txt", "--data.context_length=16"),
    *("--data.batch_size=8", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"),
    *("--trainer.limit_val_batches=0", "--trainer.logger=false"),
]
CONFIG = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
KillWait=30
SchedulerParameters=sched_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def ask(*command):
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, (command, run.stderr)
    return run.stdout


def wait_for(what, seconds, *paths):
    deadline = time.monotonic() + seconds
    while not (found := what(*paths)):
        assert time.monotonic() < deadline, f"{what.__name__} {paths}: waited {seconds} s"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """munged, slurmctld and slurmd of our own, found by SLURM_CONF."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # daemons are not on every user's PATH
    need = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "scontrol", "sinfo")
    missing = [name for name in need if not shutil.which(name, path=path)]
    assert not missing, f"no {', '.join(missing)} here: apt-get install slurm-wlm"
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)  # munged insists
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    sockets = [socket.socket() for _ in range(2)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    config = folder / "slurm.conf"
    how = {"host": socket.gethostname().partition(".")[0], "user": getpass.getuser()}
    cpus = os.cpu_count()
    config.write_text(CONFIG.format(folder=folder, ports=ports, cpus=cpus, **how))
    os.environ["SLURM_CONF"] = str(config)
    files = {k: f"{folder}/munge.{k}" for k in ("socket", "pid", "log", "seed", "key")}
    flags = {"socket": "socket", "pid": "pid-file", "log": "log-file", "seed": "seed-file"}
    flags |= {"key": "key-file"}
    munge = [f"--{flags[k]}={file}" for k, file in files.items()]
    daemons = [["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]]
    running = []
    try:
        for name, *rest in daemons:
            command = [shutil.which(name, path=path), *rest]
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=2))
            time.sleep(0.5)
        wait_for(lambda: "idle" in subprocess.run(
            ["sinfo", "-h", "-o", "%t"], capture_output=True, text=True).stdout, 30)  # fmt: skip
        yield folder
    finally:
        for daemon in reversed(running):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(20)


class Job:
    """A job, and the files it writes."""

    def __init__(self, folder, steps, *options):
        self.folder, self.steps = folder, steps
        folder.mkdir()
        (folder / "text.txt").write_text("".join(python_docs_text())[:3000])
        path = f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}"
        words = [*WORDS, f"--trainer.max_steps={steps}"]
        self.number = ask(
            *("sbatch", "--parsable", f"--chdir={folder}", "--output=log", f"--export=ALL,{path}"),
            *(*OPTIONS, *options, str(SCRIPT), *words),
        ).strip()

    def say(self):
        log = self.folder / "log"
        return log.read_text() if log.exists() else ""

    def show(self, name):
        shown = ask("scontrol", "show", "job", self.number)
        return re.search(rf"{name}=(\S+)", shown)[1]

    def trains(self):
        return re.search(r"step \d+/", self.say())

    def goes_on(self):
        return "Restored all states from the checkpoint" in self.say()

    def starts_again(self):
        return int(self.show("Restarts"))

    def ends(self):
        return self.show("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    def weights(self):
        newest, _ = latest_valid_checkpoint(
            sorted(self.folder.glob("runs/*/version_*/checkpoints"))[-1]
        )
        checkpoint = torch.load(newest, weights_only=True)
        return checkpoint["global_step"], checkpoint["state_dict"]


@pytest.fixture(scope="module")
def whole(slurm, tmp_path_factory):
    """The weights of a job that nobody stops."""
    job = Job(tmp_path_factory.mktemp("whole") / "job", 1500)
    wait_for(job.ends, 120)
    assert job.show("ExitCode") == "0:0", job.say()
    return job.weights()


def by_signal(job):
    ask("scancel", "--signal=USR1", job.number)  # what SLURM sends before the time is over


def by_preemption(job):
    ask("scontrol", "requeue", job.number)


@pytest.mark.parametrize("stop", [by_signal, by_preemption])
def test_a_stopped_job_resumes_to_the_same_weights(stop, whole, tmp_path):
    job = Job(tmp_path / "job", whole[0])
    wait_for(job.trains, 60)
    stop(job)
    wait_for(job.starts_again, 60)
    wait_for(job.ends, 120)
    said, (step, weights) = job.say(), job.weights()
    assert (job.show("JobState"), job.show("ExitCode")) == ("COMPLETED", "0:0"), said
    name = {by_signal: "SIGUSR1", by_preemption: "SIGTERM"}[stop]
    stopped_at = int(re.search(rf"stopped by {name} at step (\d+); resume: ", said)[1])
    assert 0 < stopped_at < step == whole[0], said
    assert all(torch.equal(weights[name], whole[1][name]) for name in whole[1])


def test_a_cancelled_job_leaves_a_checkpoint_and_ends(slurm, tmp_path):
    job = Job(tmp_path / "job", 100_000)
    wait_for(job.trains, 60)
    ask("scancel", job.number)
    wait_for(job.ends, 60)
    wait_for(lambda: "stopped by SIGTERM at step" in job.say(), 30)
    assert job.weights()[0] > 0
    time.sleep(5)
    assert (job.show("JobState"), job.starts_again()) == ("CANCELLED", 0)


def rank_of(job, rank):
    """The process of a rank."""
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            names = set(file.read_bytes().split(b"\0"))
        except OSError:  # it has just ended
            continue
        if {f"SLURM_JOB_ID={job.number}".encode(), f"SLURM_PROCID={rank}".encode()} <= names:
            return int(file.parent.name)
    return None


def test_the_exit_of_one_rank_ends_its_job(slurm, tmp_path):
    job = Job(tmp_path / "job", 100_000)
    wait_for(job.trains, 60)
    os.kill(rank_of(job, 1), signal.SIGKILL)
    wait_for(job.ends, 45)
    assert job.show("JobState") == "FAILED"


def test_a_job_at_its_time_limit_resumes_automatically(slurm, tmp_path):
    # limits are minutes, and SLURM is up to one of them early: the signal comes in the first of two
    job = Job(tmp_path / "job", 1_000_000, "--time=2", "--signal=USR1@60")
    wait_for(job.starts_again, 150)
    assert re.search("stopped by SIGUSR1 (at step|before the first step)", job.say()), job.say()
    wait_for(job.trains if "before the first" in job.say() else job.goes_on, 60)
    ask("scancel", job.number)
    wait_for(job.ends, 60)
