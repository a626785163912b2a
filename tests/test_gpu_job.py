# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The RL job on a GPU that trainer and generator share."""

import contextlib
import json
import os
import socket
import subprocess
import sys

import pytest
from torchtitan.experiments.rl.unified.config.load import REPOSITORY, TRAIN_CONFIGS

COMMAND = REPOSITORY / "torchtitan/experiments/rl/unified/simple_rl_multiprocess.py"
BFLOAT16 = [f"--{key}=bfloat16" for key in ("generator.dtype", "training.dtype", "training.mixed_precision_param")]
WORKER = "from monarch.actor import run_worker_loop_forever as run; run(ca='trust_all_connections', address='{}')"


def run(folder, steps: int, *flags) -> None:
    """Runs a job; every one of its steps compared tokens, and found all equal."""
    command = [sys.executable, COMMAND, "--job.config_file", TRAIN_CONFIGS / "debug_cpu.toml"]
    command += ["--job.dump_folder", folder, "--parallelism.data_parallel_replicate_degree", 1]
    command += ["--training.steps", steps, *BFLOAT16, *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == steps
    assert all(record["tokens_compared"] > 0 and record["mismatched_tokens"] == 0 for record in records)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("mode, transport", [("unified", "vllm_ipc"), ("vllm_compat", "shared_memory")])
def test_fifty_steps_have_no_mismatch(tmp_path, mode, transport):
    """Proves that parity holds on a GPU over weight updates, through the processes and the transports of a job."""
    run(tmp_path / "run", 50, "--rl.mode", mode, "--weight_sync.transport", transport)


@pytest.mark.gpu
@pytest.mark.slow
def test_two_trainer_hosts_and_a_generator_host_speak_nccl(tmp_path):
    """Proves FSDP on GPUs and vLLM's NCCL engine in a job. NCCL wants a GPU a process: it is told of three hosts."""
    with contextlib.ExitStack() as stack:
        workers = []
        for host in ("trainer0", "trainer1", "generator"):
            with socket.create_server(("127.0.0.1", 0)) as free:
                workers.append(f"tcp://127.0.0.1:{free.getsockname()[1]}")
            environment = os.environ | {"NCCL_HOSTID": host}
            process = subprocess.Popen([sys.executable, "-c", WORKER.format(workers[-1])], env=environment)
            stack.callback(process.kill)
        flags = ["--cluster.address", "tcp://127.0.0.1:0", "--cluster.generators", workers[2]]
        flags += ["--cluster.trainer", *workers[:2], "--parallelism.data_parallel_shard_degree", 2]
        run(tmp_path / "run", 10, "--weight_sync.transport", "vllm_nccl", *flags)
