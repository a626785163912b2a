# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The paged attention of the generator: this project's kernel as a vLLM attention backend for the CPU.

Importing this module imports vLLM.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchtitan.experiments.rl.unified.devices.checks import check_heads
from torchtitan.experiments.rl.unified.devices.cpu.attention import BLOCK_MULTIPLE, DTYPES, HEAD_SIZES, paged_attention
from vllm.config import get_current_vllm_config
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import KVCacheLayout


def register_attention_backend() -> None:
    """Makes vLLM's CPU platform choose this backend in this process; a second call changes nothing."""
    register_backend(
        AttentionBackendEnum.CPU_ATTN, f"{BatchInvariantBackend.__module__}.{BatchInvariantBackend.__qualname__}"
    )


class BatchInvariantBackend(AttentionBackend):
    """Stands in for vLLM's CPU_ATTN, whose tiles depend on the number of queries."""

    supported_dtypes = [torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes = ["auto", "bfloat16"]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return AttentionBackendEnum.CPU_ATTN.name

    @staticmethod
    def get_impl_cls() -> type["BatchInvariantImpl"]:
        return BatchInvariantImpl

    @staticmethod
    def get_builder_cls() -> type["BatchInvariantMetadataBuilder"]:
        return BatchInvariantMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_MULTIPLE)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # The kernel has a layout of its own inside a (block, head), so those bytes must lie together.
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True


@dataclass
class PagedMetadata:
    """What paged_attention wants to know of a batch; `paged_attention` names the shapes."""

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor


class BatchInvariantMetadataBuilder(AttentionMetadataBuilder[PagedMetadata]):
    """Passes vLLM's description of the batch on."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PagedMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise ValueError(_refusal("non-causal attention"))
        return PagedMetadata(
            common.num_actual_tokens,
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            common.slot_mapping,
        )


class BatchInvariantImpl(AttentionImpl[PagedMetadata]):
    """Writes the batch's keys and values into the cache and attends, in one call of the kernel.

    Raises:
        ValueError: for a model that uses a feature of attention that the kernel has not.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        model_config = get_current_vllm_config().model_config
        cache_dtype = kv_cache_dtype_str_to_dtype(kv_cache_dtype, model_config)
        refused = {
            "a sliding window": sliding_window is not None,
            "ALiBi": alibi_slopes is not None,
            "a soft cap on the scores": bool(logits_soft_cap),
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
            f"a KV cache in {kv_cache_dtype} for a model in {model_config.dtype}": cache_dtype != model_config.dtype,
            "a KV cache shared between layers": kv_sharing_target_layer_name is not None,
            "attention sinks": sinks is not None,
        }
        for feature, used in refused.items():
            if used:
                raise ValueError(_refusal(feature))
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        try:
            check_heads("a CPU", HEAD_SIZES, DTYPES, head_size, num_heads, self.num_kv_heads, cache_dtype)
        except ValueError as error:
            raise ValueError(_refusal(str(error))) from None

    def forward(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PagedMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes `output` [tokens, heads, head_size]; rows beyond the batch's tokens keep what they held."""
        assert output_scale is None and output_block_scale is None, "vLLM asks fused_output_quant_supported() first"
        if attn_metadata is None:  # vLLM's profile run has no batch
            return output.zero_()
        tokens = attn_metadata.num_actual_tokens
        paged_attention(
            query[:tokens],
            key,
            value,
            kv_cache,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            attn_metadata.slot_mapping,
            self.scale,
            output,
        )
        return output


def _refusal(feature: str) -> str:
    return f'batch-invariant attention does not cover {feature}; [parity] check = "off" runs vLLM\'s own attention'
