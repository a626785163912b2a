# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The switch of the batch-invariant arithmetic of this process's device."""

import contextlib
import threading
from collections.abc import Iterator

from torchtitan.experiments.rl.unified.devices import this_device

_lock = threading.Lock()
_depth = 0


@contextlib.contextmanager
def batch_invariant_mode() -> Iterator[None]:
    """Inside, a row of a forward pass has the same bits whatever the other rows, their number and the threads are.

    Covered on a CPU, in fp32 and bf16: linear, mm, addmm, bmm, SiLU, and what torch computes row by row already
    (elementwise arithmetic, RMSNorm, softmax, log_softmax, embedding). On CUDA it is vLLM's batch-invariant mode.
    The whole process is switched, all its threads. Nests; the outermost exit restores torch's kernels, after an
    exception too. Autograd's formulas are torch's own; the backward is deterministic.
    """
    enter()
    try:
        yield
    finally:
        leave()


def backward_arithmetic() -> contextlib.AbstractContextManager:
    """Inside the mode, for a backward pass: products may depend on the number of rows, not on anything else.

    Gradients need one order of sums, not one for every batch. On CUDA products are faster for it; on a CPU nothing
    changes.
    """
    return this_device().backward_arithmetic()


def enter() -> None:
    """Switches on for good, or until as many `leave` as `enter` were called."""
    global _depth
    with _lock:
        if _depth == 0:
            this_device().install_arithmetic()
        _depth += 1


def leave() -> None:
    """Takes back one `enter`."""
    global _depth
    with _lock:
        assert _depth > 0, "leave() without enter()"
        _depth -= 1
        if _depth == 0:
            this_device().uninstall_arithmetic()
