# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The bytes of one version of the weights, in memory or in a file: those of a safetensors file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torchtitan.experiments.rl.unified.errors import WeightTransferError
from torchtitan.experiments.rl.unified.messages import TensorEntry, TensorSpec, WeightUpdate
from torchtitan.experiments.rl.unified.weights.base import PolicyWeights

# Names that the format has for dtypes (https://huggingface.co/docs/safetensors).
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Of the first tensor; a copy is fastest from and to whole cache lines.
_ALIGNMENT = 64
# The file begins with the size of its table of contents.
PREFIX = 8
# A table of contents must not grow with the version: memory is allocated once.
_VERSION_WIDTH = 12


class Layout:
    """Where each tensor of a version lies.

    Args:
        version: of the policy.
        specs: the tensors; those with wider elements come first in the bytes, so that all are aligned without gaps.

    Raises:
        ValueError: a dtype that weights do not travel in.
    """

    def __init__(self, version: int, specs: Sequence[TensorSpec]) -> None:
        for spec in specs:
            if spec.dtype not in _DTYPES:
                raise ValueError(f"{spec.name} is {spec.dtype}; weights travel as {', '.join(map(str, _DTYPES))}")
        self.version = version
        self.entries = [TensorEntry(spec, 0, 0) for spec in specs]
        end = 0
        for index in sorted(range(len(specs)), key=lambda index: -specs[index].dtype.itemsize):
            self.entries[index] = TensorEntry(specs[index], end, 0)
            end = self.entries[index].end
        start = self._start = len(self.header())
        self.entries = [replace(entry, offset=start + entry.offset) for entry in self.entries]
        self.size = start + end

    def fill(self, weights: PolicyWeights, place: Callable[[TensorEntry, torch.Tensor], int]) -> None:
        """Calls `place` with each tensor as it comes and keeps the checksum that it returns. Each is let go of before
        the next is asked for: a tensor gathered from shards may be a good part of the weights.

        Raises:
            ValueError: the stream does not bring what was announced.
        """
        stream = iter(weights.stream)
        for index, entry in enumerate(self.entries):
            name, tensor = next(stream, ("nothing more", None))
            if name != entry.spec.name or tuple(tensor.shape) != entry.spec.shape:
                raise ValueError(f"{entry.spec.name} {entry.spec.shape} was announced; what came is {name}")
            self.entries[index] = replace(entry, checksum=place(entry, tensor))
            del tensor

    def header(self) -> bytes:
        """What stands before the first tensor; as long before the checksums are known as after."""
        start = getattr(self, "_start", 0)
        checksums = {f"checksum {entry.spec.name}": f"{entry.checksum:016x}" for entry in self.entries}
        table = {"__metadata__": {"version": str(self.version).rjust(_VERSION_WIDTH), **checksums}}
        for spec, offset, end in ((entry.spec, entry.offset, entry.end) for entry in self.entries):
            place = [offset - start, end - start]
            table[spec.name] = {"dtype": _DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": place}
        text = json.dumps(table)
        text += " " * (-(PREFIX + len(text)) % _ALIGNMENT)
        return len(text).to_bytes(PREFIX, "little") + text.encode()


def view(buffer: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """The tensor of `entry` in the bytes `buffer`."""
    return buffer[entry.offset : entry.end].view(entry.spec.dtype).view(entry.spec.shape)


def check_version(buffer: torch.Tensor, update: WeightUpdate) -> None:
    """Looks up which version `buffer`, a receiver's mapping, holds at this moment.

    Raises:
        WeightTransferError: not the update's.
    """
    length = int.from_bytes(bytes(buffer[:PREFIX].tolist()), "little")
    try:
        if not 0 < length <= buffer.numel() - PREFIX:
            raise ValueError("no table of contents")
        found = json.loads(buffer[PREFIX : PREFIX + length].cpu().numpy().tobytes())["__metadata__"]["version"].strip()
    except (ValueError, KeyError, TypeError) as error:
        raise WeightTransferError(
            f"weights of version {update.version}: {update.location} has no readable table of contents; its sender is "
            "writing another version, or did not finish this one"
        ) from error
    if found != str(update.version):
        raise WeightTransferError(f"weights of version {update.version}: {update.location} holds version {found}")
