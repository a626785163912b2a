# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Checks a step of a run that is over: does its checkpoint still give the log-probs that were recorded, bit for bit?

    python scripts/replay.py outputs/debug_cpu               lists the steps that can be replayed
    python scripts/replay.py outputs/debug_cpu --step 21     the trainer computes the step's log-probs again
    python scripts/replay.py outputs/debug_cpu --step 21 --generate    and the generator samples its tokens again
    python scripts/replay.py --parity outputs/debug_cpu/parity_step_7.pt    which operation differs? after a ParityError

A run with `[checkpoint] enable` records the steps that a checkpoint (or the initial weights) sampled, and a digest of
every entry of each checkpoint. Exit status: 0 if every token is equal and no entry has changed, 1 if not (it says which
tokens, which tensors) or if the step cannot be replayed.

--parity samples the step's tokens again and computes their log-probs again, each in a process of its own, and holds the
outputs of modules and operations against each other, token by token. With exit status 1 it names the first that
differs; 0: nothing differs here and now.
"""

import argparse
import contextlib
import copy
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from parity_trace import first_difference, Recorder, Trace
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
from torchtitan.experiments.rl.unified.config.load import JobConfig, load_job_config, write_toml
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.devices.mode import batch_invariant_mode
from torchtitan.experiments.rl.unified.families import model_of_checkpoint
from torchtitan.experiments.rl.unified.messages import ParityReport, Request, Trajectory
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


def explain(path: Path) -> int:
    """Names the first operation whose output differs between trainer and generator; exit status."""
    from parity_pair import EngineProcess, ONE_RANK, Pair

    left = torch.load(path, weights_only=True)
    trajectories = [
        Trajectory(**{**values, "request": Request(**values["request"])}) for values in left["trajectories"]
    ]
    version = max(trajectories[i].policy_version for i in left["compared"])
    config = config_of(path.parent)
    if config.parallelism.tensor_parallel_degree > 1 or config.generator.tensor_parallel_degree > 1:
        raise ValueError("--parity takes a run whose tensor parallel degrees are 1")
    replay = ReplayFolder(config)
    saved = max(v for v in replay.checkpoints() if v <= version)
    print(f"step {left['step']}: {left['first']}")
    print(f"weights: {replay.checkpoint(saved)}, ", end="")
    print("those that sampled the tokens" if saved == version else f"policy version {saved}; {version} is not saved")
    if (here := this_device().arithmetic()) != left["arithmetic"]:
        print(f"arithmetic: {here}; it was {left['arithmetic']}")

    # What one call of the engine sampled; the microbatch's place in it.
    asked = [i for i, trajectory in enumerate(trajectories) if trajectory.policy_version == version]
    places = [asked.index(i) for i in left["compared"] if i in asked]
    os.environ |= ONE_RANK
    this_device().prepare_trainer()
    with tempfile.TemporaryDirectory() as folder:
        config = replay_config(config, replay, saved)
        config.generator.cuda_graphs, config.weight_sync.transport = False, "shared_memory"
        config.job.dump_folder = folder
        write_toml(config, Path(folder) / "replay.toml")
        pair = Pair(["--job.config_file", f"{folder}/replay.toml"], EngineProcess())
        requests = [trajectories[i].request for i in asked]
        sampled, generator = pair.engine.ask("generate_recorded", requests)
        again = sum(new.completion_ids == trajectories[i].completion_ids for i, new in zip(asked, sampled, strict=True))
        print(f"sampled again: {again} of {len(asked)} completions have the recorded tokens")
        trainer, report = trace_of_trainer(pair, sampled, places)
        counterpart = counterparts(config, pair.trainer)
        pair.close()
    print(f"log-probs: {report.mismatched_tokens} of {report.tokens_compared} tokens differ")
    difference, token = first_difference(trainer, generator, counterpart)
    where = f"; first at prompt {requests[token[0]].uid!r}, position {token[1]}" if token else ""
    print(f"first that differs: {difference}{where}" if token else f"{difference}")
    return int(bool(token or report.mismatched_tokens))


def trace_of_trainer(pair, trajectories: list[Trajectory], indices: list[int]) -> tuple[Trace, ParityReport]:
    """What the trainer computes for the trajectories at `indices` in one microbatch."""
    packed = pack(trajectories, torch.zeros(len(trajectories)), indices).to(pair.trainer.device)
    recorder = Recorder(pair.trainer.model_parts[0])
    lengths = packed.cu_seqlens.diff().tolist()
    recorder.rows = [(i, at) for i, length in zip(indices, lengths, strict=True) for at in range(length)]
    with torch.no_grad(), batch_invariant_mode(), recorder:
        logprobs = pair.trainer.logprobs(packed).cpu()
    sampled = torch.cat([trajectories[i].logprobs for i in indices])
    return recorder.trace, compare(sampled, logprobs, lambda token: f"token {token}")


def counterparts(config: JobConfig, trainer) -> Callable[[str], str]:
    """What the generator calls a module of the trainer's: the same, or in VLLM_COMPAT as Hugging Face does."""
    if config.rl.mode == "unified":
        return lambda module: f"model.{module}" if module else module
    model = model_of_checkpoint(config.model.hf_assets_path, config.model.name, config.model.flavor)
    adapter = model.train_spec().state_dict_adapter(model.args, None)
    names = {}
    for name, weight in trainer.model_parts[0].state_dict().items():
        for found in adapter.to_hf({name: weight}):
            names[name.rpartition(".")[0]] = found.rpartition(".")[0]
            # Its attention has no weights.
            layer, dot, _ = found.partition(".self_attn.")
            names[name.rpartition(".attention.")[0] + ".attention.inner_attention"] = f"{layer}.self_attn.attn"
    return lambda module: names.get(module, "no such module")


def config_of(folder: Path) -> JobConfig:
    """Of the run in `folder`."""
    if not (folder / "config.toml").exists():
        raise ValueError(f"{folder} holds no config.toml: give the folder of a run")
    config = load_job_config(["--job.config_file", str(folder / "config.toml")])
    config.job.dump_folder = str(folder)
    return config


def run(folder: Path, step: int | None, generate: bool) -> int:
    """Exit status."""
    config = config_of(folder)
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
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("run", type=Path, nargs="?", help="folder of a run")
    which.add_argument("--parity", type=Path, metavar="FILE", help="parity_step_N.pt that a ParityError left")
    parser.add_argument("--step", type=int, help="step to check; without it those that can be are listed")
    parser.add_argument("--generate", action="store_true", help="the generator samples the step again, too")
    args = parser.parse_args()
    prepare_environment()
    try:
        return explain(args.parity) if args.parity else run(args.run, args.step, args.generate)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
