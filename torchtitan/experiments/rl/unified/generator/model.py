# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The UNIFIED generator: any TrainSpec model, run by vLLM's engine with vLLM's paged attention. Imports vLLM."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.devices.attention import to_packed
from torchtitan.experiments.rl.unified.families import model_of_checkpoint
from torchtitan.experiments.rl.unified.families.tensors import find_weights, load_matched
from torchtitan.experiments.rl.unified.weights.placement import full_to_param, Placement
from torchtitan.models.attention import VarlenMetadata
from torchtitan.tools.utils import set_default_dtype
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention


class TorchTitanForCausalLM(nn.Module):
    """A TorchTitan model behind the interface vLLM expects of its models.

    The module tree, the parameter names and every operation are the TrainSpec model's own. Two things differ from
    training: `inner_attention` reads and writes vLLM's KV cache, and the output projection runs only on the rows that
    are sampled from (vLLM calls `compute_logits` on those).

    Args:
        vllm_config: vLLM's configuration; `additional_config["torchtitan"]` may hold `name` and `flavor` of the model,
            which its config.json says otherwise, and `weights`, the directory of those, if it is another.
        prefix: vLLM's module prefix; empty for a top-level model.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        directory = vllm_config.model_config.model
        choice = dict(vllm_config.additional_config.get("torchtitan", {}))
        self.checkpoint = choice.pop("weights", "") or directory
        self.policy = policy = model_of_checkpoint(directory, **choice)
        with set_default_dtype(vllm_config.model_config.dtype):
            self.model = policy.build(vllm_config.model_config.max_model_len)
        self.adapter = policy.train_spec().state_dict_adapter(policy.args, None)
        tensor_parallel_degree = vllm_config.parallel_config.tensor_parallel_size
        if tensor_parallel_degree > 1:
            mesh = DeviceMesh.from_group(get_tp_group().device_group, vllm_config.device_config.device_type)
            policy.family.apply_tensor_parallel(self.model, mesh)
        # Attention runs on this rank's heads only.
        sizes = policy.geometry
        policy.family.replace_attention(
            self.model,
            lambda name: PagedAttention(
                num_heads=sizes.heads // tensor_parallel_degree,
                head_size=sizes.head_size,
                scale=sizes.head_size**-0.5,
                num_kv_heads=sizes.kv_heads // tensor_parallel_degree,
                cache_config=vllm_config.cache_config,
                prefix=name,
            ),
        )
        self.requires_grad_(False)
        # The model skips an absent output projection; compute_logits applies it to the sampled rows.
        self.output = self.model.output
        self.model.output = None
        # TorchTitan's models ask for attention metadata; the paged attention has vLLM's instead.
        self.no_metadata = VarlenMetadata(None, None, 0, 0)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings of `input_ids` (tokens,), shape (tokens, dim)."""
        return self.model.tok_embeddings(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states after the last norm, (tokens, dim), of vLLM's flat batch `input_ids` (tokens,)."""
        assert (
            intermediate_tensors is None and inputs_embeds is None
        ), "pipeline stages and embeddings are not used here"
        return self.model(input_ids[None], attention_masks=self.no_metadata, positions=positions[None])[0]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits (rows, vocab) of `hidden_states` (rows, dim)."""
        return self.output(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads the checkpoint; returns the names of this module's parameters that it set.

        Args:
            weights: vLLM's reading of it, left unread: which files and tensors count, the trainer must say too.

        Raises:
            ValueError: what is wrong with the checkpoint.
        """
        checkpoint, names = find_weights(self.policy, self.checkpoint)
        state_dict = dict(load_matched(checkpoint, names))
        if checkpoint.kind == "hf":
            state_dict = self.adapter.from_hf(state_dict)
        self.update_weights((name, state_dict[name]) for name in self.named_policy_parameters())
        this_device().prepare_model(self)
        return {name for name, _ in self.named_parameters()}

    @torch.no_grad()
    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], lasting: bool = False) -> None:
        """Copies full tensors, named as in the TrainSpec model's state dict, into the parameters, in place.

        Args:
            weights: name and tensor of each.
            lasting: they stay as they are while the model uses them: on a CPU, parameters become views of them.

        Raises:
            ValueError: if the names are not those of the model's parameters; nothing is copied then.
        """
        own, given = self.named_policy_parameters(), dict(weights)
        if own.keys() != given.keys():
            raise ValueError(
                f"a weight update must bring each parameter: {sorted(own.keys() ^ given.keys())} do not match"
            )
        for name, full in given.items():
            full_to_param(full, own[name], lasting)
        this_device().weights_changed(self)

    def placements(self) -> dict[str, Placement]:
        """Where this rank holds what of each of the TrainSpec model's parameters."""
        placed = {}
        for name, param in self.named_policy_parameters().items():
            local, offsets = param.detach(), (0,) * param.ndim
            if isinstance(param, DTensor):
                local = local.to_local()
                _, offsets = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
            placed[name] = Placement(local, tuple(param.shape), tuple(offsets))
        return placed

    def named_policy_parameters(self) -> dict[str, nn.Parameter]:
        """The TrainSpec model's parameters under the names of its state dict; a tied one stands once."""
        return {name.removeprefix("model."): param for name, param in self.named_parameters()}


class PagedAttention(nn.Module):
    """vLLM's `Attention` with the signature of TorchTitan's `inner_attention`.

    Args:
        num_heads, num_kv_heads: this rank's query and key/value heads.
        head_size: size of a head.
        scale: factor on the scores.
        cache_config: vLLM's.
        prefix: name of the layer in vLLM's forward context; holds the layer's number.
    """

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, cache_config: CacheConfig, prefix: str
    ) -> None:
        super().__init__()
        self.attention = Attention(
            num_heads, head_size, scale, num_kv_heads=num_kv_heads, cache_config=cache_config, prefix=prefix
        )

    def forward(
        self,
        xq: torch.Tensor,
        xk: torch.Tensor,
        xv: torch.Tensor,
        attention_masks: Any = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attends over vLLM's KV cache, which holds the sequences; `attention_masks` and `scale` are not needed.

        Args:
            xq: (1, heads, tokens, head_dim).
            xk, xv: (1, kv_heads, tokens, head_dim).

        Returns:
            (tokens, heads * head_dim).
        """
        assert scale is None or scale == self.attention.impl.scale, (scale, self.attention.impl.scale)
        return self.attention(to_packed(xq), to_packed(xk), to_packed(xv))
