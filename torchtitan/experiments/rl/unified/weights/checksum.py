# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Checksums of tensors (`checksum.cpp`): any changed, lost or moved byte changes them, but they are no signature."""

import ctypes
import functools
from pathlib import Path

import torch
from torch.nn import functional
from torchtitan.experiments.rl.unified.devices.build import load_library

# Of checksum.cpp: bytes of a block, and the words that are summed side by side.
_BLOCK = 1 << 20
_WORDS = 8
# Blocks whose products with their weights are held at once.
_BLOCKS_AT_ONCE = 64


def checksum(tensor: torch.Tensor) -> int:
    """64-bit checksum of the tensor's elements in row-major order, whatever its strides; taken where it lies."""
    tensor = tensor.detach().contiguous()
    if tensor.is_cuda:
        sums = lane_sums(tensor).cpu()
        return library().checksum_of_sums(sums.data_ptr(), tensor.nbytes)
    return library().copy_checksum(None, tensor.data_ptr(), tensor.nbytes, torch.get_num_threads())


def copy_with_checksum(to: torch.Tensor, tensor: torch.Tensor) -> int:
    """Copies `tensor` into `to`, contiguous, in the dtype of `to`; returns `checksum(to)`."""
    if tensor.device.type == to.device.type == "cpu" and tensor.dtype == to.dtype and tensor.is_contiguous():
        return library().copy_checksum(to.data_ptr(), tensor.data_ptr(), to.nbytes, torch.get_num_threads())
    to.copy_(tensor)
    return checksum(to)


def lane_sums(tensor: torch.Tensor) -> torch.Tensor:
    """What `checksum_of_sums` chains to the checksum, by torch's operations on the tensor's device.

    Args:
        tensor: contiguous.

    Returns:
        (blocks, 2, 8) int64, wrapped around at 2^64: the sums of each lane's words, and of those sums as they grow.
    """
    data = tensor.view(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    line, whole = 8 * _WORDS, len(data) // _BLOCK * _BLOCK
    rest = functional.pad(data[whole:], (0, -len(data) % line))
    parts = [*data[:whole].view(torch.int64).view(-1, _BLOCK // line, _WORDS).split(_BLOCKS_AT_ONCE)]
    if len(rest):
        parts.append(rest.view(torch.int64).view(1, -1, _WORDS))
    sums = [torch.empty(0, 2, _WORDS, dtype=torch.int64, device=data.device)]
    for words in parts:
        # The word of a block's first line is in every sum of sums, that of the last line in one.
        weights = torch.arange(words.shape[1], 0, -1, device=data.device)
        sums.append(torch.stack([words.sum(1), (words * weights[:, None]).sum(1)], dim=1))
    return torch.cat(sums)


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels; raises RuntimeError as `load_library` does."""
    loaded = load_library("checksum", Path(__file__).parent)
    loaded.copy_checksum.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    loaded.checksum_of_sums.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    loaded.copy_checksum.restype = loaded.checksum_of_sums.restype = ctypes.c_uint64
    return loaded
