# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What the policy's trainer costs beside torchtitan's own, and what packing saves, measured in turn.

    python scripts/benchmark_trainer.py [--rounds 3] [--dim 256] [--layers 4]

One process, one rank, parity off on both sides: stock ops. (a) An RLTrainer step (policy loss) against torchtitan's
Trainer (plain cross-entropy) on the same packed tokens. (b) RLTrainer on packed sequences against the same sequences
padded to the longest of their microbatch, at equal token budgets; lengths as GSM8K's: prompts of 50-200 tokens,
completions of 20-300. Prints tokens per second (median of the rounds, sampled and prompt tokens, padding not counted)
and the ratios.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import patch

import torch
from random_checkpoint import write_random_checkpoint
from torch.nn import functional
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
from torchtitan.experiments.rl.unified.config.load import JobConfig, load_job_config
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.messages import Request, Trajectory
from torchtitan.experiments.rl.unified.trainer.packing import assign_microbatches, Microbatch, pack
from torchtitan.models.attention import VarlenMetadata

SEQUENCES, MICROBATCH_TOKENS = 64, 8192


def job(folder: Path, dim: int, layers: int) -> JobConfig:
    flags = ["--parity.check", "off", "--training.seq_len", "512", "--sampling.max_tokens", "300"]
    flags += ["--parallelism.data_parallel_replicate_degree", "1", "--metrics.no-enable_tensorboard"]
    flags += ["--rl.microbatch_tokens", str(MICROBATCH_TOKENS), "--training.steps", "100000"]
    config = load_job_config([*flags, "--job.dump_folder", str(folder / "out")])
    shape = {"dim": dim, "n_layers": layers, "n_heads": dim // 64, "n_kv_heads": dim // 128, "head_dim": 64}
    write_random_checkpoint(folder / "model", {**shape, "hidden_dim": 3 * dim, "max_seq_len": 1024})
    config.model.hf_assets_path = str(folder / "model")
    return config


def sequences() -> list[Trajectory]:
    """Random tokens, GSM8K's lengths."""
    generator = torch.Generator().manual_seed(0)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(3, 512, (length,), generator=generator).tolist()

    made = []
    for i in range(SEQUENCES):
        completion = tokens(20, 300)
        logprobs = torch.full((len(completion),), -6.0)
        made.append(Trajectory(Request(str(i), 0, tokens(50, 200), 0), completion, logprobs, 0, "stop", ""))
    return made


def padded_plan(trajectories: list[Trajectory], ranks: int, token_budget: int) -> list[list[list[int]]]:
    """As packing.plan, of one rank: sequences in order, whose size with padding stays in the budget."""
    lengths = [len(t.request.prompt_ids) + len(t.completion_ids) - 1 for t in trajectories]
    microbatches: list[list[int]] = [[]]
    for index in range(len(lengths)):
        widened = [*microbatches[-1], index]
        if max(lengths[i] for i in widened) * len(widened) > token_budget:
            microbatches.append([index])
        else:
            microbatches[-1] = widened
    return [microbatches]


def padded_pack(trajectories: list[Trajectory], advantages: torch.Tensor, indices: list[int]) -> Microbatch:
    """As packing.pack, with every sequence filled up to the longest; what is filled in is trained on by nobody."""
    microbatch = pack(trajectories, advantages, indices)
    lengths = microbatch.cu_seqlens.diff().tolist()
    longest = max(lengths)
    filled = {}
    for field in fields(microbatch):
        value = getattr(microbatch, field.name)
        if isinstance(value, torch.Tensor) and value.shape == (1, sum(lengths)):
            with_what = IGNORE_INDEX if field.name == "labels" else 0
            rows = [functional.pad(row, (0, longest - len(row)), value=with_what) for row in value[0].split(lengths)]
            filled[field.name] = torch.cat(rows)[None]
    filled["positions"] = torch.arange(longest).repeat(len(lengths))[None]
    bounds = torch.arange(len(lengths) + 1, dtype=torch.int32) * longest
    return replace(microbatch, **filled, cu_seqlens=bounds)


def plain_trainer(config: JobConfig):
    """torchtitan's Trainer on the same TrainSpec; told where the sequences lie, it need not look for EOS tokens."""
    from torchtitan.train import Trainer

    class PlainTrainer(Trainer):
        def post_dataloading_process(self, input_dict, labels):
            lengths = input_dict["cu_seqlens"].diff()
            longest = int(lengths.max())
            metadata = VarlenMetadata(input_dict["cu_seqlens"], input_dict["cu_seqlens"], longest, longest)
            return input_dict["input"], labels, {"positions": input_dict["positions"]}, {"attention_masks": metadata}

    return PlainTrainer(config)


def plain_step(trainer, microbatches: list[Microbatch]) -> None:
    """One step of torchtitan's Trainer: its cross-entropy on the same tokens and labels."""
    trainer.step += 1
    trainer.gradient_accumulation_steps = len(microbatches)
    batches = [
        ({"input": m.tokens, "positions": m.positions, "cu_seqlens": m.cu_seqlens}, m.labels) for m in microbatches
    ]
    trainer.train_step(trainer.batch_generator(batches))


def in_turn(steps: dict[str, Callable[[], None]], tokens: int, rounds: int) -> dict[str, float]:
    """Median tokens per second of each; the first round warms up."""
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                rates[name].append(tokens / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dim", type=int, default=256, help="model width, a multiple of 128")
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    prepare_environment()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    this_device().prepare_trainer()
    from torchtitan.experiments.rl.unified.trainer import trainer as trainer_module

    with tempfile.TemporaryDirectory() as folder:
        config = job(Path(folder), args.dim, args.layers)
        trainer = trainer_module.RLTrainer(config)
        trainer.load()
        # The same spec: RLTrainer has registered it, with StockAttention in both as parity is off.
        torch.distributed.destroy_process_group()
        config.model.name = trainer.job_config.model.name
        plain = plain_trainer(config)
        trajectories, advantages = sequences(), torch.linspace(-1, 1, SEQUENCES)
        packed = [
            pack(trajectories, advantages, indices)
            for indices in assign_microbatches(trajectories, 1, MICROBATCH_TOKENS)[0]
        ]
        tokens = sum(microbatch.tokens.numel() for microbatch in packed)

        def padded_step() -> None:
            with patch.multiple(trainer_module, assign_microbatches=padded_plan, pack=padded_pack):
                trainer.step_on(trajectories, advantages)

        steps = {
            "RLTrainer, packed": lambda: trainer.step_on(trajectories, advantages),
            "torchtitan's Trainer, packed": lambda: plain_step(plain, packed),
            "RLTrainer, padded": padded_step,
        }
        rates = in_turn(steps, tokens, args.rounds)
    for name, rate in rates.items():
        print(f"{name:30} {rate:8.0f} tokens/s")
    ours, plain_rate, padded_rate = rates.values()
    print(f"RLTrainer over torchtitan's Trainer {ours / plain_rate:.2f}, packing over padding {ours / padded_rate:.2f}")


if __name__ == "__main__":
    main()
