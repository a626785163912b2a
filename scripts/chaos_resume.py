# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Signal a process of the job at a random moment, start the job again, compare with a run that was left alone.

    python scripts/chaos_resume.py --trials 20 [--signals KILL,TERM,HUP,STOP] [--steps 6] [--seed 0] [--jobs 1]
        [job flags]

A trial is a fresh folder in which a process of the job (controller, trainer rank, generator) gets a signal while the
job starts, generates, trains, sends weights or writes a checkpoint; one that is stopped goes on up to 20 s later. If
the job ends before its last step, the same command starts it again, until it has taken it. Then the last checkpoint
(weights, optimizer, schedule, position) and metrics.jsonl (times apart) must equal the undisturbed run's, bit for bit.
Exit status 1 if one trial differs or hangs.

Where a phase lies in a step is taken from the undisturbed run's times; a checkpoint that is being written is seen on
disk. So on a busy machine a kill that aimed at one phase may hit its neighbour; what is compared does not depend on it.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torchtitan.experiments.rl.unified import simple_rl_multiprocess
from torchtitan.experiments.rl.unified.dcp import load_everything

PHASES = ("start", "generate", "train", "sync", "save")
VICTIMS = ("generator", "trainer", "controller")
# Metrics that measure this machine, not the policy.
TIMES = ("second", "busy", "memory", "restart")
MARK = "RL_CHAOS_RUN"
ORPHAN_LIMIT_SECONDS = 20.0
LONGEST_STOP_SECONDS = 20.0
SMALL = [
    "--rl.prompts_per_step=4",
    "--rl.group_size=4",
    "--evaluation.problems=4",
    "--metrics.no-enable_tensorboard",
    "--checkpoint.enable",
    "--checkpoint.interval=2",
    "--checkpoint.no-last_save_model_only",
]


class TrialFailed(RuntimeError):
    """The job hung, did not recover, or ended with other bits."""


class NothingKilled(Exception):
    """The job was over, or the victim between two lives, when the moment came."""


@dataclass(frozen=True)
class Kill:
    """What a trial kills, and when.

    Attributes:
        victim: one of VICTIMS.
        phase: one of PHASES.
        step: the step in which the phase lies.
        fraction: where in the phase, 0 to 1.
        signal: what the victim gets.
    """

    victim: str
    phase: str
    step: int
    fraction: float
    signal: str


class Job:
    """The job's command, started in a folder; every process that it starts carries a mark of its own.

    Args:
        folder: `[job] dump_folder`.
        flags: of the job.
        limit: longest wait for anything, in seconds.
    """

    def __init__(self, folder: Path, flags: list[str], limit: float) -> None:
        self.folder, self.limit = folder, limit
        self.mark = uuid.uuid4().hex
        command = [sys.executable, simple_rl_multiprocess.__file__, f"--job.dump_folder={folder}", *flags]
        self.log = open(folder.with_suffix(".log"), "a")
        environment = {**os.environ, MARK: self.mark}
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment)

    def processes(self) -> dict[int, str]:
        """pid -> "controller", "generator-0", "trainer-1", "generator-0 child" ... of the live ones."""
        named: dict[int, str] = {}
        parents: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                variables = dict(
                    item.split("=", 1)
                    for item in (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                    if "=" in item
                )
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:  # It has just ended, or is not ours to read.
                continue
            if variables.get(MARK) == self.mark and state != "Z":
                # Monarch tells its processes their names in the environment; their children inherit it.
                named[int(entry.name)] = variables.get("HYPERACTOR_PROCESS_NAME", "controller").split(" ")[0]
                parents[int(entry.name)] = int(parent)
        return {
            pid: name if named.get(parents[pid]) != name or pid == self.process.pid else f"{name} child"
            for pid, name in named.items()
        }

    def steps(self) -> int:
        """Steps on record."""
        path = self.folder / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def writing(self) -> bool:
        """A checkpoint is being written."""
        return any(not (path / ".metadata").exists() for path in self.folder.glob("checkpoint/step-*"))

    def wait_until(self, ready: Callable[[], bool], what: str) -> bool:
        """False if the job ended before `ready`.

        Raises:
            TrialFailed: neither came within the limit.
        """
        deadline = time.monotonic() + self.limit
        while not ready():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise TrialFailed(f"waited {self.limit:.0f} s for {what}")
            time.sleep(0.002)
        return True

    def wait(self) -> int:
        """The exit status."""
        self.wait_until(lambda: self.process.poll() is not None, "the job to end or stop")
        return self.process.returncode

    def orphans(self) -> list[str]:
        """Names of the processes that are left ORPHAN_LIMIT_SECONDS after the job ended; empty as soon as none is."""
        deadline = time.monotonic() + ORPHAN_LIMIT_SECONDS
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return sorted(left.values())

    def end(self) -> None:
        """Kills what is left of it."""
        for pid in self.processes():
            _send(pid, "KILL")
        self.process.wait()
        self.log.close()


def plan(trials: int, steps: int, seed: int, signals: Sequence[str] = ("KILL",)) -> list[Kill]:
    """Random moments, spread: every victim in each three trials, every phase in each five, the signals in turn."""
    chance = random.Random(seed)
    victims = [victim for _ in range(trials) for victim in chance.sample(VICTIMS, len(VICTIMS))]
    phases = [phase for _ in range(trials) for phase in chance.sample(PHASES, len(PHASES))]
    return [
        # Checkpoints are written after every second step.
        Kill(
            victims[i], phase, 2 * chance.randint(1, steps // 2) if phase == "save" else chance.randint(1, steps), at, s
        )
        for i, phase, at, s in ((i, phases[i], chance.random(), signals[i % len(signals)]) for i in range(trials))
    ]


def disturb(job: Job, kill: Kill, times: list[dict[str, float]]) -> str:
    """Waits for the moment and kills; says what was killed and where the run stood.

    Raises:
        NothingKilled: the moment found no victim.
    """
    start = time.monotonic()
    if kill.phase == "start":
        # The job's processes exist, and load, for about this long.
        job.wait_until(lambda: any("trainer" in name for name in job.processes().values()), "the job's processes")
        delay = kill.fraction * times[0]["start"]
    elif kill.phase == "save":
        job.wait_until(lambda: job.steps() >= kill.step, f"step {kill.step}")
        job.wait_until(lambda: job.writing() or job.steps() > kill.step, "a checkpoint to be written")
        delay = kill.fraction * 0.02
    else:
        job.wait_until(lambda: job.steps() >= kill.step - 1 and bool(job.processes()), f"step {kill.step - 1}")
        step = times[kill.step]
        if kill.step == 1:  # No line stands before it: its first phase begins when the metrics file is made.
            job.wait_until(lambda: (job.folder / "metrics.jsonl").exists(), "the loop to begin")
        before = sum(step[phase] for phase in ("generate", "train", "sync")[: PHASES.index(kill.phase) - 1])
        delay = before + kill.fraction * step[kill.phase]
    time.sleep(delay)
    candidates = sorted((name, pid) for pid, name in job.processes().items() if name.startswith(kill.victim))
    steps, writing = job.steps(), job.writing()
    if job.process.poll() is not None or not candidates:
        raise NothingKilled
    name, pid = candidates[int(kill.fraction * len(candidates))]
    if kill.victim == "controller":  # Not a child of its own, such as a reward's process.
        name, pid = kill.victim, job.process.pid
    _send(pid, kill.signal)
    if kill.signal == "STOP":
        time.sleep(LONGEST_STOP_SECONDS * kill.fraction)
        _send(pid, "CONT")
    cut, seconds = ", a checkpoint half written" if writing else "", time.monotonic() - start
    return f"{name:12} SIG{kill.signal:4} {seconds:5.1f} s in, aimed at {kill.phase}, after step {steps}{cut}"


def run_to_the_end(
    folder: Path, flags: list[str], limit: float, kill: Kill | None = None, times: list[dict[str, float]] = ()
) -> str:
    """Starts the job, kills once, starts it again until it ends; returns a line about it.

    Raises:
        TrialFailed: it does not end well.
    """
    what, notes = "undisturbed", []
    for attempt in range(4):
        job = Job(folder, flags, limit)
        try:
            if kill and not attempt:
                what = disturb(job, kill, times)
            status = job.wait()
            if left := job.orphans():
                notes.append(f"left behind: {', '.join(left)}")
        finally:
            job.end()
        if status == 0:
            starts = f"{attempt + 1} starts" if attempt else "went on by itself" if kill else ""
            return "; ".join([f"{what}; {starts}" if starts else what, *notes])
        if kill is None:
            break
    raise TrialFailed(f"{what}; exit status {status}; see {folder.with_suffix('.log')}")


def kill_once(folder: Path, flags: list[str], limit: float, kill: Kill, times: list[dict[str, float]]) -> str:
    """`run_to_the_end` with a kill that found its victim: where it found none, in a new folder and earlier.

    Raises:
        TrialFailed: it does not end well, or no moment found the victim.
    """
    # Earlier in its phase too: the undisturbed run was the first, and may have been the slowest to start.
    for step, share in ((kill.step, 1.0), (max(kill.step - 2, 1), 0.5), (1, 0.1)):
        try:
            return run_to_the_end(folder, flags, limit, replace(kill, step=step, fraction=kill.fraction * share), times)
        except NothingKilled:
            shutil.rmtree(folder, ignore_errors=True)
    raise TrialFailed(f"no moment found a {kill.victim} to kill")


def differences(one: Path, other: Path, steps: int) -> list[str]:
    """What differs between two finished runs: names of tensors and values of the last checkpoint, or metrics."""
    a, b = (_flat(load_everything(folder / "checkpoint" / f"step-{steps}")) for folder in (one, other))
    different = sorted(a.keys() ^ b.keys())
    for name in a.keys() & b.keys():
        equal = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
        different += [] if equal else [name]
    c, d = (_metrics(folder / "metrics.jsonl") for folder in (one, other))
    if c != d:
        rows = [m["step"] for m, n in zip(c, d) if m != n]
        different.append(f"metrics.jsonl ({len(c)} and {len(d)} lines, different: {rows})")
    return different


def _send(pid: int, name: str) -> None:
    try:
        os.kill(pid, signal.Signals[f"SIG{name}"])
    except ProcessLookupError:  # It has just ended.
        pass


def _flat(value, name: str = "") -> dict:
    if isinstance(value, dict):
        return {leaf: item for key, inner in value.items() for leaf, item in _flat(inner, f"{name}.{key}").items()}
    return {name[1:]: value}


def _metrics(path: Path) -> list[dict]:
    # What was sampled ahead of a checkpoint can't be compared after a resume from it, and is counted as such.
    left_out = (*TIMES, "tokens_compared", "tokens_unverifiable")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not any(name in key for name in left_out)} for row in rows]


def _phase_times(folder: Path, seconds: float) -> list[dict[str, float]]:
    """[0] is the time before the first step; the rest, by step, are the seconds of its phases."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    phases = [{p: row.get(f"seconds_{p}", 0.0) for p in ("generate", "train", "sync")} for row in rows]
    # What is left of the whole time: starting, and ending, which is short.
    return [{"start": max(1.0, 0.8 * (seconds - sum(row["seconds"] for row in rows)))}, *phases]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--steps", type=int, default=6, help="training steps of a run; even")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--signals", default="KILL", help="names, in turn: KILL, TERM, HUP, INT, STOP")
    parser.add_argument("--jobs", type=int, default=1, help="trials at once")
    parser.add_argument("--limit", type=float, default=300, help="longest wait for one start of the job, in seconds")
    parser.add_argument("--folder", type=Path, help="keep the runs here (default: a temporary folder)")
    args, flags = parser.parse_known_args()
    flags = [*SMALL, f"--training.steps={args.steps}", *flags]
    if odd := set(args.signals.split(",")) - {"KILL", "TERM", "HUP", "INT", "STOP"}:
        parser.error(f"--signals has no {', '.join(map(repr, sorted(odd)))}")
    if args.trials < 1 or args.steps < 2 or args.steps % 2:
        parser.error("--trials must be at least 1, --steps an even number from 2")
    for number in (signal.SIGHUP, signal.SIGINT):
        if (
            signal.getsignal(number) == signal.SIG_IGN
        ):  # As nohup and scripts' backgrounds leave them to their children.
            signal.signal(number, signal.SIG_DFL)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    undisturbed = folder / "undisturbed"
    good = 0
    try:
        start = time.monotonic()
        run_to_the_end(undisturbed, flags, args.limit)
        times = _phase_times(undisturbed, time.monotonic() - start)

        def trial(number: int, kill: Kill) -> bool:
            run = folder / f"trial-{number}"
            try:
                what = kill_once(run, flags, args.limit, kill, times)
                different = differences(undisturbed, run, args.steps)
            except TrialFailed as error:
                what, different = str(error), ["the job"]
            verdict = "equal" if not different else f"DIFFERENT: {', '.join(different[:3])} ({len(different)} in all)"
            print(f"trial {number:2}: {what}; {verdict}", flush=True)
            return not different

        kills = plan(args.trials, args.steps, args.seed, args.signals.split(","))
        with ThreadPoolExecutor(args.jobs) as pool:
            good = sum(pool.map(trial, range(1, args.trials + 1), kills))
    except TrialFailed as error:
        print(f"error: the undisturbed run failed: {error}", file=sys.stderr)
        return 1
    finally:
        if not args.folder and good == args.trials:
            shutil.rmtree(folder)
        else:
            print(f"the runs and their logs are in {folder}")
    print(f"{good} of {args.trials} trials ended as the undisturbed run did")
    return 0 if good == args.trials else 1


if __name__ == "__main__":
    sys.exit(main())
