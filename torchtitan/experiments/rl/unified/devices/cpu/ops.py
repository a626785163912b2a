# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Row-invariant matrix products and SiLU for the CPU (``csrc/ops.cpp``), and the proof of their fast path."""

import contextlib
import ctypes
import enum
import functools
import logging
from collections.abc import Iterator

import torch
from torchtitan.experiments.rl.unified.devices.build import load_library

logger = logging.getLogger(__name__)

TILE_ROWS = 16
# Elements of one side of a product that the proof may compute with; a vocabulary of 152k by 1024 is above it.
_LARGE_WEIGHT = 1 << 24
# Every remainder of the kernels' row blocks (at most 48 rows wide here), and sizes that threads split unevenly.
_ROW_COUNTS = (*range(1, 50), 64, 67, 96, 128, 197, 257)
_ROW_COUNTS_LARGE = (1, 2, 3, 5, 7, 11, 13, 16, 17, 23, 31, 33, 47, 64)


class Path(enum.IntEnum):
    """How a product is computed; the bits are the same."""

    ASK = 0
    DIRECT = 1
    TILED = 2


def install() -> None:
    """Puts the row-invariant kernels in the place of torch's, in the whole process."""
    _library().install(_ask)


def uninstall() -> None:
    """Gives torch its kernels back."""
    _library().uninstall()


@contextlib.contextmanager
def force_path(path: Path) -> Iterator[None]:
    """The calling thread's products take `path` inside, unproven."""
    _library().force_path(path)
    try:
        yield
    finally:
        _library().force_path(Path.ASK)


def direct_path_holds(k: int, n: int, dtype: torch.dtype, transposed: bool) -> bool:
    """Whether one library call gives every row the bits that tiles of 16 rows give it, on this CPU with its threads.

    Tries: rows of random numbers, in several counts, against the same rows in tiles. Call it inside the mode.

    Args:
        k: inner size of the product.
        n: columns of the result.
        dtype: of both sides.
        transposed: whether the right side is a transposed view, as a linear's weight is.
    """
    generator = torch.Generator().manual_seed(k * n)
    counts = _ROW_COUNTS if k * n <= _LARGE_WEIGHT else _ROW_COUNTS_LARGE
    a = torch.randn(max(counts), k, generator=generator).to(dtype)
    b = torch.randn((n, k) if transposed else (k, n), generator=generator).to(dtype)
    b = b.t() if transposed else b
    with force_path(Path.TILED):
        expected = torch.mm(a, b)
    with force_path(Path.DIRECT):
        return all(torch.equal(torch.mm(a[-count:], b), expected[-count:]) for count in counts)


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
def _ask(k: int, n: int, scalar_type: int, transposed: int) -> int:
    dtype = _SCALAR_TYPES[scalar_type]
    with torch.no_grad():
        holds = direct_path_holds(k, n, dtype, bool(transposed))
    if not holds:
        logger.warning(
            "this CPU's matrix product of (rows, %d) by (%d, %d) in %s depends on the number of rows with %d threads: "
            "computing it in tiles of %d rows, slower and with the same bits everywhere",
            k,
            k,
            n,
            dtype,
            torch.get_num_threads(),
            TILE_ROWS,
        )
    return Path.DIRECT if holds else Path.TILED


# c10::ScalarType
_SCALAR_TYPES = {5: torch.float16, 6: torch.float32, 15: torch.bfloat16}


@functools.cache
def _library() -> ctypes.CDLL:
    return load_library("ops")
