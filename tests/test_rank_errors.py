# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""One process of a job raises, the others do not: the job ends at once, with that process's own words."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchtitan.experiments.rl.unified.controller.hosts import one_arithmetic
from torchtitan.experiments.rl.unified.devices.cpu.linear import isa
from torchtitan.experiments.rl.unified.errors import ParityError

sys.path.insert(0, str(Path(__file__).parent))
from test_faults import FLAGS, marked, metrics, wait_for  # noqa: E402

# From the fault to the end of the job.
LIMIT_SECONDS = 15
# Runs the job with a trainer actor that breaks something in its own process before the trainer is built there.
FAULTY_RANK = """
import os, sys, time
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
prepare_environment()
from torchtitan.experiments.rl.unified.controller import trainer_mesh
from torchtitan.experiments.rl.unified.simple_rl_multiprocess import main

class FaultyActor(trainer_mesh.TrainerActor):
    def __init__(self, config):
        super().__init__(config)
        breaks(int(os.environ["RANK"]))

def at_call(number, owner, name, fault):
    original, calls = getattr(owner, name), []

    def faulty(*args, **kwargs):
        calls.append(name)
        if len(calls) != number:
            return original(*args, **kwargs)
        print("fault", time.monotonic(), file=sys.stderr, flush=True)
        return fault(original, *args, **kwargs)

    setattr(owner, name, faulty)

trainer_mesh.TrainerActor = FaultyActor
status = main(sys.argv[1:])
print("ended", time.monotonic(), file=sys.stderr, flush=True)
sys.exit(status)
"""
FAULTS = {
    # In each: what breaks on which rank, what the user reads, and the steps that were taken.
    "log-prob": (
        """
def breaks(rank):
    from torchtitan.experiments.rl.unified.trainer import logprobs

    def perturbed(original, *args, **kwargs):
        logprobs_N = original(*args, **kwargs)
        return logprobs_N + 1e-3 * (logprobs_N == logprobs_N.detach()[5])

    if rank == 1:
        at_call(2, logprobs, "sampling_logprobs", perturbed)
""",
        r"[1-9]\d* of \d+ sampled tokens have another log-prob .* step 2, prompt '.+' sample \d+, position \d+ "
        r"\(policy version 1\): generator -[\de.-]+, trainer -[\de.-]+\. Look for",
        1,
    ),
    "loss": (
        """
def breaks(rank):
    from torchtitan.experiments.rl.unified.algorithms.losses.grpo import GRPO

    if rank == 1:
        at_call(2, GRPO, "__call__", lambda original, *args: 1 / 0)
""",
        r"rank 1 of the trainer failed: ZeroDivisionError: division by zero \(<string>:\d+ in <lambda>\)",
        1,
    ),
    "beside a collective": (
        """
def breaks(rank):
    from torchtitan.experiments.rl.unified.trainer.attention import PackedAttention

    def fail(original, *args, **kwargs):
        raise KeyError("no such block")

    if rank == 1:
        at_call(3, PackedAttention, "forward", fail)
""",
        r"rank 1 of the trainer failed: KeyError: 'no such block' \(<string>:\d+ in fail\)",
        1,
    ),
    "send of weights": (
        """
def breaks(rank):
    from torchtitan.experiments.rl.unified.weights.transports.shared_memory import SharedMemoryTransport

    def fail(original, transport, version, weights):
        next(iter(weights))
        raise OSError(28, "No space left on device")

    if rank == 0:
        at_call(2, SharedMemoryTransport, "send", fail)
""",
        r"rank 0 of the trainer failed: OSError: \[Errno 28\] No space left on device \(<string>:\d+ in fail\)",
        0,
    ),
}
# The same for an engine: what it raises does not pickle.
FAULTY_ENGINE = """
import os, sys, time
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
prepare_environment()
from torchtitan.experiments.rl.unified.controller import generators
from torchtitan.experiments.rl.unified.simple_rl_multiprocess import main

class FaultyActor(generators.GeneratorActor):
    def __init__(self, config, first_gpu):
        super().__init__(config, first_gpu)
        from torchtitan.experiments.rl.unified.generator.generator import Generator
        original, calls = getattr(Generator, PLACE), []

        def faulty(*args):
            calls.append(PLACE)
            if len(calls) < CALL:
                return original(*args)
            print("fault", time.monotonic(), file=sys.stderr, flush=True)
            from pydantic_core import ArgsKwargs
            raise TypeError("cannot serve this", ArgsKwargs((lambda: 0,)))

        setattr(Generator, PLACE, faulty)

generators.GeneratorActor = FaultyActor
status = main(sys.argv[1:])
print("ended", time.monotonic(), file=sys.stderr, flush=True)
sys.exit(status)
"""
LAYOUTS = {
    "DDP 2": [],
    "FSDP 2": "--parallelism.data_parallel_replicate_degree 1 --parallelism.data_parallel_shard_degree 2".split(),
    "TP 2": "--parallelism.data_parallel_replicate_degree 1 --parallelism.tensor_parallel_degree 2 "
    "--generator.tensor_parallel_degree 2".split(),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, layout",
    [
        *(("log-prob", layout) for layout in LAYOUTS),
        ("loss", "DDP 2"),
        *(("beside a collective", layout) for layout in ("FSDP 2", "TP 2")),
        ("send of weights", "FSDP 2"),
    ],
)
def test_what_one_rank_sees_ends_the_job_at_once(kind, layout, tmp_path):
    """Proves it for what ranks agree on and for what leaves the other rank in a collective; no restart is tried."""
    breaks, complaint, steps = FAULTS[kind]
    command = [sys.executable, "-c", breaks + FAULTY_RANK, "--job.dump_folder", str(tmp_path / "run"), *FLAGS]
    command += [*LAYOUTS[layout], "--training.steps", "4", "--checkpoint.enable", "--checkpoint.interval", "1"]
    environment = {**os.environ, "FAULT_TEST": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 1, done.stderr
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(rf"error: {complaint}.*", error), error
    assert "going on from the last checkpoint" not in done.stderr
    fault, ended = (float(re.search(rf"{word} ([\d.]+)", done.stderr)[1]) for word in ("fault", "ended"))
    assert ended - fault <= LIMIT_SECONDS
    assert len(metrics(tmp_path / "run")) == steps
    wait_for(lambda: not marked(f"FAULT_TEST={tmp_path}"), 5, "the processes of the job to end")


# Runs the job with a generator actor that is told of other instructions, in its own process.
OTHER_PRODUCTS = """
import sys
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
prepare_environment()
from torchtitan.experiments.rl.unified.controller import generators
from torchtitan.experiments.rl.unified.simple_rl_multiprocess import main

class OtherProducts(generators.GeneratorActor):
    def __init__(self, *args):
        from torchtitan.experiments.rl.unified.devices.cpu.linear import use_isa
        use_isa("avx2")
        super().__init__(*args)

generators.GeneratorActor = OtherProducts
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_process_that_decides_otherwise_is_refused_by_name(tmp_path):
    """Proves that nothing is trained where trainer and generator multiply by different kernels."""
    if isa(torch.float32) == "avx2":
        pytest.skip("this CPU's best kernels are the least ones")
    command = [sys.executable, "-c", OTHER_PRODUCTS, "--job.dump_folder", str(tmp_path / "run"), *FLAGS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"the trainer computes by .*avx512.*, generator0 by .*avx2.*: their log-probs would differ", error)
    assert not (tmp_path / "run/metrics.jsonl").exists() or not metrics(tmp_path / "run")


def test_two_ranks_of_one_kind_compute_by_one_arithmetic():
    assert one_arithmetic({"trainer rank 0": "amx", "trainer rank 1": "amx"}) == "amx"
    with pytest.raises(ParityError, match="trainer rank 0 computes by amx, trainer rank 2 by avx2"):
        one_arithmetic({"trainer rank 0": "amx", "trainer rank 1": "amx", "trainer rank 2": "avx2"})


@pytest.mark.slow
@pytest.mark.parametrize("place, call, steps", [("__init__", 1, 0), ("generate", 2, 1), ("update_weights", 2, 1)])
def test_what_an_engine_raises_ends_the_job_at_once(place, call, steps, tmp_path):
    """Proves that its class and message are the job's error at start, at generate and at update; nothing is retried."""
    script = f"PLACE, CALL = {place!r}, {call}\n{FAULTY_ENGINE}"
    command = [sys.executable, "-c", script, "--job.dump_folder", str(tmp_path / "run"), *FLAGS]
    environment = {**os.environ, "FAULT_TEST": str(tmp_path)}
    done = subprocess.run(
        [*command, "--training.steps", "3"], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment
    )
    assert done.returncode == 1, done.stderr
    error, *calls = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(r"error: (generator0 failed: )?TypeError: \('cannot serve this', .*", error), error
    assert "in faulty: " in calls[-1] and all(line.startswith("error:   at ") for line in calls)
    assert "starting it again" not in done.stderr and "Traceback" not in done.stderr and "pickle" not in done.stderr
    fault, ended = (float(re.search(rf"{word} ([\d.]+)", done.stderr)[1]) for word in ("fault", "ended"))
    assert ended - fault <= LIMIT_SECONDS
    assert len(metrics(tmp_path / "run") if steps else []) == steps
    wait_for(lambda: not marked(f"FAULT_TEST={tmp_path}"), 5, "the processes of the job to end")
