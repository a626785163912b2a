# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The paged attention of the generator on CUDA: vLLM's FLASH_ATTN, one tile size for every batch. Imports vLLM."""

from typing import Any

from torchtitan.experiments.rl.unified.devices.cuda.packed import LEAST_QUERIES
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
    """Never tells the kernel that all sequences have few queries.

    Symptom: with heads of 64 or less a token that is decoded has other bits than in a prefilled prompt, under
    VLLM_BATCH_INVARIANT=1 too.
    Cause: FlashAttention 3 chooses how many keys it sums at a time by the largest number of queries of a sequence.
    Here: the number it is given is an upper bound, beyond all that make a difference.
    Goes: when vLLM's batch-invariant mode covers such heads.
    """

    def build(self, *args: Any, **kwargs: Any) -> FlashAttentionMetadata:
        metadata = super().build(*args, **kwargs)
        metadata.max_query_len = max(LEAST_QUERIES, metadata.max_query_len)
        return metadata
