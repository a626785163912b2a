# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Does the trainer compute the generator's log-probs, bit for bit, whatever the engine does? A table of cases.

Trainer and generator are processes of their own, as in a job: what one decides or caches for itself can differ.

    python scripts/verify_parity.py                          the whole matrix, on random models of several shapes
    python scripts/verify_parity.py --quick                  a few cases of each mode and dtype, under a minute
    python scripts/verify_parity.py --flavor 0.6B            a random model of a flavor's shape, 100,000 tokens; GPU
    python scripts/verify_parity.py --job.config_file X.toml the cases that need no other model, on a job's checkpoint
    python scripts/verify_parity.py --model.hf_assets_path DIR                             the same, on any checkpoint

A row counts sampled tokens; a mismatch is a token whose fp32 log-prob has other bits in the trainer than in the
generator, or (in the rows "alone = ...") in another batch of the same generator. Exit status 1 with any mismatch.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from parity_pair import EngineProcess, ONE_RANK, Pair, set_num_threads
from random_checkpoint import write_random_checkpoint
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
from torchtitan.experiments.rl.unified.config.load import JobConfig, load_job_config
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.families import policy_train_spec
from torchtitan.experiments.rl.unified.families.qwen3 import TINY
from torchtitan.experiments.rl.unified.families.tensors import check_weights
from torchtitan.experiments.rl.unified.messages import completion_seed, ParityReport, Request, Trajectory
from torchtitan.experiments.rl.unified.preflight.model import model_of_job
from torchtitan.experiments.rl.unified.trainer.parity import compare


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    mode: str
    dtype: str
    case: str
    report: ParityReport

    def as_dict(self) -> dict:
        return {"mode": self.mode, "dtype": self.dtype, "case": self.case, **vars(self.report)}


def same(one: list[Trajectory], other: list[Trajectory]) -> ParityReport:
    """Compares two samplings of the same requests: tokens and log-probs."""
    report = ParityReport()
    for a, b in zip(one, other, strict=True):
        if a.completion_ids != b.completion_ids:
            report += ParityReport(
                len(a.completion_ids), len(a.completion_ids), torch.inf, f"tokens of {a.request.uid}"
            )
        else:
            report += compare(a.logprobs, b.logprobs, lambda token: f"token {token} of {a.request.uid}")
    return report


def requests_of(lengths: list[int], vocab: int, shared: int = 0) -> list[Request]:
    """Requests with random prompts of these lengths, each with a seed of its own; the first `shared` ids are common."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randint(3, vocab, (shared,), generator=generator).tolist()
    prompts = [common + torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]
    return [Request(f"prompt {i}", 0, prompt, completion_seed(0, str(i), 0)) for i, prompt in enumerate(prompts)]


def mixed(count: int, longest: int) -> list[int]:
    """`count` prompt lengths between 2 and `longest`, no two neighbours alike."""
    return [2 + (37 * i) % (longest - 1) for i in range(count)]


def batch_cases(pair: Pair, vocab: int, sizes: tuple[int, ...], longest: int, tokens: int):
    """Requests alone and in batches, sampled with two threads, recomputed with one."""
    requests = requests_of(mixed(max(sizes), longest), vocab)
    alone = [pair.sample([request], tokens)[0] for request in requests[: min(sizes)]]
    yield "one at a time", pair.check(alone, threads=2)
    for size in sizes:
        batch = pair.sample(requests[:size], tokens, threads=2)
        yield f"batch of {size}", pair.check(batch)
        yield f"alone = in a batch of {size}", same(alone, batch[: len(alone)])
    shuffled = list(reversed(requests[: max(sizes)]))
    yield "another order, 1 thread", same(batch, list(reversed(pair.sample(shuffled, tokens))))


def sampling_cases(pair: Pair, vocab: int, count: int, tokens: int):
    """Every way to cut the distribution."""
    requests = requests_of(mixed(count, 60), vocab)
    for name, settings in {
        "temperature 0.7": {"temperature": 0.7},
        "top-p 0.9": {"top_p": 0.9},
        "top-k 50": {"top_k": 50},
        "temperature 0.7, top-p 0.9, top-k 50": {"temperature": 0.7, "top_p": 0.9, "top_k": 50},
        "greedy": {"temperature": 0.0},
    }.items():
        yield name, pair.check(pair.sample(requests, tokens, **settings))


def prefix_cases(pair: Pair, vocab: int, count: int, shared: int, tokens: int):
    """A long common prefix: computed once, then taken from the cache."""
    requests = requests_of(mixed(count, 30), vocab, shared=shared)
    pair.engine.ask("reset_prefix_cache")
    cold = [pair.sample([request], tokens)[0] for request in requests[:1]] + pair.sample(requests[1:], tokens)
    yield "prefix cache, prefix shared", pair.check(cold)
    yield "prefix cache, all of it hit", same(cold, pair.sample(requests, tokens, threads=2))


def update_cases(pair: Pair, vocab: int, count: int, tokens: int, steps: int = 3):
    """Optimizer steps with weight updates between them."""
    for step in range(1, steps + 1):
        trajectories = pair.sample(requests_of(mixed(count, 60), vocab), tokens, threads=2)
        advantages = torch.linspace(-1, 1, count)
        set_num_threads(1)
        report = pair.trainer.step_on(trajectories, advantages).parity
        pair.sync()
        yield f"optimizer step {step}", report
    trajectories = pair.sample(requests_of(mixed(count, 60), vocab), tokens)
    yield f"after {steps} weight updates", pair.check(trajectories, threads=2)


def plain_cases(tokens: int, count: int, lengths: list[int], threads: tuple[int, ...] = (1,)):
    """One batch of 2 threads, against the trainer's 1 and against other numbers of threads."""

    def cases(pair: Pair, vocab: int):
        requests = requests_of(lengths * count, vocab)
        trajectories = pair.sample(requests, tokens, threads=2)
        yield "", pair.check(trajectories)
        for n in threads:
            yield f"again, {n} thread{'s' * (n > 1)}", same(trajectories, pair.sample(requests, tokens, threads=n))

    return cases


@dataclass(frozen=True)
class Setup:
    """An engine to build and what to try on it.

    Attributes:
        name: of the set-up, in the table.
        model: changes to the tiny flavor's model args; None runs the job's own checkpoint.
        settings: changes to the job config, by "section.key".
        cases: called with a Pair and the vocabulary's size, yields (case, report).
    """

    name: str
    model: dict | None
    settings: dict
    cases: object


def large_setup(flavor: str) -> Setup:
    """A random model of a flavor's shape."""
    args = policy_train_spec("qwen3").model_args[flavor]
    model = {**{name: getattr(args, name) for name in TINY}, "max_seq_len": 8192}
    return Setup(
        flavor,
        model,
        {"generator.kv_cache_gib": 8, "generator.max_num_seqs": 256},
        lambda pair, vocab: (
            *batch_cases(pair, vocab, (4, 64, 256), 600, 128),
            *sampling_cases(pair, vocab, 64, 64),
            *prefix_cases(pair, vocab, 64, 400, 64),
            *update_cases(pair, vocab, 32, 64),
        ),
    )


def setups(quick: bool, context: int | None) -> list[Setup]:
    """The matrix, for one mode and dtype: on the job's own checkpoint, with its context, or (None) on random models."""
    model = None if context else {"vocab_size": 512, "max_seq_len": 8192, "n_layers": 2}
    if quick:
        return [
            Setup(
                "",
                model,
                {"generator.max_num_batched_tokens": 64, "generator.max_num_seqs": 16},
                lambda pair, vocab: (
                    *batch_cases(pair, vocab, (4, 16), 90, 16),
                    *sampling_cases(pair, vocab, 16, 8),
                    *update_cases(pair, vocab, 8, 16, steps=1),
                ),
            )
        ]
    found = [
        Setup(
            "",
            model,
            {},
            lambda pair, vocab: (
                *batch_cases(pair, vocab, (8, 32, 64), 120, 48),
                *sampling_cases(pair, vocab, 32, 48),
                *prefix_cases(pair, vocab, 24, 200, 24),
                *update_cases(pair, vocab, 16, 48),
            ),
        ),
        Setup(
            "chunks of 64",
            model,
            {"generator.max_num_batched_tokens": 64, "generator.max_num_seqs": 64},
            lambda pair, vocab: batch_cases(pair, vocab, (8, 32), 400, 32),
        ),
        Setup(
            "chunks of 512",
            model,
            {"generator.max_num_batched_tokens": 512},
            lambda pair, vocab: batch_cases(pair, vocab, (8, 32), 400, 32),
        ),
        Setup(
            "preemption",
            model,
            {"training.seq_len": 256, "generator.kv_cache_gib": 0.001},
            lambda pair, vocab: preemption_cases(pair, vocab, 32, 100, 64),
        ),
    ]
    if context:
        lengths = sorted({min(length, context - 32) for length in (64, 1000, 2000)})
        settings = {"training.seq_len": lengths[-1] + 32, "generator.kv_cache_gib": 0.5}
        name = f"contexts {', '.join(map(str, lengths))}"
        return [*found, Setup(name, None, settings, plain_cases(32, 4, lengths, threads=(1, 8)))]
    for head_dim in (64, 128):
        for ratio in (1, 2, 4):
            shape = {**model, "head_dim": head_dim, "n_heads": 4, "n_kv_heads": 4 // ratio}
            found.append(
                Setup(
                    f"head_dim {head_dim}, GQA {ratio}:1, contexts 64, 1000, 4000",
                    shape,
                    {"training.seq_len": 4200, "generator.kv_cache_gib": 0.5},
                    plain_cases(32, 4, [64, 1000, 4000]),
                )
            )
    untied = {**model, "enable_weight_tying": False}
    return [*found, Setup("untied embeddings", untied, {}, lambda pair, vocab: update_cases(pair, vocab, 16, 48))]


def preemption_cases(pair: Pair, vocab: int, count: int, longest: int, tokens: int):
    """A KV cache that cannot hold what runs: requests are thrown out and computed again."""
    requests = requests_of(mixed(count, longest), vocab)
    alone = [pair.sample([request], tokens)[0] for request in requests[:4]]
    batch = pair.sample(requests, tokens, threads=2)
    assert pair.preempted, "the cache was large enough: this case shows nothing"
    yield "", pair.check(batch)
    yield "alone = preempted", same(alone, batch[:4])


def run(setup: Setup, mode: str, dtype: str, job: list[str], folder: Path, engine: EngineProcess):
    """Builds the set-up and yields its rows."""
    flags = [*job, "--rl.mode", mode, "--generator.dtype", dtype, "--training.dtype", dtype]
    flags += ["--parity.check", "report", "--metrics.no-enable_tensorboard", "--job.dump_folder", str(folder / "out")]
    flags += ["--parallelism.data_parallel_replicate_degree", "1", "--checkpoint.no-enable"]
    flags += ["--training.mixed_precision_param", dtype]
    for key, value in {"training.seq_len": 1024, **setup.settings}.items():
        flags += [f"--{key}", str(value)]
    if setup.model is not None:
        checkpoint = folder / f"{abs(hash((setup.name, mode, dtype))):x}"
        write_random_checkpoint(checkpoint, setup.model)
        flags += ["--model.hf_assets_path", str(checkpoint)]
    vocab = model_of_job(load_job_config(flags)).geometry.vocabulary
    pair = Pair(flags, engine)
    for case, report in setup.cases(pair, vocab):
        yield Row(mode, dtype, ": ".join(filter(None, (setup.name, case))), report)
    pair.close()


def modes_of(config: JobConfig) -> list[str]:
    """The modes that the family of the job's model has."""
    policy = model_of_job(config)
    with torch.device("meta"):
        model = policy.build()
    try:
        policy.family.to_vllm_arithmetic(model)
    except ValueError:
        return ["unified"]
    return ["unified", "vllm_compat"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cases of each mode and dtype")
    parser.add_argument("--modes", default="", help="comma-separated; without it all that the model has")
    dtypes = "bfloat16" if torch.cuda.is_available() else "bfloat16,float32"
    parser.add_argument("--dtypes", default=dtypes, help="comma-separated; a GPU's attention has bfloat16 only")
    parser.add_argument("--flavor", help="a random model of this flavor of TorchTitan's Qwen3, instead of the matrix")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    args, job = parser.parse_known_args()

    prepare_environment()
    try:
        config = load_job_config(job)
        check_weights(model_of_job(config), config.checkpoint.initial_load_path or config.model.hf_assets_path)
        has = modes_of(config)
        modes = args.modes.split(",") if args.modes else has
        if odd := sorted(set(modes) - set(has)):
            raise ValueError(f"--modes {','.join(odd)}: {config.model.hf_assets_path} runs in {', '.join(has)}")
    except ValueError as error:
        print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return 1
    engine = EngineProcess()
    # One process group of one rank, for all the trainers of this process.
    os.environ |= ONE_RANK
    this_device().prepare_trainer()
    start, rows = time.monotonic(), []
    print(f"{'mode':12} {'dtype':9} {'tokens':>8} {'mismatches':>10} {'largest':>9}  case")
    with tempfile.TemporaryDirectory() as folder:
        for mode in modes:
            for dtype in args.dtypes.split(","):
                matrix = setups(args.quick, context=model_of_job(config).args.max_seq_len if job else None)
                for setup in [large_setup(args.flavor)] if args.flavor else matrix:
                    for row in run(setup, mode, dtype, job, Path(folder), engine):
                        report = row.report
                        print(
                            f"{mode:12} {dtype:9} {report.tokens_compared:8} {report.mismatched_tokens:10} "
                            f"{report.max_difference:9.2g}  {row.case}  {report.first}",
                            flush=True,
                        )
                        rows.append(row)
    total = sum((row.report for row in rows), start=ParityReport())
    seconds = time.monotonic() - start
    print(f"{total.tokens_compared} tokens compared, {total.mismatched_tokens} mismatches, {seconds:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"seconds": seconds, "rows": [row.as_dict() for row in rows]}, indent=1))
    return int(total.mismatched_tokens > 0)


if __name__ == "__main__":
    sys.exit(main())
