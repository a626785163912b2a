# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""How a policy is spread over the ranks of the trainer, and gathered again."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.families import Family
from torchtitan.experiments.rl.unified.messages import TensorSpec
from torchtitan.experiments.rl.unified.trainer.attention import PackedAttention, StockAttention
from torchtitan.experiments.rl.unified.weights.base import PolicyWeights
from torchtitan.models.llama3.infra.parallelize import apply_ddp

# What selective activation checkpointing keeps: every second matrix product, and attention.
_SAVED_OPS = {torch.ops.aten.mm.default, torch.ops.unified.packed_attention.default}


class MasterParallelDims(ParallelDims):
    """torchtitan's, with FSDP at every degree: it keeps weights in `training.dtype` and computes in another one.

    Args:
        dims: the degrees.
    """

    def __init__(self, dims: ParallelDims) -> None:
        degrees = [field.name for field in dataclasses.fields(dims) if not field.name.startswith("_")]
        super().__init__(**{name: getattr(dims, name) for name in degrees})

    @property
    def fsdp_enabled(self) -> bool:
        return True

    def _mesh_exist(self, name: str, degree: int) -> bool:
        return name == "fsdp" or super()._mesh_exist(name, degree)


def parallelize_policy(
    model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig, family: Family
) -> nn.Module:
    """The TrainSpec's `parallelize_fn` for a policy: arithmetic, TP, activation checkpointing, data parallel.

    Args:
        model: a TrainSpec model on the meta device, `attn_type` "varlen".
        parallel_dims: the degrees the job runs with.
        job_config: the whole job config.
        family: whose model it is.

    Returns:
        The same model, parallelized in place.
    """
    if job_config.rl.mode == "vllm_compat":
        family.to_vllm_arithmetic(model, job_config.parallelism.tensor_parallel_degree)
    attention = StockAttention if job_config.parity.check == "off" else PackedAttention
    family.replace_attention(model, lambda name: attention())
    if parallel_dims.tp_enabled:
        family.apply_tensor_parallel(model, parallel_dims.get_mesh("tp"))
    if job_config.activation_checkpoint.mode != "none":
        folder = job_config.job.dump_folder
        apply_ac(model, job_config.activation_checkpoint, op_sac_save_list=_SAVED_OPS, base_folder=folder)
    if parallel_dims.fsdp_enabled:
        names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        apply_fully_shard(model, family.fsdp_groups(model), parallel_dims.get_mesh(names), job_config)
    elif parallel_dims.dp_replicate_enabled:
        apply_ddp(model, parallel_dims.get_mesh("dp_replicate"), enable_compile=False)
    return model


def apply_fully_shard(
    model: nn.Module, groups: list[nn.Module | list[nn.Module]], mesh: DeviceMesh, job_config: JobConfig
) -> None:
    """FSDP2 (HSDP on a two-dimensional mesh): master weights in `training.dtype`, compute in `mixed_precision_param`.

    Args:
        model: the policy.
        groups: of its modules, gathered together; the last one is needed until the end.
        mesh: of the data-parallel ranks.
        job_config: the whole job config.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
    )
    reshard = job_config.parallelism.fsdp_reshard_after_forward != "never"
    for block in groups[:-1]:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(groups[-1], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the step's tokens: gradients are summed. Gloo sums, but cannot scale on the way.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def gathered_weights(model: nn.Module, dtype: torch.dtype) -> PolicyWeights:
    """Every parameter under its name, tied ones once, to arrive as `dtype`.

    Its stream is collective over the trainer: every rank must consume it. A shard is cast before it is gathered.
    """
    params = {name.replace(_CHECKPOINT_PREFIX, ""): param for name, param in model.named_parameters()}

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, param in params.items():
            yield name, param.detach().to(dtype).full_tensor() if isinstance(param, DTensor) else param.detach()

    return PolicyWeights([TensorSpec(name, dtype, tuple(p.shape)) for name, p in params.items()], stream())
