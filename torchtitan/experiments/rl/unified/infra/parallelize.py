# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""How a policy is spread over ranks, in the trainer and (tensor parallel) in the generator."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, MixedPrecisionPolicy
from torch.distributed.tensor import distribute_module, distribute_tensor, DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    parallelize_module,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
)
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import NoParallel, ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.experiments.rl.unified.job_config import JobConfig
from torchtitan.experiments.rl.unified.model.attention import PackedAttention, replace_inner_attention, StockAttention
from torchtitan.experiments.rl.unified.model.compat import CompatRMSNorm, to_compat
from torchtitan.models.llama3.infra.parallelize import apply_ddp

# What selective activation checkpointing keeps: every second matrix product, and attention.
_SAVED_OPS = {torch.ops.aten.mm.default, torch.ops.unified.packed_attention.default}
# Of memory that torch allocates on a CPU, in bytes.
_ALIGNMENT = 64


def parallelize_policy(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """The TrainSpec's `parallelize_fn` for a policy: arithmetic, TP, activation checkpointing, data parallel.

    Args:
        model: a TrainSpec model on the meta device, `attn_type` "varlen".
        parallel_dims: the degrees the job runs with.
        job_config: the whole job config.

    Returns:
        The same model, parallelized in place.
    """
    if job_config.rl.mode == "vllm_compat":
        to_compat(model, job_config.parallelism.tensor_parallel_degree)
    attention = StockAttention if job_config.parity.check == "off" else PackedAttention
    replace_inner_attention(model, lambda name: attention())
    if parallel_dims.tp_enabled:
        apply_tensor_parallel(model, parallel_dims.get_mesh("tp"))
    if job_config.activation_checkpoint.mode != "none":
        folder = job_config.job.dump_folder
        apply_ac(model, job_config.activation_checkpoint, op_sac_save_list=_SAVED_OPS, base_folder=folder)
    if parallel_dims.fsdp_enabled:
        names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        apply_fully_shard(model, parallel_dims.get_mesh(names), job_config)
    elif parallel_dims.dp_replicate_enabled:
        apply_ddp(model, parallel_dims.get_mesh("dp_replicate"), enable_compile=False)
    return model


def apply_fully_shard(model: nn.Module, mesh: DeviceMesh, job_config: JobConfig) -> None:
    """FSDP2 (HSDP on a two-dimensional mesh): master weights in `training.dtype`, compute in `mixed_precision_param`.

    Args:
        model: has `tok_embeddings`, `layers`, `norm`, `output`; the ends may share one weight.
        mesh: of the data-parallel ranks.
        job_config: the whole job config.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
    )
    reshard = job_config.parallelism.fsdp_reshard_after_forward != "never"
    for block in model.layers.values():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # Tied weights must lie in one group.
    fully_shard([model.tok_embeddings, model.norm, model.output], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the step's tokens: gradients are summed. Gloo sums, but cannot scale on the way.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards the linears of a decoder-only TorchTitan model over `mesh`; activations between them stay whole.

    Every rank holds whole rows between the linears (no sequence parallelism): a batch of one token splits over any
    number of ranks, and both hosts, trainer and generator, run the same local products and the same all-reduces.
    Attention sees plain tensors with this rank's heads.

    Args:
        model: has `tok_embeddings`, `layers`, `output` with TorchTitan's names inside.
        mesh: one-dimensional.
    """
    tied = model.output.weight is model.tok_embeddings.weight
    # Each rank normalizes its own heads.
    norm, heads_norm = NoParallel(), SequenceParallel(sequence_dim=2, use_local_output=True)
    if isinstance(model.norm, CompatRMSNorm):
        norm = heads_norm = ReplicatedWeights()
    parallelize_module(
        model,
        mesh,
        {
            # Vocabulary-sharded on both ends, so that tied weights have one layout.
            "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
            "output": ColwiseParallel(output_layouts=Replicate()),
            "norm": norm,
        },
    )
    if tied:  # Each module got a sharded weight of its own.
        model.output.weight = model.tok_embeddings.weight
    for block in model.layers.values():
        parallelize_module(
            block,
            mesh,
            {
                "attention_norm": norm,
                "ffn_norm": norm,
                "attention.q_norm": heads_norm,
                "attention.k_norm": heads_norm,
                "attention.wq": ColwiseParallel(),
                "attention.wk": ColwiseParallel(),
                "attention.wv": ColwiseParallel(),
                "attention.wo": RowwiseParallel(input_layouts=Shard(-1), output_layouts=Replicate()),
                "feed_forward.w1": ColwiseParallel(),
                "feed_forward.w3": ColwiseParallel(),
                "feed_forward.w2": RowwiseParallel(input_layouts=Shard(-1), output_layouts=Replicate()),
            },
        )


class ReplicatedWeights(ParallelStyle):
    """Weights become replicated DTensors; inputs and outputs stay the plain tensors that the module works on itself."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh)


@torch.no_grad()
def full_to_param(full: torch.Tensor, param: nn.Parameter, lasting: bool = False) -> None:
    """Brings `full`, the same on every rank, to `param` or this rank's shard of it, without messages.

    Args:
        full: contiguous.
        param: is written in place; or, on a CPU, becomes a view of `full`.
        lasting: `full` stays as it is while `param` is used.
    """
    if isinstance(param, DTensor):
        full = full.to(param.device)
        full = distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)
    elif lasting and param.device == full.device == torch.device("cpu") and param.dtype == full.dtype:
        # A kernel may add in another order where memory is not aligned as torch's own.
        if full.data_ptr() % _ALIGNMENT == 0:
            param.data = full
            return
    param.copy_(full)
