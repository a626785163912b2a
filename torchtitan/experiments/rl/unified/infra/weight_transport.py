# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Weights from trainer to generator, through memory."""

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_ALIGNMENT_BYTES = 64


class WeightTransferError(RuntimeError):
    """Weights did not arrive as they were sent; the receiver still has the old ones."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of an update: its place in the transfer and the sum of its bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    checksum: int


@dataclass(frozen=True)
class WeightUpdate:
    """What a generator needs to fetch one version of the weights.

    Attributes:
        version: of the policy: optimizer steps taken.
        location: where the transport put the bytes.
        entries: the tensors, named as in the TrainSpec model's state dict.
    """

    version: int
    location: str
    entries: list[TensorEntry]


class WeightTransport(ABC):
    """Carries one version of the weights at a time from a sender to any number of receivers."""

    @abstractmethod
    def send(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> WeightUpdate:
        """Makes `tensors` fetchable; what was sent before is gone."""

    @abstractmethod
    def receive(self, update: WeightUpdate):
        """Context manager that yields [(name, tensor)]; the tensors are valid inside it.

        Raises:
            WeightTransferError: names the first tensor whose bytes are not the ones that were sent.
        """

    @abstractmethod
    def close(self) -> None:
        """Frees what the transport holds; after it nothing can be received."""


class SharedMemoryTransport(WeightTransport):
    """Both ends on one host: memory of the sender that receivers map and read in place.

    It is a memfd, reached through the sender's /proc entry: it has no name to be left behind, and is gone with the
    sender however that ends.
    """

    def __init__(self) -> None:
        self._fd = -1
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def send(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> WeightUpdate:
        tensors = list(tensors)
        entries, size = _layout(tensors)
        if self._buffer.numel() < size:
            self.close()
            self._fd = os.memfd_create("torchtitan-rl")
            os.ftruncate(self._fd, size)
            self._buffer = _map(self._location)
        sent = []
        for entry, (_, tensor) in zip(entries, tensors, strict=True):
            view = _view(self._buffer, entry)
            view.copy_(tensor)
            sent.append(dataclasses.replace(entry, checksum=checksum(view)))
        return WeightUpdate(version, self._location, sent)

    @contextmanager
    def receive(self, update: WeightUpdate) -> Iterator[list[tuple[str, torch.Tensor]]]:
        if not os.path.exists(update.location):
            raise WeightTransferError(f"shared memory {update.location} is gone: its sender has closed it or died")
        buffer = _map(update.location)
        tensors = [(entry.name, _view(buffer, entry)) for entry in update.entries]
        for entry, (name, tensor) in zip(update.entries, tensors, strict=True):
            if checksum(tensor) != entry.checksum:
                raise WeightTransferError(f"weights of version {update.version}: {name} arrived damaged")
        yield tensors

    def close(self) -> None:
        if self._fd != -1:
            os.close(self._fd)
            self._fd, self._buffer = -1, torch.empty(0, dtype=torch.uint8)

    @property
    def _location(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._fd}"


def build_transport(name: str) -> WeightTransport:
    """The transport called `name` in TOML."""
    return {"shared_memory": SharedMemoryTransport}[name]()


def checksum(tensor: torch.Tensor) -> int:
    """Sum of the tensor's bytes taken as 64-bit words (bytes where 8 does not divide them), modulo 2**64."""
    flat = tensor.reshape(-1).view(torch.uint8)
    words = flat.view(torch.int64) if flat.numel() % 8 == 0 and flat.storage_offset() % 8 == 0 else flat
    return int(words.sum())


def _map(location: str) -> torch.Tensor:
    return torch.from_file(location, shared=True, size=os.stat(location).st_size, dtype=torch.uint8)


def _layout(tensors: list[tuple[str, torch.Tensor]]) -> tuple[list[TensorEntry], int]:
    entries, offset = [], 0
    for name, tensor in tensors:
        entries.append(TensorEntry(name, tensor.dtype, tuple(tensor.shape), offset, 0))
        offset += -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return entries, offset


def _view(buffer: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    nbytes = entry.dtype.itemsize * torch.Size(entry.shape).numel()
    return buffer[entry.offset : entry.offset + nbytes].view(entry.dtype).view(entry.shape)
