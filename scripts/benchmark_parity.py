# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What parity costs: generation and a training step, with the batch-invariant arithmetic on and off, in turn.

    python scripts/benchmark_parity.py [--dtype float32] [--rounds 5]
    python scripts/benchmark_parity.py --dtype bfloat16 --flavor 0.6B --requests 256 --profile      on a GPU

Generation: two engines of one random model in two processes that take turns, 32 requests, contexts up to 1,000
tokens; "off" is vLLM as it comes (its own attention and kernels). Training: one trainer; "off" is torch's stock ops
with its scaled_dot_product_attention on each sequence. Prints tokens per second (median, least and most of the rounds)
and the ratio of the medians.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from random_checkpoint import write_random_checkpoint
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
from torchtitan.experiments.rl.unified.config.load import JobConfig, load_job_config, TRAIN_CONFIGS
from torchtitan.experiments.rl.unified.families import policy_train_spec
from torchtitan.experiments.rl.unified.families.base import replace_inner_attention
from torchtitan.experiments.rl.unified.families.qwen3 import TINY
from torchtitan.experiments.rl.unified.messages import Request, Trajectory
from torchtitan.experiments.rl.unified.trainer.attention import PackedAttention, StockAttention

MODEL = {"dim": 512, "n_layers": 6, "n_heads": 8, "n_kv_heads": 4, "head_dim": 64, "hidden_dim": 1536}
PROMPT_TOKENS, SAMPLED_TOKENS = 900, 100


def job(folder: Path, args: argparse.Namespace, parity: str) -> JobConfig:
    settings = {
        "job.config_file": TRAIN_CONFIGS / "debug_cpu.toml",
        "job.dump_folder": folder / "out",
        "rl.mode": args.mode,
        "generator.dtype": args.dtype,
        "training.dtype": args.dtype,
        "training.mixed_precision_param": args.dtype,
        "parity.check": parity,
        "training.seq_len": 1024,
        "sampling.max_tokens": SAMPLED_TOKENS,
        "generator.kv_cache_gib": 16 if torch.cuda.is_available() else 1,
        "generator.max_num_seqs": 256,
        "parallelism.data_parallel_replicate_degree": 1,
    }
    config = load_job_config([str(word) for key, value in settings.items() for word in (f"--{key}", value)])
    model = MODEL
    if args.flavor:
        flavor = policy_train_spec("qwen3").model_args[args.flavor]
        model = {name: getattr(flavor, name) for name in TINY}
    write_random_checkpoint(folder / "model", {**model, "max_seq_len": 1024})
    config.model.hf_assets_path = str(folder / "model")
    return config


def requests(count: int) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    lengths = [PROMPT_TOKENS * (i + 1) // count for i in range(count)]
    prompts = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in lengths]
    return [Request(str(i), 0, prompt, seed=i) for i, prompt in enumerate(prompts)]


def profiled(what: str, work: Callable[[], object]) -> None:
    """Runs `work` once more and prints the kernels that took the GPU's time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    print(f"  {what}: {total / 1000:.0f} ms on the GPU, of that", file=sys.stderr)
    for event in events[:12]:
        milliseconds = event.self_device_time_total / 1000
        print(f"  {milliseconds:8.1f} ms {event.count:6} x {event.key[:100]}", file=sys.stderr, flush=True)


def generate_when_told(config: JobConfig, args: argparse.Namespace) -> None:
    """An engine's side: for each line on stdin, one batch; answers with its tokens per second."""
    from torchtitan.experiments.rl.unified.generator.generator import Generator

    generator = Generator(config)
    print("ready", flush=True)
    for _ in sys.stdin:
        generator.engine.reset_prefix_cache()
        start = time.perf_counter()
        trajectories = generator.generate(requests(args.requests))
        seconds = time.perf_counter() - start
        print(sum(len(t.completion_ids) for t in trajectories) / seconds, flush=True)
    if args.profile:
        generator.engine.reset_prefix_cache()
        profiled(f"generation, parity {args.engine}", lambda: generator.generate(requests(args.requests)))


def benchmark_generation(args: argparse.Namespace) -> dict[str, list[float]]:
    """Sampled tokens per second of each round, prefill included."""
    rounds, command = args.rounds, [sys.executable, *sys.argv, "--engine"]
    engines = {
        name: subprocess.Popen(
            [*command, "assert" if name == "on" else "off"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in ("on", "off")
    }
    rates: dict[str, list[float]] = {"on": [], "off": []}
    for engine in engines.values():
        while engine.stdout.readline().strip() != "ready":
            assert engine.poll() is None, "an engine did not start"
    for turn in range(rounds + 1):
        for name, engine in engines.items():
            engine.stdin.write("go\n")
            engine.stdin.flush()
            rate = float(engine.stdout.readline())
            if turn:  # The first turn warms up.
                rates[name].append(rate)
    for engine in engines.values():
        engine.stdin.close()
        engine.wait(120)
    return rates


def benchmark_training(config: JobConfig, args: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens per second of each round, a whole optimizer step."""
    from torchtitan.experiments.rl.unified.devices import this_device

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    this_device().prepare_trainer()
    from torchtitan.experiments.rl.unified.trainer.trainer import RLTrainer

    trainer = RLTrainer(config)
    trainer.load()
    completion = list(range(3, 3 + SAMPLED_TOKENS))
    logprobs = torch.full((SAMPLED_TOKENS,), -6.0)
    trajectories = [
        Trajectory(request, completion, logprobs, 0, "stop", "") for request in requests(args.requests)[::2]
    ]
    tokens = sum(len(t.request.prompt_ids) + SAMPLED_TOKENS for t in trajectories)
    rates: dict[str, list[float]] = {"on": [], "off": []}
    advantages = torch.linspace(-1, 1, len(trajectories))
    for turn in range(args.rounds + 1):
        for name in rates:
            trainer.job_config.parity.check = "report" if name == "on" else "off"
            attention = PackedAttention if name == "on" else StockAttention
            replace_inner_attention(trainer.model_parts[0], lambda _: attention())
            start = time.perf_counter()
            trainer.step_on(trajectories, advantages)
            if turn:
                rates[name].append(tokens / (time.perf_counter() - start))
            if turn == args.rounds and args.profile:
                profiled(f"training step, parity {name}", lambda: trainer.step_on(trajectories, advantages))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--mode", default="unified", choices=("unified", "vllm_compat"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32, help="generated at once; half of them are trained on")
    parser.add_argument("--flavor", help="the shape of this flavor of TorchTitan's Qwen3 instead of a small one")
    parser.add_argument("--profile", action="store_true", help="name the kernels that take a GPU's time")
    parser.add_argument("--what", default="generation,training")
    parser.add_argument("--engine", choices=("assert", "off"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    prepare_environment()
    with tempfile.TemporaryDirectory() as folder:
        if args.engine:
            generate_when_told(job(Path(folder), args, args.engine), args)
            return
        for what, measure in {
            "generation": lambda: benchmark_generation(args),
            "training step": lambda: benchmark_training(job(Path(folder), args, "report"), args),
        }.items():
            if what.split()[0] not in args.what:
                continue
            rates = measure()
            on, off = (statistics.median(rates[name]) for name in ("on", "off"))
            spread = {name: f"({min(values):.0f} to {max(values):.0f})" for name, values in rates.items()}
            print(
                f"{what:14} {args.mode} {args.dtype}: parity on {on:8.0f} tokens/s {spread['on']}, "
                f"off {off:8.0f} {spread['off']}, ratio {on / off:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
