# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""How a policy is spread over ranks, in the trainer and (tensor parallel) in the generator."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import distribute_tensor, DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module, RowwiseParallel
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.experiments.rl.unified.job_config import JobConfig
from torchtitan.experiments.rl.unified.model.attention import PackedAttention, replace_inner_attention
from torchtitan.experiments.rl.unified.model.compat import to_compat
from torchtitan.models.llama3.infra.parallelize import apply_ddp


def parallelize_policy(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """The TrainSpec's `parallelize_fn` for a policy: arithmetic, then TP, then activation checkpointing, then DDP.

    Args:
        model: a TrainSpec model on the meta device, `attn_type` "varlen".
        parallel_dims: the degrees the job runs with.
        job_config: the whole job config.

    Returns:
        The same model, parallelized in place.
    """
    if job_config.rl.mode == "vllm_compat":
        to_compat(model)
    replace_inner_attention(model, lambda name: PackedAttention())
    if parallel_dims.tp_enabled:
        apply_tensor_parallel(model, parallel_dims.get_mesh("tp"))
    if job_config.activation_checkpoint.mode != "none":
        apply_ac(model, job_config.activation_checkpoint, base_folder=job_config.job.dump_folder)
    if parallel_dims.dp_replicate_enabled:
        apply_ddp(model, parallel_dims.get_mesh("dp_replicate"), enable_compile=False)
    return model


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards the linears of a decoder-only TorchTitan model over `mesh`; activations between them stay whole.

    Every rank holds whole rows between the linears (no sequence parallelism): a batch of one token splits over any
    number of ranks, and both hosts, trainer and generator, run the same local products and the same all-reduces.
    Attention sees plain tensors with this rank's heads.

    Args:
        model: has `tok_embeddings`, `layers`, `output` with TorchTitan's names inside.
        mesh: one-dimensional.
    """
    parallelize_module(
        model,
        mesh,
        {
            # Vocabulary-sharded on both ends, so that tied weights have one layout.
            "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
            "output": ColwiseParallel(output_layouts=Replicate()),
        },
    )
    for block in model.layers.values():
        parallelize_module(
            block,
            mesh,
            {
                "attention.wq": ColwiseParallel(),
                "attention.wk": ColwiseParallel(),
                "attention.wv": ColwiseParallel(),
                "attention.wo": RowwiseParallel(input_layouts=Shard(-1), output_layouts=Replicate()),
                "feed_forward.w1": ColwiseParallel(),
                "feed_forward.w3": ColwiseParallel(),
                "feed_forward.w2": RowwiseParallel(input_layouts=Shard(-1), output_layouts=Replicate()),
            },
        )


@torch.no_grad()
def full_to_param(full: torch.Tensor, param: nn.Parameter) -> None:
    """Copies `full`, the same on every rank, into `param` or this rank's shard of it, in place and without messages."""
    if isinstance(param, DTensor):
        full = distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)
    param.copy_(full)
