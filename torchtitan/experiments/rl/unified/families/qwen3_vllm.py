# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The VLLM_COMPAT generator: vLLM's own Qwen3, reading TorchTitan's names. Importing this module imports vLLM."""

from collections.abc import Iterable, Iterator

import torch
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.devices.cpu.vllm import use_torch_linears
from torchtitan.experiments.rl.unified.families import model_of_checkpoint
from torchtitan.experiments.rl.unified.families.tensors import find_weights, load_matched
from torchtitan.experiments.rl.unified.weights.placement import Placement
from torchtitan.models.qwen3 import Qwen3ModelArgs, Qwen3StateDictAdapter
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM


class VllmPolicyForCausalLM(Qwen3ForCausalLM):
    """vLLM's Qwen3ForCausalLM with weights that can be replaced in place, under TorchTitan's names.

    Args:
        vllm_config: vLLM's configuration.
        prefix: vLLM's module prefix; empty for a top-level model.

    Raises:
        ValueError: the checkpoint or the engine's arguments ask for quantised weights.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if vllm_config.quant_config is not None:
            raise ValueError(
                f'[rl] mode = "vllm_compat" does not cover {vllm_config.quant_config.get_name()} weights, whatever '
                "[parity] check is: take a checkpoint without quantization_config in its config.json"
            )
        # A packed copy of a weight would outlive an update of the weight.
        use_torch_linears()
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.checkpoint = vllm_config.model_config.model
        self.adapter = Qwen3StateDictAdapter(Qwen3ModelArgs(enable_weight_tying=self.config.tie_word_embeddings), None)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads the checkpoint into the parameters, fused ones included.

        Args:
            weights: vLLM's reading of it, left unread: which files and tensors count, the trainer must say too.

        Returns:
            Names of this module's parameters that were written.

        Raises:
            ValueError: what is wrong with the checkpoint.
        """
        stored = load_matched(*find_weights(model_of_checkpoint(self.checkpoint), self.checkpoint))
        named = dict(self._hf_names(stored))
        self.checkpoint_names = named.keys()
        return super().load_weights(named.items())

    @torch.no_grad()
    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], lasting: bool = False) -> None:
        """Copies full tensors, named as in the TrainSpec model's state dict, into the parameters, in place.

        Args:
            weights: name and tensor of each.
            lasting: of no use here: parameters are fused from several of them.

        Raises:
            KeyError: a name is not one of TorchTitan's.
            ValueError: the names are not those of the weights that were loaded; nothing is copied then.
        """
        named = dict(self._hf_names(weights))
        if named.keys() != self.checkpoint_names:
            difference = sorted(named.keys() ^ self.checkpoint_names)
            raise ValueError(f"a weight update must bring each parameter: {difference} do not match")
        super().load_weights(named.items())
        this_device().weights_changed(self)

    def placements(self) -> dict[str, Placement]:
        """Where this rank holds what of each of TorchTitan's parameters: found in vLLM's layers, not by its loader."""
        placed: dict[str, Placement] = {}
        for path, module in self.named_modules():
            name, _, fused = path.rpartition(".")
            weights = [param.detach() for _, param in module.named_parameters(recurse=False)]
            if isinstance(module, QKVParallelLinear):
                groups = module.tp_rank // module.num_kv_head_replicas
                parts = [("q_proj", module.num_heads, module.total_num_heads, module.tp_rank)]
                parts += [(kv, module.num_kv_heads, module.total_num_kv_heads, groups) for kv in ("k_proj", "v_proj")]
                size = module.head_size
                rows = [(f"{name}.{part}", n * size, total * size, rank) for part, n, total, rank in parts]
                placed |= _stacked(weights[0], rows)
            elif isinstance(module, MergedColumnParallelLinear):
                names = [f"{name}.{part}" for part in self.packed_modules_mapping[fused]]
                sizes = zip(names, module.output_partition_sizes, module.output_sizes, strict=True)
                placed |= _stacked(weights[0], [(part, rows, total, module.tp_rank) for part, rows, total in sizes])
            elif isinstance(module, RowParallelLinear):
                shape = (weights[0].shape[0], module.input_size)
                placed[path] = Placement(weights[0], shape, (0, module.tp_rank * weights[0].shape[1]))
            elif isinstance(module, VocabParallelEmbedding):
                start, end = module.shard_indices.org_vocab_start_index, module.shard_indices.org_vocab_end_index
                local = weights[0][: end - start]  # Rows after that only fill up.
                placed[path] = Placement(local, (module.org_vocab_size, local.shape[1]), (start, 0))
            elif weights:
                placed[path] = Placement(weights[0], tuple(weights[0].shape), (0,) * weights[0].ndim)
        named = self.adapter.from_hf({f"{path}.weight": placement for path, placement in placed.items()})
        if self.config.tie_word_embeddings:
            named.pop("output.weight", None)  # the embedding's, under a second name
        return named

    def _hf_names(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        tied = {"output.weight", "lm_head.weight"} if self.config.tie_word_embeddings else set()
        for name, tensor in weights:
            if name in tied:  # it is the embedding's
                continue
            if name.startswith(("model.", "lm_head.")):
                yield name, tensor
            elif hf := self.adapter.to_hf({name: tensor}):
                yield from hf.items()
            else:
                raise KeyError(name)


def _stacked(weight: torch.Tensor, parts: list[tuple[str, int, int, int]]) -> dict[str, Placement]:
    """Parts (name, rows here, rows in all, which share of them this is) that lie one after the other in `weight`."""
    placed, start = {}, 0
    for name, rows, total, share in parts:
        local = weight[start : start + rows]
        placed[name] = Placement(local, (total, weight.shape[1]), (share * rows, 0))
        start += rows
    return placed
