# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Rows of each family's whole model: the same bits in any pack, after any cut, on any number of threads."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torchtitan.experiments.rl.unified.devices.mode import batch_invariant_mode
from torchtitan.experiments.rl.unified.families import model_of_checkpoint
from torchtitan.experiments.rl.unified.families.tensors import find_weights, load_matched
from torchtitan.experiments.rl.unified.trainer.attention import PackedAttention
from torchtitan.models.attention import VarlenMetadata
from torchtitan.tools.utils import set_default_dtype

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import CONFIGS, write_checkpoint  # noqa: E402

LONGEST = 2000
# Complex RoPE differed from 1,001 tokens on, at 8 threads.
LENGTHS = (1, 63, 1000, 1001, 1501, LONGEST)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def model_in(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """As trainer and generator run it."""
    policy = model_of_checkpoint(str(folder))
    with torch.no_grad(), set_default_dtype(dtype):
        model = policy.build()
        model.init_weights()
    adapter = policy.train_spec().state_dict_adapter(policy.args, None)
    model.load_state_dict(adapter.from_hf(dict(load_matched(*find_weights(policy, folder)))))
    policy.family.replace_attention(model, lambda name: PackedAttention())
    return model


def logits(model: torch.nn.Module, *sequences: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(tokens, vocabulary) of each sequence (tokens,), all in one pack."""
    lengths = [len(each) for each in sequences]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    masks = VarlenMetadata(bounds, bounds, max(lengths), max(lengths))
    with torch.no_grad(), batch_invariant_mode():
        found = model(torch.cat(sequences)[None], attention_masks=masks, positions=positions[None])[0]
    return found.split(lengths)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_row_is_the_same_in_any_pack_after_any_cut_on_1_2_and_8_threads(kind, dtype, tmp_path):
    model = model_in(write_checkpoint(tmp_path, kind), dtype)
    one, other = torch.randint(512, (2, LONGEST), generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    (whole,) = logits(model, one)
    assert whole.dtype == dtype and whole.std() > 0.1
    for count in (1, 2, 8):
        torch.set_num_threads(count)
        for length in LENGTHS:
            (alone,) = logits(model, one[:length])
            assert torch.equal(alone, whole[:length]), (count, length)
        _, packed, _ = logits(model, other[:700], one, other[:33])
        assert torch.equal(packed, whole), count
