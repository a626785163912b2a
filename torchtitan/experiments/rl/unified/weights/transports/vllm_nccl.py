# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Weights from the trainer's GPU to those of the generators, by vLLM's NCCL weight-transfer engine.

A broadcast needs both ends at once, and a generator takes a version when it is ready for it. So versions wait in the
trainer's GPU memory, and a thread beside the trainer serves each generator: `fetch` asks it for a version, then the
engine's ranks (`NcclHandle.open`) and the thread meet in a broadcast.
"""

import ctypes
import logging
import os
import secrets
import socket
import threading
from dataclasses import dataclass, field, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import answer_challenge, Client, Connection, deliver_challenge
from typing import TYPE_CHECKING

import torch
from torchtitan.experiments.rl.unified.errors import WeightTransferError
from torchtitan.experiments.rl.unified.messages import WeightUpdate
from torchtitan.experiments.rl.unified.weights.base import PolicyWeights, WeightTransport
from torchtitan.experiments.rl.unified.weights.transports.gpu import ByteTensorSink, GpuHandle, GpuSegment, TENSOR
from torchtitan.experiments.rl.unified.weights.transports.shared_memory import SharedMemoryTransport

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

logger = logging.getLogger(__name__)

# The first that vLLM 0.32 can use: with an older one it transfers nothing, and does not say so.
LEAST_NCCL = (2, 29, 7)


@dataclass(frozen=True)
class NcclSender:
    """Where generators ask for versions, and the secret by which the two ends know each other."""

    address: tuple[str, int]
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class NcclGroup:
    """The trainer, as rank 0, and the ranks of one engine: where they meet, and how many they are.

    Its name is its own: a trainer that was started again may have the same port.
    """

    name: str
    host: str
    port: int
    world_size: int


@dataclass(frozen=True)
class NcclHandle(GpuHandle):
    """Receives a broadcast of `size` bytes into memory of its own; to be opened once, by each rank of the engine."""

    group: NcclGroup
    size: int

    def open(self, vllm_config: "VllmConfig", device: torch.device) -> torch.Tensor:
        engine, shelf = _join(self.group, vllm_config, device)
        engine.receive_weights(engine.update_info_cls(names=[TENSOR], dtype_names=["uint8"], shapes=[[self.size]]))
        return shelf.take()


class VllmNcclTransport(WeightTransport):
    """Each end on GPUs of its own, on one host or several. The connection between them is not encrypted.

    Args:
        host: of the sender, as the generators' hosts and itself know it.
        timeout_seconds: longest wait for the sender's answer.
        engine_ranks: tensor parallel degree of a generator.
        slots: versions that stay fetchable; each holds GPU memory of the size of the weights.
    """

    def __init__(self, host: str, timeout_seconds: float, engine_ranks: int, slots: int = 1) -> None:
        self.host, self.timeout_seconds, self.engine_ranks = host, timeout_seconds, engine_ranks
        self._memory = SharedMemoryTransport(slots, GpuSegment)
        # The sender's end, and a generator's.
        self._server: tuple[NcclSender, socket.socket] | None = None
        self._connection: tuple[NcclSender, Connection] | None = None

    def send(self, version: int, weights: PolicyWeights) -> WeightUpdate:
        self._server = self._server or self._listen()
        update = self._memory.send(version, weights)
        torch.cuda.current_stream().synchronize()
        return replace(update, handle=self._server[0])

    def fetch(self, update: WeightUpdate) -> WeightUpdate:
        try:
            connection = self._connect(update.handle)
            connection.send((update.location, self.engine_ranks))
            if not connection.poll(self.timeout_seconds):
                raise TimeoutError(f"no answer in {self.timeout_seconds:g} s")
            handle = connection.recv()
        except (OSError, EOFError, AuthenticationError) as error:
            self._disconnect()
            raise WeightTransferError(
                f"weights of version {update.version}: their sender at {':'.join(map(str, update.handle.address))} "
                f"died, or has {update.location} no more ({error!r})"
            ) from error
        return replace(update, location=f"nccl:{handle.group.name}", handle=handle, lasting=False)

    def close(self) -> None:
        self._disconnect()
        if self._server is not None:
            self._server[1].shutdown(socket.SHUT_RDWR)  # Wakes the thread that accepts.
            self._server[1].close()
            self._server = None
        self._memory.close()

    def _connect(self, sender: NcclSender) -> Connection:
        if self._connection is None or self._connection[0] != sender:
            self._disconnect()
            self._connection = sender, Client(sender.address, authkey=sender.key)
        return self._connection[1]

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection[1].close()
            self._connection = None

    def _listen(self) -> tuple[NcclSender, socket.socket]:
        check_nccl()
        server = socket.create_server((self.host if self.host == "localhost" else "", 0))
        sender = NcclSender((self.host, server.getsockname()[1]), secrets.token_bytes(32))
        threading.Thread(target=self._accept, args=(sender, server), daemon=True).start()
        return sender, server

    def _accept(self, sender: NcclSender, server: socket.socket) -> None:
        while True:
            try:
                connection = Connection(server.accept()[0].detach())
            except ConnectionError:
                continue
            except OSError:  # Closed.
                return
            threading.Thread(target=self._serve, args=(sender, connection), daemon=True).start()

    def _serve(self, sender: NcclSender, connection: Connection) -> None:
        """Broadcasts to one engine what it asks for, until it hangs up, which ends the group."""
        group = broadcaster = None
        try:
            deliver_challenge(connection, sender.key)
            answer_challenge(connection, sender.key)
            while True:
                location, ranks = connection.recv()
                segment = self._memory.segments[location]
                group = group or NcclGroup(secrets.token_hex(8), self.host, _open_port(), 1 + ranks)
                connection.send(NcclHandle(group, segment.size))
                broadcaster = broadcaster or Broadcaster(group, segment.buffer.device)
                broadcaster.broadcast(segment.buffer)
        except (EOFError, ConnectionError, AuthenticationError):  # It has gone, or is somebody else.
            pass
        except (OSError, RuntimeError, KeyError) as error:
            logger.warning("weights did not get to a generator by NCCL: %r", error)
        finally:
            connection.close()
            if broadcaster is not None:
                broadcaster.close()


class Broadcaster:
    """The trainer's place in a group, on a stream beside that of its own work.

    Args:
        group: to join; waits for the others.
        device: the trainer's GPU.
    """

    def __init__(self, group: NcclGroup, device: torch.device) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self.stream = torch.cuda.Stream(device)
        rendezvous = {"master_address": group.host, "master_port": group.port, "world_size": group.world_size}
        with torch.cuda.stream(self.stream):
            self.communicator = trainer_init(rendezvous)

    def broadcast(self, buffer: torch.Tensor) -> None:
        """Starts to send `buffer` to every other rank."""
        with torch.cuda.stream(self.stream):
            self.communicator.broadcast(buffer, src=0, stream=self.stream)

    def close(self) -> None:
        """Gives up what has not arrived."""
        self.communicator.destroy()


# This process's place in its group; a trainer that was started again has another.
_joined: "dict[NcclGroup, tuple[NCCLWeightTransferEngine, ByteTensorSink]]" = {}


def _join(
    group: NcclGroup, vllm_config: "VllmConfig", device: torch.device
) -> "tuple[NCCLWeightTransferEngine, ByteTensorSink]":
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    if group not in _joined:
        check_nccl()
        while _joined:
            _joined.popitem()[1][0].shutdown()
        shelf = ByteTensorSink()
        engine = NCCLWeightTransferEngine(WeightTransferConfig(backend="nccl"), vllm_config, device, shelf)
        engine.init_transfer_engine(
            engine.init_info_cls(
                master_address=group.host, master_port=group.port, rank_offset=1, world_size=group.world_size
            )
        )
        _joined[group] = engine, shelf
    return _joined[group]


def check_nccl() -> None:
    """Raises RuntimeError if vLLM cannot use the NCCL that it finds in this process."""
    path = os.environ.get("VLLM_NCCL_SO_PATH") or "libnccl.so.2"
    version = ctypes.c_int()
    try:
        ctypes.CDLL(path).ncclGetVersion(ctypes.byref(version))
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"there is no NCCL: {error}") from error
    found = version.value // 10000, version.value // 100 % 100, version.value % 100
    if found < LEAST_NCCL:
        names = [".".join(map(str, numbers)) for numbers in (LEAST_NCCL, found)]
        raise RuntimeError(
            f"vLLM needs NCCL {names[0]} or later, {path} is {names[1]}: VLLM_NCCL_SO_PATH names another"
        )


def _open_port() -> int:
    from vllm.utils.network_utils import get_open_port

    return get_open_port()
