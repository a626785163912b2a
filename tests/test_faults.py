# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Processes that die in the middle of a job, on purpose and on time."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from torchtitan.experiments.rl.unified import simple_rl_multiprocess

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import chaos_resume  # noqa: E402

# From a fault to the answer that was waited for, or to the end of the job.
LIMIT_SECONDS = 30
FLAGS = [
    "--rl.prompts_per_step",
    "4",
    "--rl.group_size",
    "4",
    "--evaluation.interval",
    "0",
    "--metrics.no-enable_tensorboard",
]

# Runs the job and kills processes of it by name: what a process is called with, how often, who dies then (of several
# names the last one dies and the others hang), and after how many seconds; below 0 it is dead when the call begins.
FAULTY_JOB = """
import asyncio, os, signal, sys, time
from pathlib import Path
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
prepare_environment()
from torchtitan.experiments.rl.unified.controller import generators as generator, trainer_mesh as trainer
from torchtitan.experiments.rl.unified.simple_rl_multiprocess import main

def pid_of(name):
    pids = [pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
    return next(int(p) for p in pids if f"HYPERACTOR_PROCESS_NAME={name}" in Path(f"/proc/{p}/environ").read_text())

def kill_at(cls, method, call, names, delay):
    original, calls, killed = getattr(cls, method), [0], []
    *hanging, name = names.split("+")

    def kill():
        for other in hanging:
            os.kill(pid_of(other), signal.SIGSTOP)
        os.kill(pid_of(name), signal.SIGKILL)
        killed.append(time.monotonic())

    async def faulty(self, *args):
        calls[0] += 1
        if calls[0] == call:
            kill() if delay < 0 else asyncio.get_running_loop().call_later(delay, kill)
        answer = await original(self, *args)
        if killed:
            print(f"{name} was back after {time.monotonic() - killed.pop():.1f} s", flush=True)
        return answer

    setattr(cls, method, faulty)

for fault in sys.argv.pop(1).split():
    place, call, names, delay = fault.split(":")
    cls, method = place.split(".")
    cls = {"Replica": generator.Replica, "TrainerMesh": trainer.TrainerMesh}[cls]
    kill_at(cls, method, int(call), names, float(delay))
sys.exit(main(sys.argv[1:]))
"""


def run(folder: Path, *flags: str, faults: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", FAULTY_JOB, faults, "--job.dump_folder", str(folder), *FLAGS, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder.parent)


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if "second" not in key} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("max_staleness, ranks", [(0, "trainer-0+trainer-1"), (2, "trainer-1")])
def test_a_run_that_loses_processes_ends_as_if_it_had_not(max_staleness, ranks, tmp_path):
    """Proves supervision: of a generator lost while it generates and while it takes weights, and of a trainer rank,
    with the other one hanging, and before its weights were taken. Each is back in time, and the last checkpoint has the
    undisturbed run's weights, optimizer and position. And of a run that goes on from a `load_step` and loses its
    trainer: from its own newest checkpoint, not from that step again."""
    flags = ["--training.steps", "7", "--trajectory_queue.max_staleness", str(max_staleness)]
    flags += ["--checkpoint.enable", "--checkpoint.interval", "3", "--checkpoint.no-last_save_model_only"]
    whole = run(tmp_path / "whole", *flags)
    assert whole.returncode == 0, whole.stderr
    faults = f"Replica.generate:2:generator0:0.02 Replica.update_weights:4:generator0:0 TrainerMesh.step:5:{ranks}:0.01"
    faults += " Replica.update_weights:8:trainer-0:-1"
    done = run(tmp_path / "faulty", *flags, faults=faults)
    assert done.returncode == 0, done.stderr
    assert "starting it again, restart 1" in done.stderr and "starting it again, restart 2" in done.stderr
    assert "going on from the last checkpoint, restart 2" in done.stderr
    back = [float(seconds) for seconds in re.findall(r"was back after ([\d.]+) s", done.stdout)]
    assert len(back) == 4 and max(back) <= LIMIT_SECONDS, back
    assert chaos_resume.differences(tmp_path / "whole", tmp_path / "faulty", steps=7) == []
    if max_staleness:
        return
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    # Its fourth step is the seventh of the run; the checkpoint of the sixth is written.
    faults = "Replica._ready:1:generator0:3 TrainerMesh.step:4:trainer-0:0.01"  # The first one while its engine loads.
    done = run(tmp_path / "again", *flags, "--checkpoint.load_step", "3", faults=faults)
    assert done.returncode == 0, done.stderr
    assert "generator0 failed" in done.stderr and "starting it again, restart 1" in done.stderr
    assert "going on from the last checkpoint, restart 1" in done.stderr
    aside = {path.name for path in (tmp_path / "again/checkpoint/set_aside").iterdir()}
    assert aside == {"step-6", "step-7"}, "of the run before; this run's own step 6 is what it went on from"
    assert chaos_resume.differences(tmp_path / "whole", tmp_path / "again", steps=7) == []


DAMAGES = {
    # (what happens to the second update or after it, flags, what the error says)
    "flipped byte": (
        """
def damage(update):
    with open(update.location, "r+b") as file:
        file.seek(update.entries[-1].offset)
        byte = file.read(1)[0]
        file.seek(update.entries[-1].offset)
        file.write(bytes([byte ^ 1]))
""",
        [],
        "weights of version 1: norm.weight arrived damaged",
    ),
    "cut short": (
        """
def damage(update):
    os.truncate(update.location, update.entries[-1].offset)
""",
        ["--weight_sync.transport", "file"],
        "arrived cut short",
    ),
    "base weights": (
        """
def damage(update):
    [replica] = MESHES[0].generators.replicas
    update_weights = replica.update_weights

    async def update_and_lose(update):
        await update_weights(update)
        await replica.stop()
        replica._update = None

    replica.update_weights = update_and_lose
""",
        [],
        "16 of 16 completions were sampled under policy version -1, not 1",
    ),
}

DAMAGED_JOB = """
import os, sys, time
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
prepare_environment()
from torchtitan.experiments.rl.unified.controller import meshes as mesh
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
prepare_environment()
from torchtitan.experiments.rl.unified.controller import trainer_mesh as trainer
from torchtitan.experiments.rl.unified.simple_rl_multiprocess import main

MESHES = []
start, send_weights = mesh.Meshes.__aenter__, trainer.TrainerMesh.send_weights

async def remember(self):
    MESHES.append(self)
    return await start(self)

async def send_and_damage(self):
    update = await send_weights(self)
    if update.version == 1:
        damage(update)
        print("damaged", time.monotonic(), flush=True)
    return update

mesh.Meshes.__aenter__, trainer.TrainerMesh.send_weights = remember, send_and_damage
status = main(sys.argv[1:])
print("ended", time.monotonic(), flush=True)
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
def test_weights_that_are_not_the_trainers_stop_the_job(kind, tmp_path):
    """Proves that a damaged or shortened transfer and an engine on the checkpoint's weights end a job, named."""
    damage, flags, complaint = DAMAGES[kind]
    command = [sys.executable, "-c", damage + DAMAGED_JOB, "--job.dump_folder", tmp_path / "run", *FLAGS, *flags]
    done = subprocess.run(
        [*map(str, command), "--training.steps", "4"], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 1, done.stderr
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert complaint in error
    damaged, ended = (float(re.search(rf"{word} ([\d.]+)", done.stdout)[1]) for word in ("damaged", "ended"))
    assert ended - damaged <= LIMIT_SECONDS
    assert [step["step"] for step in metrics(tmp_path / "run")] == [1]


@pytest.mark.slow
def test_a_killed_controller_leaves_nothing_behind(tmp_path):
    """Proves it where it is hardest: a tensor parallel engine has processes and shared memory of its own."""
    before = set(os.listdir("/dev/shm"))
    command = [sys.executable, simple_rl_multiprocess.__file__, "--job.dump_folder", str(tmp_path / "run"), *FLAGS]
    command += ["--parallelism.data_parallel_replicate_degree", "1", "--parallelism.tensor_parallel_degree", "2"]
    command += ["--generator.tensor_parallel_degree", "2", "--training.steps", "1000"]
    mark = f"FAULT_TEST={tmp_path}"
    temporary = tempfile.mkdtemp()
    environment = {**os.environ, "FAULT_TEST": str(tmp_path), "TMPDIR": temporary}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment) as job:
        wait_for(lambda: has_stepped(tmp_path / "run"), 240, "the first step")
        assert len(marked(mark)) >= 5  # controller, trainer, generator, two workers
        job.send_signal(signal.SIGKILL)
    wait_for(lambda: not marked(mark), 20, "the processes of the job to end")
    wait_for(lambda: set(os.listdir("/dev/shm")) <= before, 20, "shared memory to be freed")
    wait_for(lambda: not os.listdir(temporary), 20, "temporary files to go")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_job_in_good_order(number, tmp_path):
    """Proves that an interrupted job ends in seconds, with its record whole, and that no other job gets its folder."""
    command = [sys.executable, simple_rl_multiprocess.__file__, "--job.dump_folder", str(tmp_path / "run"), *FLAGS]
    mark = f"FAULT_TEST={tmp_path}"
    temporary = tempfile.mkdtemp()
    environment = {**os.environ, "FAULT_TEST": str(tmp_path), "TMPDIR": temporary}
    job = subprocess.Popen(
        [*command, "--training.steps", "1000"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # A job in a shell's background ignores it.
    )
    with job:
        wait_for(lambda: has_stepped(tmp_path / "run"), 240, "the first step")
        if number == signal.SIGTERM:
            second = subprocess.run([*command, "--dry_run"], capture_output=True, text=True, timeout=120)
            assert second.returncode == 1
            assert f"error: {tmp_path}/run is in use by process {job.pid} on {socket.gethostname()}: " in second.stderr
            os.kill(job.pid, number)  # As a container's end does it; Ctrl-C reaches all processes of a terminal.
        else:
            os.killpg(job.pid, number)
        _, errors = job.communicate(timeout=60)
    assert job.returncode == 128 + number and "Traceback" not in errors
    assert errors.strip().endswith("interrupted" if number == signal.SIGINT else "interrupted by SIGTERM")
    assert metrics(tmp_path / "run") and "interrupted" in (tmp_path / "run/report.html").read_text()
    wait_for(lambda: not marked(mark), 20, "the processes of the job to end")
    assert not os.listdir(temporary)


def has_stepped(folder: Path) -> bool:
    path = folder / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


def marked(mark: str) -> list[int]:
    """Live processes with `mark` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_text().split("\0"):
                found.append(int(entry.name))
        except OSError:  # It ended meanwhile.
            pass
    return found


def wait_for(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)
