# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Checks a step of a run that is over: does its checkpoint still give the log-probs that were recorded, bit for bit?

    python scripts/replay.py outputs/debug_cpu               lists the steps that can be replayed
    python scripts/replay.py outputs/debug_cpu --step 21     the trainer computes the step's log-probs again
    python scripts/replay.py outputs/debug_cpu --step 21 --generate    and the generator samples its tokens again

A run with `[checkpoint] enable` records the steps that a checkpoint (or the initial weights) sampled, and a digest of
every entry of each checkpoint. Exit status: 0 if every token is equal and no entry has changed, 1 if not (it says which
tokens, which tensors) or if the step cannot be replayed.
"""

import argparse
import contextlib
import copy
import os
import sys
from pathlib import Path

import torch
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
from torchtitan.experiments.rl.unified.config.load import JobConfig, load_job_config
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.devices.mode import batch_invariant_mode
from torchtitan.experiments.rl.unified.messages import ParityReport, Trajectory
from torchtitan.experiments.rl.unified.record.replay import ReplayFolder
from torchtitan.experiments.rl.unified.trainer.packing import assign_microbatches, pack
from torchtitan.experiments.rl.unified.trainer.parity import compare

LISTED = 10


def replay_config(config: JobConfig, replay: ReplayFolder, version: int) -> JobConfig:
    """The job's config, changed to load policy version `version` into one data-parallel rank and to write nothing.

    A data-parallel rank computes what all of them do. With mixed precision under FSDP the ranks compute with weights
    cast to `mixed_precision_param`; here they are loaded as that.
    """
    config = copy.deepcopy(config)
    config.parallelism.data_parallel_replicate_degree = config.parallelism.data_parallel_shard_degree = 1
    config.training.dtype = config.training.mixed_precision_param
    config.metrics.enable_tensorboard = config.metrics.enable_wandb = False
    config.policy_loss.kl_weight = 0.0  # No reference policy.
    # To the trainer it is a new run that begins with this checkpoint's weights: it leaves the folder alone.
    config.checkpoint.enable, config.checkpoint.initial_load_model_only = False, True
    config.checkpoint.initial_load_path = str(replay.checkpoint(version))
    return config


def recompute(trainer, config: JobConfig, trajectories: list[Trajectory]) -> list[torch.Tensor]:
    """The trainer's log-probs of each trajectory's sampled tokens, fp32."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(trajectories)
    arithmetic = contextlib.nullcontext() if config.parity.check == "off" else batch_invariant_mode()
    with torch.no_grad(), arithmetic:
        for indices in assign_microbatches(trajectories, 1, config.rl.microbatch_tokens)[0]:
            microbatch = pack(trajectories, torch.zeros(len(trajectories)), indices)
            logprobs = trainer.logprobs(microbatch.to(trainer.device)).cpu()
            lengths = [len(trajectories[i].completion_ids) for i in indices]
            for i, part in zip(indices, logprobs.split(lengths), strict=True):
                found[i] = part
    return found


def compare_all(trajectories: list[Trajectory], found: list[torch.Tensor], who: str) -> ParityReport:
    """Compares by bits and prints where they differ."""
    total = ParityReport()
    for trajectory, logprobs in zip(trajectories, found, strict=True):
        request = trajectory.request
        report = compare(
            trajectory.logprobs,
            logprobs,
            lambda token: f"prompt {request.uid!r} sample {request.sample}, "
            f"position {len(request.prompt_ids) + token} (recorded as the generator's)",
        )
        if report.mismatched_tokens and total.mismatched_tokens < LISTED:
            print(f"  {report.mismatched_tokens} of {report.tokens_compared} tokens differ, first at {report.first}")
        total += report
    equal = total.tokens_compared - total.mismatched_tokens
    print(f"{who}: {equal} of {total.tokens_compared} tokens equal")
    return total


def sample_again(trainer, config: JobConfig, version: int, trajectories: list[Trajectory]) -> list[torch.Tensor]:
    """Samples the recorded requests with the trainer's weights; a completion of other tokens gives NaN log-probs."""
    from torchtitan.experiments.rl.unified.generator.generator import Generator
    from torchtitan.experiments.rl.unified.weights.transports import build_transport

    generator = Generator(config)
    config.weight_sync.transport = "shared_memory"  # Both ends are this process.
    with contextlib.closing(build_transport(config)) as transport:
        weights = trainer.policy_weights(getattr(torch, config.generator.dtype))
        generator.update_weights(transport.send(version, weights))
        sampled = generator.generate([trajectory.request for trajectory in trajectories])
    return [
        new.logprobs if new.completion_ids == old.completion_ids else torch.full_like(old.logprobs, torch.nan)
        for old, new in zip(trajectories, sampled, strict=True)
    ]


def check_version(
    config: JobConfig, replay: ReplayFolder, version: int, trajectories: list[Trajectory], generate: bool
) -> bool:
    """Checks one policy version's checkpoint and the tokens it sampled; returns whether nothing differs."""
    from torchtitan.experiments.rl.unified.trainer.trainer import RLTrainer

    changed = replay.differences(version)
    print(f"policy version {version}, {replay.checkpoint(version)}: ", end="")
    print(f"{len(changed)} entries differ from what the run recorded" if changed else "every entry as recorded")
    for name in changed:
        print(f"  {name}")
    config = replay_config(config, replay, version)
    try:
        trainer = RLTrainer(config)
        trainer.load()
    except Exception as error:
        raise ValueError(f"the checkpoint {replay.checkpoint(version)} cannot be loaded: {error}") from error
    report = compare_all(trajectories, recompute(trainer, config, trajectories), "trainer")
    if generate:
        report += compare_all(trajectories, sample_again(trainer, config, version, trajectories), "generator")
    trainer.close()
    return not changed and not report.mismatched_tokens


def run(folder: Path, step: int | None, generate: bool) -> int:
    """Exit status."""
    if not (folder / "config.toml").exists():
        raise ValueError(f"{folder} holds no config.toml: give the folder of a run")
    config = load_job_config(["--job.config_file", str(folder / "config.toml")])
    config.job.dump_folder = str(folder)
    replay = ReplayFolder(config)
    if step is None:
        print("steps that can be replayed:", ", ".join(map(str, replay.steps())) or "none")
        return 0
    trajectories = replay.trajectories(step)
    ranks = config.parallelism.tensor_parallel_degree
    if ranks > 1 and generate:
        raise ValueError("--generate takes a run whose tensor parallel degrees are 1")
    if ranks > 1 and "RANK" not in os.environ:
        # The order of a tensor parallel sum is part of the bits: as many ranks as the run had.
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *sys.argv]
        os.execv(sys.executable, [sys.executable, *command])
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", "0")
    if int(os.environ["RANK"]) > 0:
        sys.stdout = open(os.devnull, "w")
    this_device().prepare_trainer()
    print(f"step {step}: {len(trajectories)} completions")
    equal = True
    for version in sorted({t.policy_version for t in trajectories}):
        sampled = [t for t in trajectories if t.policy_version == version]
        equal &= check_version(config, replay, version, sampled, generate)
    print("equal" if equal else "NOT equal")
    return int(not equal)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--step", type=int, help="step to check; without it those that can be are listed")
    parser.add_argument("--generate", action="store_true", help="the generator samples the step again, too")
    args = parser.parse_args()
    prepare_environment()
    try:
        return run(args.run, args.step, args.generate)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
