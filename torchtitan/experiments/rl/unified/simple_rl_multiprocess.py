# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The RL job: `python simple_rl_multiprocess.py [--dry_run] [--job.config_file X.toml] [--section.key value ...]`.

Sample a group of completions for each prompt, reward them, take one optimizer step on their group-relative
advantages, send the new weights to the generators, and again. The trainer is a mesh of Monarch actors over torchtitan's
Trainer, the generators are actors over vLLM's engine. Two loops, `generate` and `train`, meet in a TrajectoryQueue.
"""

import asyncio
import sys
from contextlib import closing

from torchtitan.experiments.rl.unified.config.environment import honour_environment, prepare_environment
from torchtitan.experiments.rl.unified.config.load import load_job_config, TRAIN_CONFIGS
from torchtitan.experiments.rl.unified.errors import (
    CheckpointError,
    NonFiniteError,
    ParityError,
    ProcessLost,
    TrainerFailed,
    WeightTransferError,
)

# What a user is told in one line.
FAILURES = (
    ValueError,
    CheckpointError,
    NonFiniteError,
    ParityError,
    ProcessLost,
    TrainerFailed,
    WeightTransferError,
)


def run(args: list[str]) -> str:
    """Checks the job that `args` describe and runs it; returns its summary (what it would take if --dry_run)."""
    from torchtitan.experiments.rl.unified.devices import this_device

    device, words = this_device(), [arg for arg in args if arg != "--dry_run"]
    if not any(word.startswith("--job.config") for word in words):
        words = ["--job.config_file", str(TRAIN_CONFIGS / device.default_config), *words]
    config = load_job_config(words)
    honour_environment(config, on_gpu=not device.in_host_memory)
    from torchtitan.experiments.rl.unified.controller.run import run_job
    from torchtitan.experiments.rl.unified.preflight import check

    with closing(check(config)) as job:
        if "--dry_run" in args:
            return job.estimate.text()
        for warning in job.estimate.warnings():
            print(f"warning: {warning}", file=sys.stderr)
        return asyncio.run(run_job(config, job.task, job.evaluation))


def main(args: list[str]) -> int:
    """Exit status: 0 after the last step, 1 for a job that cannot run or that failed, 130 after Ctrl-C."""
    prepare_environment()
    try:
        print(run(args))
    except FAILURES as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
