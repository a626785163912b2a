# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Weights between two Monarch processes that share nothing, over RDMABuffer's TCP fallback."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import asyncio, json, os, signal, sys, time
import torch
from monarch.actor import Actor, ActorError, endpoint, this_host
import monarch.actor
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
from torchtitan.experiments.rl.unified.weights.transports import build_transport
from torchtitan.experiments.rl.unified.weights.base import PolicyWeights
from torchtitan.experiments.rl.unified.weights.receiver import Receiver
from torchtitan.experiments.rl.unified.messages import TensorSpec
from torchtitan.experiments.rl.unified.errors import WeightTransferError
from torchtitan.experiments.rl.unified.config.load import load_job_config

CONFIG = load_job_config(
    ["--weight_sync.transport", "monarch", "--trainer.timeout_seconds", "5", "--trajectory_queue.max_staleness", "1"]
)


def weights(version):
    generator = torch.Generator().manual_seed(version)
    return {f"w{i}": torch.randn(1000 * i + 3, generator=generator).to(torch.bfloat16) for i in range(5)}


class Sender(Actor):
    @endpoint
    def send(self, version):
        prepare_environment()
        if not hasattr(self, "transport"):
            self.transport = build_transport(CONFIG)
        specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights(version).items()]
        return self.transport.send(version, PolicyWeights(specs, iter(weights(version).items())))

    @endpoint
    def flip(self, update):
        with open(update.location, "r+b") as file:
            file.seek(update.entries[2].offset)
            byte = file.read(1)[0]
            file.seek(update.entries[2].offset)
            file.write(bytes([byte ^ 1]))

    @endpoint
    def pid(self):
        return os.getpid()


class Engine(Actor):
    @endpoint
    def receive(self, update):
        prepare_environment()
        if not hasattr(self, "transport"):
            self.transport, self.receiver = build_transport(CONFIG), Receiver()
        fetched = self.transport.fetch(update)
        assert fetched.handle is None and fetched.location.startswith(f"/proc/{os.getpid()}/")
        found = self.receiver.receive(fetched)
        return all(torch.equal(found[name], tensor) for name, tensor in weights(update.version).items())


async def main():
    monarch.actor.unhandled_fault_hook = lambda failure: None
    procs = [this_host().spawn_procs(per_host={"ranks": 1}, name=name) for name in ("sender", "engine")]
    sender, engine = procs[0].spawn("sender", Sender), procs[1].spawn("engine", Engine)

    async def refused(update):
        try:
            await engine.receive.call_one(update)
        except ActorError as error:
            assert isinstance(error.exception, WeightTransferError), repr(error.exception)
            return str(error.exception)
        raise SystemExit("no WeightTransferError")

    answer = {"arrived": []}
    updates = {}
    for version in range(1, 5):
        updates[version] = await sender.send.call_one(version)
        answer["arrived"].append(await engine.receive.call_one(updates[version]))
    answer["slot of the version before"] = await engine.receive.call_one(updates[3])
    answer["overwritten"] = await refused(updates[2])
    await sender.flip.call_one(updates[4])
    answer["flipped"] = await refused(updates[4])
    os.kill(await sender.pid.call_one(), signal.SIGKILL)
    start = time.monotonic()
    answer["sender died"] = await refused(updates[3])
    answer["seconds"] = time.monotonic() - start
    print(json.dumps(answer), flush=True)
    os._exit(0)  # A mesh whose process was killed cannot be stopped in good order.


asyncio.run(main())
"""


@pytest.mark.slow
def test_weights_cross_without_shared_memory_and_every_failure_is_a_transfer_error():
    """Proves that Monarch's TCP fallback carries weights here, that two versions stay fetchable, and that a flipped
    byte, an overwritten version and a killed sender reach the controller as WeightTransferError."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["arrived"] == [True] * 4 and answer["slot of the version before"]
    assert "weights of version 2: " in answer["overwritten"] and "holds version 4" in answer["overwritten"]
    assert answer["flipped"] == "weights of version 4: w2 arrived damaged"
    assert "weights of version 3: " in answer["sender died"] and "did not deliver them" in answer["sender died"]
