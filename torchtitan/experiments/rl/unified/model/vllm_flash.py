# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The paged attention of the generator on CUDA: vLLM's FLASH_ATTN, one tile size for every batch. Imports vLLM."""

from typing import Any

from torchtitan.experiments.rl.unified.batch_invariant.flash import LEAST_QUERIES
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend


def register_flash_backend() -> None:
    """Makes vLLM's FLASH_ATTN this module's in this process; a second call changes nothing."""
    register_backend(
        AttentionBackendEnum.FLASH_ATTN, f"{OneTileFlashBackend.__module__}.{OneTileFlashBackend.__qualname__}"
    )


class OneTileFlashBackend(FlashAttentionBackend):
    """vLLM's FLASH_ATTN; see `OneTileBuilder`."""

    @staticmethod
    def get_builder_cls() -> type["OneTileBuilder"]:
        return OneTileBuilder


class OneTileBuilder(FlashAttentionMetadataBuilder):
    """Never tells the kernel that each sequence has one query only.

    Symptom: with heads of 64 or less a token that is decoded has other bits than in a prefilled prompt, under
    VLLM_BATCH_INVARIANT=1 too.
    Cause: where no sequence has more than one query FlashAttention 3 drops the causal mask, and with it changes the
    number of keys that it sums at a time.
    Here: the number it is given is an upper bound, of at least 2.
    Goes: when vLLM's batch-invariant mode covers such heads.
    """

    def build(self, *args: Any, **kwargs: Any) -> FlashAttentionMetadata:
        metadata = super().build(*args, **kwargs)
        metadata.max_query_len = max(LEAST_QUERIES, metadata.max_query_len)
        return metadata
