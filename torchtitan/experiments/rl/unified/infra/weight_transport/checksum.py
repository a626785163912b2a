# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Checksums of tensors (`checksum.cpp`): any changed, lost or moved byte changes them, but they are no signature."""

import ctypes
import functools
from pathlib import Path

import torch
from torchtitan.experiments.rl.unified.batch_invariant.build import load_library


def checksum(tensor: torch.Tensor) -> int:
    """64-bit checksum of the tensor's elements in row-major order, whatever its strides and device."""
    tensor = tensor.detach().cpu().contiguous()
    return _copy_checksum()(None, tensor.data_ptr(), tensor.nbytes, torch.get_num_threads())


def copy_with_checksum(to: torch.Tensor, tensor: torch.Tensor) -> int:
    """Copies `tensor` into `to`, contiguous and in memory of the CPU, in the dtype of `to`; returns `checksum(to)`."""
    if tensor.device.type == "cpu" and tensor.dtype == to.dtype and tensor.is_contiguous():
        return _copy_checksum()(to.data_ptr(), tensor.data_ptr(), to.nbytes, torch.get_num_threads())
    to.copy_(tensor)
    return checksum(to)


@functools.cache
def _copy_checksum() -> ctypes._CFuncPtr:
    function = load_library("checksum", Path(__file__).parent).copy_checksum
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    function.restype = ctypes.c_uint64
    return function
