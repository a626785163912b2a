# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The RL job on a GPU that trainer and generator share."""

import json
import subprocess
import sys

import pytest
from torchtitan.experiments.rl.unified.job_config import REPOSITORY, TRAIN_CONFIGS

COMMAND = REPOSITORY / "torchtitan/experiments/rl/unified/simple_rl_multiprocess.py"
BFLOAT16 = [f"--{key}=bfloat16" for key in ("generator.dtype", "training.dtype", "training.mixed_precision_param")]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("mode, transport", [("unified", "vllm_ipc"), ("vllm_compat", "shared_memory")])
def test_fifty_steps_have_no_mismatch(tmp_path, mode, transport):
    """Proves that parity holds on a GPU over weight updates, through the processes and the transports of a job."""
    flags = ["--job.config_file", TRAIN_CONFIGS / "debug_cpu.toml", "--job.dump_folder", tmp_path / "run"]
    flags += [
        "--weight_sync.transport",
        transport,
        "--rl.mode",
        mode,
        "--training.steps",
        50,
        "--parallelism.data_parallel_replicate_degree",
        1,
        *BFLOAT16,
    ]
    command = [sys.executable, COMMAND, *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 50
    assert all(step["tokens_compared"] > 0 and step["mismatched_tokens"] == 0 for step in steps)
