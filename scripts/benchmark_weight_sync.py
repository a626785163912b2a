# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Seconds that a weight update takes, by transport, against copying the same bytes once in memory.

    python scripts/benchmark_weight_sync.py [--flavor 0.6B] [--transports shared_memory file monarch] [--rounds 5]
    python scripts/benchmark_weight_sync.py --updates 1000

The weights are random bf16 in the shape of a Qwen3 flavor. A sender and a receiver, two processes, take turns: the one
sends, the other fetches, verifies, brings them to its parameters and reads those back, as trainer and generator do:
with shared_memory the parameters become views of what was sent, else they are copied. The plain copy runs in between,
round by round. Extra memory is what both processes hold beyond their own weights, shared pages counted once, at its
peak.

With --updates the default job takes so many steps, small ones: the memory of each of its processes must stay flat.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import tempfile
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from chaos_resume import Job
from torch.nn import Parameter
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
from torchtitan.experiments.rl.unified.config.load import JobConfig, load_job_config
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.families import policy_train_spec
from torchtitan.experiments.rl.unified.messages import TensorSpec, WeightUpdate
from torchtitan.experiments.rl.unified.weights.base import PolicyWeights
from torchtitan.experiments.rl.unified.weights.checksum import checksum
from torchtitan.experiments.rl.unified.weights.placement import check_arrived, full_to_param, Placement
from torchtitan.experiments.rl.unified.weights.receiver import Receiver
from torchtitan.experiments.rl.unified.weights.transports import build_transport


def random_weights(flavor: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random tensors with names and shapes of the flavor's parameters; tied ones once."""
    spec = policy_train_spec("qwen3")
    with torch.device("meta"):
        model = spec.model_cls(spec.model_args[flavor])
    numbers = torch.randn(1 << 20).to(dtype)
    weights = {name: torch.empty(param.shape, dtype=dtype) for name, param in model.named_parameters()}
    for tensor in weights.values():
        for part in tensor.view(-1).split(len(numbers)):
            part.copy_(numbers[: len(part)])
    return weights


def memory_bytes(pid: int, field: str) -> int:
    """Memory of a process; "Pss" counts a page that n processes share as 1/n of one."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


class PeakMemory:
    """Samples what processes hold together, from now until stopped.

    Args:
        pids: the processes.
    """

    def __init__(self, pids: list[int]) -> None:
        self.pids, self._stop = pids, threading.Event()
        self.first = self.peak = self._together()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _together(self) -> int:
        # While one process maps another's pages their shares change between two looks: a moment of rest is waited for.
        before, sizes = self._sizes(), self._sizes()
        while any(abs(size - old) > 1 << 20 for size, old in zip(sizes, before, strict=True)):
            before, sizes = sizes, self._sizes()
        return sum(sizes)

    def _sizes(self) -> list[int]:
        return [memory_bytes(pid, "Pss") for pid in self.pids]

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, self._together())

    def stop(self) -> int:
        """Bytes that were added at the peak."""
        self._stop.set()
        self._thread.join()
        return self.peak - self.first


def drop_from_page_cache(path: str) -> None:
    """A reader on another host would have to fetch the file: the writer's cached pages must not help it."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def benchmark_actors():
    """The two ends, as Monarch actors; defined here because Monarch starts threads at import."""
    from monarch.actor import Actor, endpoint

    class Sender(Actor):
        @endpoint
        def setup(self, config: JobConfig, flavor: str) -> int:
            prepare_environment()
            self.weights = random_weights(flavor, torch.bfloat16)
            self.copy = {name: tensor.clone() for name, tensor in self.weights.items()}
            self.transport = build_transport(config)
            return sum(tensor.nbytes for tensor in self.weights.values())

        @endpoint
        def plain_copy(self) -> float:
            start = time.perf_counter()
            for name, tensor in self.weights.items():
                self.copy[name].copy_(tensor)
            return time.perf_counter() - start

        @endpoint
        def send(self, version: int) -> tuple[float, WeightUpdate]:
            specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.weights.items()]
            start = time.perf_counter()
            update = self.transport.send(version, PolicyWeights(specs, iter(self.weights.items())))
            seconds = time.perf_counter() - start
            if self.transport.__class__.__name__ == "FileTransport":
                drop_from_page_cache(update.location)
            return seconds, update

        @endpoint
        def pid(self) -> int:
            self.copy = None
            checksum(torch.zeros(1))  # What the kernel's loader imports is no weight.
            return os.getpid()

        @endpoint
        def close(self) -> None:
            self.transport.close()

    class Engine(Actor):
        @endpoint
        def setup(self, config: JobConfig, flavor: str) -> None:
            prepare_environment()
            weights = random_weights(flavor, torch.bfloat16)
            self.params = {name: Parameter(tensor, requires_grad=False) for name, tensor in weights.items()}
            self.transport, self.receiver = build_transport(config), Receiver()

        @endpoint
        def receive(self, update: WeightUpdate) -> float:
            start = time.perf_counter()
            fetched = self.transport.fetch(update)
            received = self.receiver.receive(fetched)
            for name, tensor in received.items():
                full_to_param(tensor, self.params[name], fetched.lasting)
            placed = {name: Placement(p, tuple(p.shape), (0,) * p.ndim) for name, p in self.params.items()}
            check_arrived(placed, received)
            received.check_still_there()
            this_device().give_back_memory()
            return time.perf_counter() - start

        @endpoint
        def pid(self) -> int:
            checksum(torch.zeros(1))
            return os.getpid()

        @endpoint
        def close(self) -> None:
            self.transport.close()

    return Sender, Engine


async def benchmark(transport: str, flavor: str, rounds: int, folder: Path) -> dict[str, float]:
    """Medians over `rounds`, in seconds, after a first round that allocates; peak extra memory over the weights."""
    async with two_ends(transport, flavor, folder) as (sender, engine, nbytes):
        seconds = []
        for version in range(rounds + 1):
            copy = await sender.plain_copy.call_one()
            send, update = await sender.send.call_one(version)
            seconds.append((copy, send, await engine.receive.call_one(update)))
    _, send, receive = seconds.pop(0)
    print(f"{transport:14s} first round, which allocates: send {send:.2f} s + receive {receive:.2f} s")
    # Again in new processes: the peak includes the first, allocating send.
    async with two_ends(transport, flavor, folder) as (sender, engine, nbytes):
        memory = PeakMemory([await end.pid.call_one() for end in (sender, engine)])
        for version in range(2):
            await engine.receive.call_one((await sender.send.call_one(version))[1])
        extra = memory.stop()
    copy, send, receive = (statistics.median(column) for column in zip(*seconds, strict=True))
    return {"copy": copy, "send": send, "receive": receive, "bytes": nbytes, "extra_memory": extra / nbytes}


@asynccontextmanager
async def two_ends(transport: str, flavor: str, folder: Path):
    """Starts sender and engine in a process each; yields both and the size of the weights in bytes."""
    from monarch.actor import this_host

    config = load_job_config(["--weight_sync.transport", transport, "--weight_sync.folder", str(folder)])
    procs = [this_host().spawn_procs(per_host={"ranks": 1}, name=name) for name in ("sender", "engine")]
    ends = [proc.spawn(cls.__name__, cls) for proc, cls in zip(procs, benchmark_actors(), strict=True)]
    nbytes, _ = await asyncio.gather(*(end.setup.call_one(config, flavor) for end in ends))
    yield *ends, nbytes
    for end in ends:
        await end.close.call_one()
    for proc in procs:
        await proc.stop()


async def benchmark_all(transports: list[str], flavor: str, rounds: int, folder: Path) -> None:
    """Prints a line a transport."""
    for transport in transports:
        found = await benchmark(transport, flavor, rounds, folder)
        total = found["send"] + found["receive"]
        print(
            f"{transport:14s} {found['bytes'] / 2**30:.2f} GiB: copy {found['copy']:.3f} s, send {found['send']:.3f} s "
            f"+ receive {found['receive']:.3f} s = {total / found['copy']:.2f} copies, peak extra memory "
            f"{found['extra_memory']:.2f} of the weights",
            flush=True,
        )


def repeat_updates(transport: str, updates: int, folder: Path) -> None:
    """Runs the default job, small steps, for that many; asserts that no process grows and nothing is left behind."""
    flags = ["--rl.prompts_per_step=2", "--rl.group_size=2", "--sampling.max_tokens=24", "--evaluation.interval=0"]
    flags += [f"--training.steps={updates}", f"--weight_sync.transport={transport}", f"--weight_sync.folder={folder}/w"]
    # torch's flight recorder keeps the last so many collectives, 0.5 KB each: it is to be full in the first fifth.
    flags += ["--comm.trace_buf_size=1000"]
    in_shared_memory = set(os.listdir("/dev/shm"))
    job, sizes = Job(folder / transport, flags, limit=60), {}
    while job.process.poll() is None:
        if 0 < (step := job.steps()) < updates:  # After the last one the controller writes the report.
            for pid, name in job.processes().items():
                with contextlib.suppress(OSError):  # It ends.
                    sizes.setdefault(name, []).append((step, memory_bytes(pid, "Rss")))
        time.sleep(1)
    steps = [json.loads(line) for line in (folder / transport / "metrics.jsonl").read_text().splitlines()]
    assert (
        job.process.returncode == 0
    ), f"the job failed: {(folder / transport).with_suffix('.log').read_text()[-2000:]}"
    assert [step["policy_version"] for step in steps] == list(range(1, updates + 1))
    assert not any(step["mismatched_tokens"] for step in steps)
    for name, column in sorted(sizes.items()):
        fifth = updates // 5
        early = max(size for step, size in column if fifth / 2 < step <= fifth)
        late = max(size for step, size in column if step > fifth)
        grown = late / early - 1
        print(
            f"{transport}: {name:18} {early / 2**20:6.1f} MiB at the end of the first fifth, at most {grown:+.1%} after"
        )
        assert grown <= 0.02, f"{name} grew"
    left = [*job.orphans(), *sorted(set(os.listdir("/dev/shm")) - in_shared_memory), *folder.glob("w/*")]
    assert not left, f"left behind: {left}"
    print(f"{transport}: {updates} updates, version right and every token equal each time, nothing left behind")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavor", default="0.6B", help="of the Qwen3 TrainSpec")
    parser.add_argument("--transports", nargs="+", default=["shared_memory", "file", "monarch"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=0, help="run the default job for so many steps instead")
    parser.add_argument("--folder", type=Path, help='where transport "file" writes; default: the temporary directory')
    args = parser.parse_args()
    prepare_environment()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.updates:
            for transport in args.transports:
                repeat_updates(transport, args.updates, Path(folder))
            return
        asyncio.run(benchmark_all(args.transports, args.flavor, args.rounds, Path(folder)))


if __name__ == "__main__":
    main()
