# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""scripts/launch_slurm.sh with a stand-in for SLURM: its hosts are loopback addresses of this one."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
from torchtitan.experiments.rl.unified.config.load import REPOSITORY

HOSTS = ("127.0.0.1", "127.0.0.2")
# srun runs its command once for each host, told which one it is, and ends with them.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do [[ $1 == *=* ]] && shift || shift 2; done
for node in 0 1; do SLURM_NODEID=$node "$@" & done
trap 'kill $(jobs -p)' TERM
wait
"""
SCONTROL = '#!/bin/bash\n[[ $* == "show hostnames two" ]] && printf "%s\\n" ' + " ".join(HOSTS) + "\n"


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The environment of an allocation of two hosts."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "two",
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURMD_NODENAME": HOSTS[0],
        "RL_PORT": str(port),
    }


def launch(environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess:
    # sbatch runs a copy of the script.
    copy = Path(environment["PATH"].partition(":")[0]) / "slurm_script"
    copy.write_text((REPOSITORY / "scripts/launch_slurm.sh").read_text())
    return subprocess.run(["bash", copy, *flags], capture_output=True, text=True, timeout=300, env=environment)


def workers(port: str) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        found += [" ".join(words)] if any(word.endswith(f":{port}") for word in words) else []
    return found


@pytest.mark.slow
def test_a_job_runs_on_the_hosts_of_an_allocation_and_leaves_nothing_running(slurm, tmp_path):
    flags = ["--job.dump_folder", str(tmp_path / "run"), "--training.steps", "2", "--evaluation.interval", "0"]
    done = launch(slurm, *flags, "--parallelism.data_parallel_replicate_degree", "1")
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(step["mismatched_tokens"] == 0 < step["tokens_compared"] for step in steps)
    config = (tmp_path / "run" / "config.toml").read_text()
    assert all(f"tcp://{host}:{slurm['RL_PORT']}" in config for host in HOSTS)
    end = time.monotonic() + 20
    while (left := workers(slurm["RL_PORT"])) and time.monotonic() < end:
        time.sleep(0.2)
    assert left == []


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"SLURM_JOB_NODELIST": ""}, "this runs in a SLURM allocation"),
        ({"SLURM_SUBMIT_DIR": "/"}, "/ is not this repository"),
        ({"RL_TRAINER_HOSTS": "2"}, "of 2 hosts 2 cannot train"),
        ({"RL_TRAINER_HOSTS": "0"}, "of 2 hosts 0 cannot train"),
    ],
)
def test_what_is_missing_is_said_in_a_line(slurm, change, complaint):
    done = launch(slurm | change)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {complaint}") and done.stderr.count("\n") == 1
