# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""VLLM_BATCH_INVARIANT=1 on vLLM's CPU platform. Importing this module imports vLLM."""

import torch
from torch import nn
from torchtitan.experiments.rl.unified.batch_invariant.mode import enter
from vllm.model_executor.determinism import batch_invariant as vllm_batch_invariant
from vllm.model_executor.layers import utils as vllm_linear


def enable_for_vllm_process() -> None:
    """Makes this vLLM process on a CPU compute row-invariantly, for good; a second call changes nothing.

    Symptom: VLLM_BATCH_INVARIANT=1 stops a CPU worker at start.
    Cause: vLLM 0.32 puts Triton kernels under the CPU dispatch key (`init_batch_invariance`).
    Here: its initialisation does nothing, its linears call torch's, and torch's kernels are this package's.
    Goes: when vLLM has a batch-invariant mode for the CPU.
    """
    if vllm_batch_invariant.init_batch_invariance is _already_on:
        return
    vllm_batch_invariant.init_batch_invariance = _already_on
    use_torch_linears()
    # Compiled code has tails of its own, and bypasses the kernels.
    torch._dynamo.config.disable = True
    enter()


def use_torch_linears() -> None:
    """Makes the CPU linears of models that this vLLM process loads from now on compute from their weights.

    Symptom: weights that are updated in place change nothing; a row's bits depend on the other rows.
    Cause: vLLM 0.32's CPU linears compute from packed copies, by kernels that are not row-invariant.
    Goes: when vLLM has linears without copies.
    """
    vllm_linear.dispatch_cpu_unquantized_gemm = _use_torch_linear


def _already_on() -> None:
    """Stands in for vLLM's `init_batch_invariance`."""


def _use_torch_linear(layer: nn.Module, remove_weight: bool) -> None:
    """Stands in for vLLM's `dispatch_cpu_unquantized_gemm`: computes from the weight itself, which therefore stays."""
    layer.cpu_linear = nn.functional.linear
