# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What vLLM 0.32 needs to serve a policy on a CPU: each fix with its symptom, its cause and when it can go.

Importing this module imports vLLM.
"""

import os
from pathlib import Path

import torch
from torch import nn
from torchtitan.experiments.rl.unified.devices.cpu.linear import linear, PackedWeight
from torchtitan.experiments.rl.unified.devices.mode import enter
from vllm.model_executor.determinism import batch_invariant as vllm_batch_invariant
from vllm.model_executor.layers import utils as vllm_linear


def apply() -> None:
    """Applies every fix that an engine on a CPU needs; the second call changes nothing."""
    _seed_by_position()
    _free_with_last_process()


class PositionSeed:
    """Stands where vLLM keeps a request's `torch.Generator`: the noise of a token depends on seed and position alone.

    Args:
        seed: the request's `SamplingParams.seed`.
        output_token_ids: the request's sampled tokens; vLLM appends to this very list.
    """

    def __init__(self, seed: int, output_token_ids: list[int]) -> None:
        self.seed = seed
        self.output_token_ids = output_token_ids

    def draw(self) -> int:
        """A 31-bit seed for the next token's Gumbel noise: SplitMix64 of (seed, position) (Steele et al., 2014)."""
        mask = (1 << 64) - 1
        z = (self.seed + (len(self.output_token_ids) + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return (z ^ (z >> 31)) >> 33

    def get_offset(self) -> int:
        """There is no state to wind back when vLLM discards the sample of a half-prefilled prompt."""
        return 0

    def set_offset(self, offset: int) -> None:
        """Nothing to do, see `get_offset`."""


def _seed_by_position() -> None:
    """Per-request seeds on the CPU.

    Symptom: a request with a seed stops the engine when its prompt is prefilled in chunks ("CPU Generator does not use
    offset").
    Cause: GPUModelRunner winds the request's generator back by a CUDA offset, which a CPU generator does not have.
    Here: the generator of a request is replaced by one without state, so that a sample also survives preemption.
    Goes: when vLLM seeds CPU sampling by (seed, position).
    """
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p, TopKTopPSampler
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if "_update_states" in vars(CPUModelRunner):
        return

    stock_forward = TopKTopPSampler.forward_cpu

    def update_states(self, scheduler_output):
        result = super(CPUModelRunner, self)._update_states(scheduler_output)
        if not hasattr(self.get_model(), "update_weights"):  # Not a policy of this project's.
            return result
        for new in scheduler_output.scheduled_new_reqs:
            request = self.requests[new.req_id]
            if request.generator is not None:
                request.generator = PositionSeed(request.sampling_params.seed, request.output_token_ids)
                self.input_batch.generators[self.input_batch.req_id_to_index[new.req_id]] = request.generator
        return result

    def forward_cpu(self, logits, generators, k, p):
        if not any(isinstance(noise, PositionSeed) for noise in generators.values()):
            return stock_forward(self, logits, generators, k, p)
        logits = apply_top_k_top_p(logits, k, p)
        returned = None
        if self.logprobs_mode == "processed_logits":
            returned = logits
        elif self.logprobs_mode == "processed_logprobs":
            returned = logits.log_softmax(dim=-1, dtype=torch.float32)
        seeds = torch.randint(0, 2**31, (logits.shape[0],), dtype=torch.long)
        for row, noise in generators.items():
            seeds[row] = noise.draw()
        return (torch.ops._C.fused_gumbel_argmax(logits.to(torch.float32), seeds), returned)

    CPUModelRunner._update_states = update_states
    TopKTopPSampler.forward_cpu = forward_cpu


def _free_with_last_process() -> None:
    """Memory that the ranks of a tensor parallel engine share.

    Symptom: files of 4 MiB a rank stay in /dev/shm when an engine's processes are killed.
    Cause: vLLM's C++ removes their names when a process ends in good order.
    Here: the names go as soon as every rank has mapped the memory, which then lives as long as its last process.
    Goes: when vLLM does that.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    init = _CPUSHMDistributed._init_cpu_shm
    if init.__module__ == __name__:
        return

    def init_and_unlink(self) -> int:
        handle = init(self)
        Path("/dev/shm", f"{self.group_name}_{self.communicator.rank}").unlink()
        return handle

    _CPUSHMDistributed._init_cpu_shm = init_and_unlink


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
    """Stands in for vLLM's `dispatch_cpu_unquantized_gemm`: from the weight itself, or our packed copy of it."""
    if os.environ.get("VLLM_BATCH_INVARIANT") != "1":
        layer.cpu_linear = nn.functional.linear
        return
    layer.packed = PackedWeight(layer.weight.data)
    layer.cpu_linear = lambda x, weight, bias=None: linear(x, layer.packed, bias)
