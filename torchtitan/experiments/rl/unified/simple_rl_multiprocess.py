# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The RL job: `python simple_rl_multiprocess.py [--dry_run] [--job.config_file X.toml [--trust_code]] [--section.key
value ...]`.

Sample a group of completions for each prompt, reward them, take one optimizer step on their group-relative
advantages, send the new weights to the generators, and again. The trainer is a mesh of Monarch actors over torchtitan's
Trainer, the generators are actors over vLLM's engine. Two loops, `generate` and `train`, meet in a TrajectoryQueue.
"""

import asyncio
import signal
import sys
from contextlib import closing, suppress
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def config_alone() -> ModuleType:
    """config/command_line.py, of a package that has another name: importing torchtitan's loads torch, for seconds."""
    folder, name = Path(__file__).resolve().parent / "config", "torchtitan_rl_unified_config"
    if name not in sys.modules:
        spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return import_module(f"{name}.command_line")


def run(args: list[str], dry: bool) -> str:
    """Checks the job that `args` describe and runs it; returns its summary, or what it would take if `dry`."""
    from torchtitan.experiments.rl.unified.config.derived import on_many_hosts
    from torchtitan.experiments.rl.unified.config.environment import honour_environment
    from torchtitan.experiments.rl.unified.config.load import load_job_config, TRAIN_CONFIGS
    from torchtitan.experiments.rl.unified.devices import this_device
    from torchtitan.experiments.rl.unified.isolation import own_temporary_folder, stay_on_loopback

    device = this_device()
    if not any(word.startswith(("--job.config_file", "--job.config-file")) for word in args):
        args = ["--job.config_file", str(TRAIN_CONFIGS / device.default_config), *args]
    config = load_job_config(args)
    honour_environment(config, on_gpu=not device.in_host_memory)
    if not on_many_hosts(config):
        stay_on_loopback()
    from torchtitan.experiments.rl.unified.controller.run import run_job
    from torchtitan.experiments.rl.unified.controller.signals import ends_in_order
    from torchtitan.experiments.rl.unified.preflight import check
    from torchtitan.experiments.rl.unified.preflight.estimate import estimate_job

    if dry:
        estimate = ""
        with suppress(ValueError):  # Where that cannot be told, `check` says why.
            estimate = estimate_job(config).text()
        if estimate:
            print(estimate)
    with closing(check(config)) as job:
        for warning in job.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if dry:
            return f"{'a completion ends':<32}{job.completion_ends}"
        config_alone().drop_unread_streams()
        with own_temporary_folder(), ends_in_order(config.supervision.grace_seconds) as signals:
            try:
                return asyncio.run(run_job(config, job.task, job.evaluation))
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt(*signals[:1]) from error


def main(args: list[str]) -> int:
    """Exit status: 0 after the last step, 1 for a job that cannot run or that failed; of one that a signal ended
    (Ctrl-C is SIGINT) 128 and the signal's number."""
    words = [arg for arg in args if arg not in ("--dry_run", "--dry-run")]
    try:
        if {"--help", "-h"} & set(words):
            print(config_alone().help_text(__doc__))
            return 0
        config_alone().prepare_process()
        config_alone().check_arguments(words)
    except ValueError as error:
        return _failed(error)
    from torchtitan.experiments.rl.unified import errors
    from torchtitan.experiments.rl.unified.config.environment import prepare_environment

    prepare_environment()
    expected = (
        errors.ActorFailed,
        errors.CheckpointError,
        errors.NonFiniteError,
        errors.ParityError,
        errors.ProcessLost,
        errors.TrainerFailed,
        errors.WeightTransferError,
    )
    try:
        if said := run(words, dry=len(words) < len(args)):
            print(said)
    except (ValueError, OSError, *expected) as error:  # OSError: a full disk, a folder that has gone.
        return _failed(error)
    except KeyboardInterrupt as interrupt:
        number = signal.Signals(*interrupt.args or [signal.SIGINT])
        print("interrupted" if number == signal.SIGINT else f"interrupted by {number.name}", file=sys.stderr)
        return 128 + number
    return 0


def _failed(error: Exception) -> int:
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    config_alone().unbroken_streams()
    sys.exit(main(sys.argv[1:]))
