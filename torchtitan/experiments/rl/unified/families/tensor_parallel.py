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
