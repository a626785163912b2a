# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Builds C++ kernels at first use."""

import contextlib
import ctypes
import functools
import hashlib
import inspect
import os
import re
import shlex
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterator
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

    The build is inductor's own: torch's OpenMP runtime, ``-march=native``, a file lock against other processes. What
    it makes is kept in a folder of this user's (see `_own_cache`), by source, flags, instruction sets and torch, and
    under its content's digest: one that is cut off or damaged, which could end the process, is built again. Where it is
    there, no compiler is asked for.

    Args:
        name: file name, without its suffix.
        folder: where it lies; the CPU's if not given.

    Returns:
        The library; its functions' ``argtypes`` are the caller's to set.

    Raises:
        RuntimeError: no working C++ compiler, the source does not compile, or others can write to the cache.
    """
    source = _with_headers(folder / f"{name}.cpp")
    # -march=native spells the same on every machine: a cache on a shared disk must still tell them apart.
    source += f"\n// {_instruction_sets()}\n"
    key = hashlib.sha256(f"{source}{_FLAGS}{torch.__version__}".encode()).hexdigest()[:16]
    try:
        with _own_cache() as cache:
            for kept in cache.glob(f"{name}-{key}-*.so"):
                with contextlib.suppress(FileNotFoundError):  # Another process has removed it.
                    if kept.stem.rpartition("-")[2] == _digest(kept):
                        return ctypes.CDLL(str(kept))
                    kept.unlink()
            built = _build(name, source)
            draft = cache / f"{name}-{key}-{os.getpid()}.tmp"
            shutil.copyfile(built._name, draft)
            draft.rename(cache / f"{name}-{key}-{_digest(draft)}.so")
            return built
    except OSError as error:
        raise RuntimeError(
            f"{name}.cpp is compiled, and cannot be kept in or loaded from a folder of {cache} "
            f"({' '.join(str(error).split())[:200]}): is it mounted noexec, or full? XDG_CACHE_HOME names another place"
        ) from error


def _build(name: str, source: str) -> ctypes.CDLL:
    """Compiles `source`, or takes what inductor has of it, and loads it; errors as of `load_library`."""
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
    from torch.utils import cpp_extension

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

    # inductor quotes every path of its command line but this one.
    lib_path = cpp_extension.TORCH_LIB_PATH
    cpp_extension.TORCH_LIB_PATH = shlex.quote(lib_path)
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
    finally:
        cpp_extension.TORCH_LIB_PATH = lib_path


@contextlib.contextmanager
def _own_cache() -> Iterator[Path]:
    """Lets inductor compile into a folder of this user's; its own stands where any user can make it first.

    Raises:
        RuntimeError: others can write to it: what they put there would run here.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "torchtitan_rl_unified")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise RuntimeError(f"no folder for compiled kernels: {error}; XDG_CACHE_HOME names another place") from error
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RuntimeError(
            f"{folder} has compiled kernels, and others than you can write to it: remove it, or name another place by "
            "XDG_CACHE_HOME"
        )
    variable = "TORCHINDUCTOR_CACHE_DIR"
    before = {variable: os.environ[variable]} if variable in os.environ else {}
    with contextlib.ExitStack() as stack:
        # Paths there are not quoted, either.
        spaced = len(str(folder).split()) > 1
        os.environ[variable] = stack.enter_context(tempfile.TemporaryDirectory()) if spaced else str(folder)
        try:
            yield folder
        finally:
            del os.environ[variable]
            os.environ.update(before)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _instruction_sets() -> str:
    """Those of this processor, as Linux names them."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "").partition(":")[2]
    return " ".join(sorted(flags.split()))


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
