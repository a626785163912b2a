# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""How a model is spread over tensor parallel ranks, in the trainer and in the generator."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import distribute_module, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    parallelize_module,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
)
from torchtitan.distributed import NoParallel
from torchtitan.experiments.rl.unified.families.vllm_arithmetic import CompatRMSNorm


def shard_over(model: nn.Module, mesh: DeviceMesh, block_plan: dict[str, ParallelStyle]) -> None:
    """Shards the linears of a decoder-only TorchTitan model over `mesh`; activations between them stay whole.

    Every rank holds whole rows between the linears (no sequence parallelism): a batch of one token splits over any
    number of ranks, and both hosts, trainer and generator, run the same local products and the same all-reduces.
    Attention sees plain tensors with this rank's heads.

    Args:
        model: has `tok_embeddings`, `layers`, `norm`, `output` with TorchTitan's names inside.
        mesh: one-dimensional.
        block_plan: of each layer.
    """
    tied = model.output.weight is model.tok_embeddings.weight
    parallelize_module(
        model,
        mesh,
        {
            # Vocabulary-sharded on both ends, so that tied weights have one layout.
            "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
            "output": ColwiseParallel(output_layouts=Replicate()),
            "norm": _norm(model),
        },
    )
    if tied:  # Each module got a sharded weight of its own.
        model.output.weight = model.tok_embeddings.weight
    for block in model.layers.values():
        parallelize_module(block, mesh, block_plan)


def dense_block_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """Of a layer with an attention and a dense MLP, by TorchTitan's names; each rank has its own heads."""
    return {
        "attention_norm": _norm(model),
        "ffn_norm": _norm(model),
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(input_layouts=Shard(-1), output_layouts=Replicate()),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w3": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(input_layouts=Shard(-1), output_layouts=Replicate()),
    }


def heads_norm_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """Of norms over each head of queries and keys: each rank normalizes its own heads."""
    compat = isinstance(model.norm, CompatRMSNorm)
    style = ReplicatedWeights() if compat else SequenceParallel(sequence_dim=2, use_local_output=True)
    return {"attention.q_norm": style, "attention.k_norm": style}


def _norm(model: nn.Module) -> ParallelStyle:
    return ReplicatedWeights() if isinstance(model.norm, CompatRMSNorm) else NoParallel()


class ReplicatedWeights(ParallelStyle):
    """Weights become replicated DTensors; inputs and outputs stay the plain tensors that the module works on itself."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh)
