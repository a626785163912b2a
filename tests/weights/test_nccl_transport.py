# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Weights by vLLM's NCCL engine: who asks for what and gets it, everywhere; the broadcast itself on a GPU."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.errors import WeightTransferError
from torchtitan.experiments.rl.unified.messages import TensorSpec
from torchtitan.experiments.rl.unified.weights.base import PolicyWeights
from torchtitan.experiments.rl.unified.weights.checks import check_transport
from torchtitan.experiments.rl.unified.weights.receiver import Receiver
from torchtitan.experiments.rl.unified.weights.transports import build_transport, vllm_nccl
from torchtitan.experiments.rl.unified.weights.transports.shared_memory import Segment
from torchtitan.experiments.rl.unified.weights.transports.vllm_nccl import VllmNcclTransport


def tensors(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {f"w{i}": torch.randn(1000 * i + 3, generator=generator).to(torch.bfloat16) for i in range(5)}


def weights(version: int) -> PolicyWeights:
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors(version).items()]
    return PolicyWeights(specs, iter(tensors(version).items()))


def has(found: dict[str, torch.Tensor], version: int) -> bool:
    return all(torch.equal(found[name].cpu(), tensor) for name, tensor in tensors(version).items())


class StoreBroadcaster:
    """NCCL's place taken by vLLM's own group over a TCP store, which needs no GPU."""

    open: list["StoreBroadcaster"] = []

    def __init__(self, group, device):
        self.group = join(group, rank=0)
        self.among = self.open
        self.among.append(self)

    def broadcast(self, buffer):
        self.group.broadcast(buffer, src=0)

    def close(self):
        self.among.remove(self)


def join(group, rank: int):
    from vllm.distributed.utils import StatelessProcessGroup

    return StatelessProcessGroup.create("localhost", group.port, rank, group.world_size)


class Engine:
    """A generator and its one rank."""

    def __init__(self) -> None:
        self.transport, self.groups = VllmNcclTransport("here", 10, engine_ranks=1), {}
        self.receiver = Receiver(self._open)

    def receive(self, update):
        return self.receiver.receive(self.transport.fetch(update))

    def _open(self, handle):
        if handle.group not in self.groups:
            self.groups[handle.group] = join(handle.group, rank=1)
        return self.groups[handle.group].broadcast(torch.empty(handle.size, dtype=torch.uint8), src=0)


@pytest.fixture
def sender(monkeypatch):
    monkeypatch.setattr(StoreBroadcaster, "open", [])
    monkeypatch.setattr(vllm_nccl, "GpuSegment", Segment)
    monkeypatch.setattr(vllm_nccl, "Broadcaster", StoreBroadcaster)
    monkeypatch.setattr(vllm_nccl, "check_nccl", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    transport = VllmNcclTransport("localhost", 10, engine_ranks=1, slots=2)
    yield transport
    transport.close()


def test_each_engine_gets_what_it_asks_for_when_it_asks(sender):
    first, second = Engine(), Engine()
    updates = {version: pickle.loads(pickle.dumps(sender.send(version, weights(version)))) for version in (1, 2)}
    assert has(first.receive(updates[1]), 1)
    assert has(first.receive(updates[1]), 1)  # as an engine that was started again does
    assert has(first.receive(updates[2]), 2)
    assert has(second.receive(updates[1]), 1)
    updates[3] = sender.send(3, weights(3))  # in the place of version 1
    assert has(second.receive(updates[3]), 3) and has(first.receive(updates[3]), 3)
    with pytest.raises(WeightTransferError, match="holds version 3"):
        first.receive(updates[1])
    assert has(first.receive(updates[2]), 2)
    # A group of its own for each engine, for all its updates.
    assert len(first.groups) == len(second.groups) == 1 and len(StoreBroadcaster.open) == 2


def test_an_engine_that_ends_takes_its_group_along(sender):
    lost, left = Engine(), Engine()
    update = sender.send(1, weights(1))
    lost.receive(update), left.receive(update)
    lost.transport.close()
    deadline = time.monotonic() + 10
    while len(StoreBroadcaster.open) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(StoreBroadcaster.open) == 1
    again = Engine()
    assert has(again.receive(update), 1) and has(left.receive(update), 1)


def test_a_sender_that_is_gone_is_an_error(sender):
    engine = Engine()
    update = sender.send(1, weights(1))
    with pytest.raises(WeightTransferError, match="version 1: their sender at localhost:.* has gone no more"):
        engine.receive(replace(update, location="gone"))
    assert has(engine.receive(update), 1)
    stranger = replace(update, handle=replace(update.handle, key=b"guessed"))
    with pytest.raises(WeightTransferError, match="digest sent was rejected"):
        Engine().receive(stranger)
    assert has(engine.receive(update), 1)
    assert "guessed" not in repr(stranger)
    sender.close()
    with pytest.raises(WeightTransferError, match="Connection refused"):
        Engine().receive(update)


def test_strangers_keep_nobody_waiting(sender):
    update = sender.send(1, weights(1))
    with socket.create_connection(update.handle.address):  # It says nothing,
        socket.create_connection(update.handle.address).close()  # or hangs up, its challenge unread.
        assert has(Engine().receive(update), 1)


def test_a_broadcast_that_fails_is_reported(sender, monkeypatch, caplog):
    def fails(group, device):
        raise OSError("Address already in use")

    monkeypatch.setattr(vllm_nccl, "Broadcaster", fails)
    transport, update = VllmNcclTransport("here", 10, engine_ranks=1), sender.send(1, weights(1))
    transport.fetch(update)
    with pytest.raises(WeightTransferError, match="died, or has .* no more"):
        transport.fetch(update)
    assert "weights did not get to a generator by NCCL: OSError('Address already in use')" in caplog.text


def test_the_trainers_host_is_the_clusters():
    flags = ["--weight_sync.transport", "vllm_nccl"]
    assert build_transport(load_job_config(flags)).host == "localhost"
    config = load_job_config([*flags, "--cluster.trainer", "tcp://node1:26600", "tcp://node2:26600"])
    assert build_transport(config).host == "node1"


def test_an_nccl_that_vllm_cannot_use_is_refused(monkeypatch):
    class Old:
        def ncclGetVersion(self, version):
            version._obj.value = 22809

    monkeypatch.setattr(vllm_nccl.ctypes, "CDLL", lambda path: Old())
    with pytest.raises(RuntimeError, match="needs NCCL 2.29.7 or later, .* is 2.28.9"):
        vllm_nccl.check_nccl()


def test_each_rank_needs_a_gpu(monkeypatch):
    config = load_job_config(["--weight_sync.transport", "vllm_nccl", "--generator.tensor_parallel_degree", "2"])
    monkeypatch.setattr(this_device(), "cards", lambda: ["a card"] * 3)
    with pytest.raises(ValueError, match="a GPU for each rank of trainer and generators, 4; there are 3: use"):
        check_transport(config)
    monkeypatch.setenv("VLLM_NCCL_SO_PATH", "/nowhere")
    config.cluster.trainer = config.cluster.generators = ["tcp://node1:26600"]
    with pytest.raises(ValueError, match='"vllm_nccl": there is no NCCL: /nowhere'):
        check_transport(config)


RECEIVER = """
import pickle, sys
import torch
from torchtitan.experiments.rl.unified.weights.receiver import Receiver
from torchtitan.experiments.rl.unified.weights.transports.vllm_nccl import VllmNcclTransport
from vllm.config import VllmConfig
sys.path.insert(0, sys.argv[1])
from test_nccl_transport import has

device, config = torch.device("cuda:0"), VllmConfig()
transport, receiver = VllmNcclTransport("", 60, engine_ranks=1), Receiver(lambda handle: handle.open(config, device))
print("ready", flush=True)
for line in sys.stdin:
    update = transport.fetch(pickle.loads(bytes.fromhex(line)))
    if sys.argv[2] == "dies":
        print("fetched", flush=True)
        sys.stdin.read()
    found = receiver.receive(update)
    print(has(found, update.version) and all(tensor.is_cuda for tensor in found.values()), flush=True)
"""


def start_receiver(host: str, what: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", RECEIVER, os.path.dirname(__file__), what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"NCCL_HOSTID": host},
    )
    while process.stdout.readline().strip() != "ready":
        assert process.poll() is None, "the receiver did not start"
    return process


def ask(process: subprocess.Popen, update) -> str:
    process.stdin.write(pickle.dumps(update).hex() + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.gpu
@pytest.mark.slow
def test_nccl_brings_each_version_and_survives_a_receiver_that_does_not(monkeypatch):
    """Proves the broadcast by vLLM's engine, and that a receiver that asks and then dies holds up nobody.

    NCCL wants a GPU a process, unless the processes say that they are on different hosts.
    """
    monkeypatch.setenv("NCCL_HOSTID", "trainer")
    sender = VllmNcclTransport("localhost", 60, engine_ranks=1)
    receiver, doomed = start_receiver("first", "lives"), start_receiver("second", "dies")
    for version in range(1, 6):
        assert ask(receiver, sender.send(version, weights(version))) == "True"
    update = sender.send(6, weights(6))
    assert ask(doomed, update) == "fetched"
    doomed.send_signal(signal.SIGKILL)
    doomed.wait()
    start = time.monotonic()
    assert ask(receiver, update) == "True"
    assert ask(receiver, sender.send(7, weights(7))) == "True"
    torch.cuda.synchronize()
    assert time.monotonic() - start < 30
    receiver.stdin.close()
    assert receiver.wait(60) == 0
    sender.close()
