# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Builds C++ kernels at first use."""

import contextlib
import ctypes
import functools
import inspect
import re
import struct
from pathlib import Path
from typing import Any

import torch

_SOURCES = Path(__file__).parent / "cpu" / "csrc"

# The kernels state the order of every sum: the compiler must not fuse, reassociate or drop signs of zero. It may
# vectorise loops again, which inductor's own flags forbid, those marked simd too.
_FLAGS = ("-fno-unsafe-math-optimizations", "-ffp-contract=off", "-fsigned-zeros", "-ftree-loop-vectorize")


class _NotWhole(Exception):
    """A library in the cache was cut off; it is deleted."""


@functools.cache
def load_library(name: str, folder: Path = _SOURCES) -> ctypes.CDLL:
    """Compiles ``<name>.cpp`` and loads it.

    The build is inductor's own: torch's OpenMP runtime, ``-march=native``, a file lock against other processes, and
    a cache on disk (``TORCHINDUCTOR_CACHE_DIR``) keyed by source, flags and instruction set. A library in it that is
    not whole, as a full disk or a killed compiler leaves one, is built again: touching it would end the process.

    Args:
        name: file name, without its suffix.
        folder: where it lies; the CPU's if not given.

    Returns:
        The library; its functions' ``argtypes`` are the caller's to set.

    Raises:
        RuntimeError: no working C++ compiler, or the source does not compile.
    """
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    source = _with_headers(folder / f"{name}.cpp")
    # -march=native spells the same on every machine: a cache on a shared disk must still tell them apart.
    source += f"\n// {torch.backends.cpu.get_cpu_capability()}\n"
    # Probing which vector instructions work takes seconds, and -march=native knows. torch 2.11 probes all the same.
    knows = "needs_vec_isa" in inspect.signature(CppCodeCache.load_async).parameters
    options = {"needs_vec_isa": False} if knows else {}

    class WholeLibraries(CppCodeCache):
        @classmethod
        def _load_library(cls, path: str, key: str) -> Any:
            if not _is_whole(Path(path)):
                Path(path).unlink(missing_ok=True)
                raise _NotWhole
            return super()._load_library(path, key)

    try:
        with contextlib.suppress(_NotWhole):
            return WholeLibraries.load(source, extra_flags=_FLAGS, **options)
        return WholeLibraries.load(source, extra_flags=_FLAGS, **options)
    except InvalidCxxCompiler as error:
        raise RuntimeError(
            f"{name}.cpp needs a C++ compiler and none works: install g++ or clang++, or point CXX at one"
        ) from error
    except CppCompileError as error:
        raise RuntimeError(f"{name}.cpp does not compile on this machine:\n{error}") from error


def _is_whole(library: Path) -> bool:
    """Whether a 64-bit ELF file is as long as its header says: the table of its sections is the last thing in it."""
    with open(library, "rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return False
    (table,), (size, count) = struct.unpack_from("<Q", header, 0x28), struct.unpack_from("<HH", header, 0x3A)
    return library.stat().st_size >= table + size * count


def _with_headers(path: Path) -> str:
    """A source with the headers that lie beside it in their places, so that the cache's key has them."""
    return re.sub(
        r'^#include "(.+)"$',
        lambda match: _with_headers(path.parent / match[1]),
        path.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
