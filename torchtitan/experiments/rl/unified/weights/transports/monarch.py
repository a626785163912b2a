# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Weights between hosts, by Monarch's RDMABuffer: InfiniBand where there is some, else its TCP fallback."""

import dataclasses
import warnings

import monarch
from monarch.rdma import RDMABuffer
from torchtitan.experiments.rl.unified.errors import WeightTransferError
from torchtitan.experiments.rl.unified.messages import WeightUpdate
from torchtitan.experiments.rl.unified.weights.base import PolicyWeights, WeightTransport
from torchtitan.experiments.rl.unified.weights.transports.shared_memory import Segment, SharedMemoryTransport


class MonarchTransport(WeightTransport):
    """Shared memory at both ends, and Monarch between them: the generator's process copies the sender's segment into
    one of its own, where the processes of its engine, which know no Monarch, read it.

    Both ends must be in Monarch actors.

    Args:
        timeout_seconds: longest wait for the bytes of one update.
        slots: versions that stay fetchable.
    """

    def __init__(self, timeout_seconds: float, slots: int = 1) -> None:
        monarch.configure(rdma_allow_tcp_fallback=True)
        self.timeout_seconds = timeout_seconds
        self._memory = SharedMemoryTransport(slots)
        # Registering memory is slow: a segment keeps its buffer.
        self._buffers: dict[str, RDMABuffer] = {}
        self._fetched: Segment | None = None

    def send(self, version: int, weights: PolicyWeights) -> WeightUpdate:
        update = self._memory.send(version, weights)
        segment = self._memory.segments[update.location]
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key in self._memory.segments}
        if update.location not in self._buffers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # That this is TCP and not RDMA is what the docstring says.
                self._buffers[update.location] = RDMABuffer(segment.buffer)
        return dataclasses.replace(update, handle=self._buffers[update.location])

    def fetch(self, update: WeightUpdate) -> WeightUpdate:
        size = update.handle.size()
        if self._fetched is None or self._fetched.size != size:
            self._close_fetched()
            self._fetched = Segment(size)
        try:
            update.handle.read_into(self._fetched.buffer, timeout=int(self.timeout_seconds)).get()
        except Exception as error:
            raise WeightTransferError(
                f"weights of version {update.version}: {update.handle.owner} did not deliver them: {error}"
            ) from error
        return dataclasses.replace(update, location=self._fetched.location, handle=None, lasting=False)

    def close(self) -> None:
        self._buffers.clear()
        self._memory.close()
        self._close_fetched()

    def _close_fetched(self) -> None:
        if self._fetched is not None:
            self._fetched.close()
            self._fetched = None
