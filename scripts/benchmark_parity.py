# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What parity costs: generation beside stock vLLM, a training step beside torch's stock operations, in turn.

    python scripts/benchmark_parity.py [--dtype float32] [--mode vllm_compat] [--rounds 5]
    python scripts/benchmark_parity.py --dtype bfloat16 --flavor 0.6B --requests 256 --profile      on a GPU

Generation: two engines of one random model in two processes that take turns. Ours is the job's generator, parity on;
the other is vLLM's own model class with vLLM's defaults, compiled as it comes, this package not loaded; both are asked
for log-probs, ours for a seed a request too (stock vLLM on a CPU dies of one whose prompt comes in chunks). Two loads:
prompts of 150 tokens and 512 new ones, prompts of up to 900 and 100 new. Training: one trainer; "off" is torch's stock
ops with its scaled_dot_product_attention on each sequence. Prints tokens per second (median, least and most of the
rounds) and the ratio of the medians.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from random_checkpoint import write_random_checkpoint
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
from torchtitan.experiments.rl.unified.config.load import JobConfig, load_job_config, TRAIN_CONFIGS
from torchtitan.experiments.rl.unified.config.sections import Sampling
from torchtitan.experiments.rl.unified.families import policy_train_spec
from torchtitan.experiments.rl.unified.families.base import replace_inner_attention
from torchtitan.experiments.rl.unified.families.qwen3 import TINY
from torchtitan.experiments.rl.unified.messages import Request, Trajectory
from torchtitan.experiments.rl.unified.trainer.attention import PackedAttention, StockAttention

MODEL = {"dim": 512, "n_layers": 6, "n_heads": 8, "n_kv_heads": 4, "head_dim": 64, "hidden_dim": 1536}
# Each engine sets its own.
ENVIRONMENT = dict(os.environ)
# Shortest and longest prompt, sampled tokens.
LOADS = {"decode-heavy": (150, 150, 512), "prefill-heavy": (28, 900, 100)}
CONTEXT = 1024


def job(folder: Path, args: argparse.Namespace, parity: str) -> JobConfig:
    settings = {
        "job.config_file": TRAIN_CONFIGS / "debug_cpu.toml",
        "job.dump_folder": folder / "out",
        "rl.mode": args.mode,
        "generator.dtype": args.dtype,
        "training.dtype": args.dtype,
        "training.mixed_precision_param": args.dtype,
        "parity.check": parity,
        "training.seq_len": CONTEXT,
        "generator.kv_cache_gib": 16 if torch.cuda.is_available() else 1,
        "generator.max_num_seqs": 256,
        "parallelism.data_parallel_replicate_degree": 1,
    }
    config = load_job_config([str(word) for key, value in settings.items() for word in (f"--{key}", value)])
    model = MODEL
    if args.flavor:
        flavor = policy_train_spec("qwen3").model_args[args.flavor]
        model = {name: getattr(flavor, name) for name in TINY}
    write_random_checkpoint(folder / "model", {**model, "max_seq_len": CONTEXT})
    config.model.hf_assets_path = str(folder / "model")
    return config


def requests(count: int, load: str) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    shortest, longest, new = LOADS[load]
    lengths = [shortest + (longest - shortest) * i // max(1, count - 1) for i in range(count)]
    prompts = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in lengths]
    sampling = Sampling(max_tokens=new)
    return [Request(str(i), 0, prompt, seed=i, sampling=sampling) for i, prompt in enumerate(prompts)]


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


class Stock:
    """vLLM as it comes, with the limits of the job's engine."""

    def __init__(self, config: JobConfig) -> None:
        os.environ |= {"VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"}
        from vllm import LLM

        self.engine = LLM(
            config.model.hf_assets_path,
            dtype=config.generator.dtype,
            max_model_len=CONTEXT,
            max_num_seqs=config.generator.max_num_seqs,
            kv_cache_memory_bytes=int(config.generator.kv_cache_gib * 2**30),
            generation_config="vllm",
        )

    def generate(self, requests: list[Request]) -> int:
        """The number of sampled tokens."""
        from vllm import SamplingParams, TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=request.prompt_ids) for request in requests]
        sampling = SamplingParams(max_tokens=requests[0].sampling.max_tokens, logprobs=0, ignore_eos=True)
        return sum(len(o.outputs[0].token_ids) for o in self.engine.generate(prompts, sampling, use_tqdm=False))


class Ours:
    """The job's generator."""

    def __init__(self, config: JobConfig) -> None:
        from torchtitan.experiments.rl.unified.generator.generator import Generator

        self.generator = Generator(config)
        self.engine = self.generator.engine

    def generate(self, requests: list[Request]) -> int:
        """The number of sampled tokens."""
        return sum(len(trajectory.completion_ids) for trajectory in self.generator.generate(requests))


def generate_when_told(config: JobConfig, args: argparse.Namespace) -> None:
    """An engine's side: for each line on stdin, a load's name, one batch; answers with its tokens per second."""
    engine = Ours(config) if args.engine == "ours" else Stock(config)
    print("ready", flush=True)
    for line in sys.stdin:
        batch = requests(args.requests, line.strip())
        engine.engine.reset_prefix_cache()
        start = time.perf_counter()
        tokens = engine.generate(batch)
        print(tokens / (time.perf_counter() - start), flush=True)
    if args.profile:
        engine.engine.reset_prefix_cache()
        profiled(f"generation, {args.engine}", lambda: engine.generate(requests(args.requests, "decode-heavy")))


def benchmark_generation(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Yields a load and each side's sampled tokens per second of each round, prefill included."""
    command = [sys.executable, *sys.argv, "--engine"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    engines = {name: subprocess.Popen([*command, name], **pipes) for name in ("ours", "stock")}
    for engine in engines.values():
        while engine.stdout.readline().strip() != "ready":
            assert engine.poll() is None, "an engine did not start"
    for load in LOADS:
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(args.rounds + 1):
            for name, engine in engines.items():
                engine.stdin.write(f"{load}\n")
                engine.stdin.flush()
                rate = float(engine.stdout.readline())
                if turn:  # The first turn warms up.
                    rates[name].append(rate)
        yield f"generation, {load}", rates
    for engine in engines.values():
        engine.stdin.close()
        engine.wait(120)


def benchmark_training(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Yields each side's tokens per second of each round, a whole optimizer step."""
    from torchtitan.experiments.rl.unified.devices import this_device

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    this_device().prepare_trainer()
    from torchtitan.experiments.rl.unified.trainer.trainer import RLTrainer

    folder = tempfile.TemporaryDirectory()
    trainer = RLTrainer(job(Path(folder.name), args, "report"))
    trainer.load()
    batch = requests(args.requests, "prefill-heavy")[::2]
    new = LOADS["prefill-heavy"][-1]
    completion, logprobs = list(range(3, 3 + new)), torch.full((new,), -6.0)
    trajectories = [Trajectory(request, completion, logprobs, 0, "stop", "") for request in batch]
    tokens = sum(len(t.request.prompt_ids) + new for t in trajectories)
    rates: dict[str, list[float]] = {"ours": [], "stock": []}
    advantages = torch.linspace(-1, 1, len(trajectories))
    for turn in range(args.rounds + 1):
        for name in rates:
            trainer.job_config.parity.check = "report" if name == "ours" else "off"
            attention = PackedAttention if name == "ours" else StockAttention
            replace_inner_attention(trainer.model_parts[0], lambda _: attention())
            start = time.perf_counter()
            trainer.step_on(trajectories, advantages)
            if turn:
                rates[name].append(tokens / (time.perf_counter() - start))
            if turn == args.rounds and args.profile:
                profiled(f"training step, {name}", lambda: trainer.step_on(trajectories, advantages))
    yield "training step", rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--mode", default="unified", choices=("unified", "vllm_compat"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32, help="generated at once; half of them are trained on")
    parser.add_argument("--flavor", help="the shape of this flavor of TorchTitan's Qwen3 instead of a small one")
    parser.add_argument("--profile", action="store_true", help="name the kernels that take a GPU's time")
    parser.add_argument("--what", default="generation,training")
    parser.add_argument("--engine", choices=("ours", "stock"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine != "stock":
        prepare_environment()
    if args.engine:
        with tempfile.TemporaryDirectory() as folder:
            generate_when_told(job(Path(folder), args, "assert"), args)
        return
    for what, measure in {"generation": benchmark_generation, "training": benchmark_training}.items():
        for name, rates in measure(args) if what in args.what else ():
            ours, stock = (statistics.median(rates[side]) for side in ("ours", "stock"))
            spread = {side: f"({min(values):.0f} to {max(values):.0f})" for side, values in rates.items()}
            print(
                f"{name:26} {args.mode} {args.dtype}: parity {ours:8.0f} tokens/s {spread['ours']}, "
                f"stock {stock:8.0f} {spread['stock']}, ratio {ours / stock:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
