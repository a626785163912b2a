# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Variables of the environment that no job can work with. Loads no torch."""

import os
from collections.abc import Iterator


def environment_problems() -> Iterator[str]:
    """A line for each variable that asks vLLM or torch for what cannot be done here."""
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0") != "0":
        yield (
            f"VLLM_USE_V2_MODEL_RUNNER={os.environ['VLLM_USE_V2_MODEL_RUNNER']}: log-probs of vLLM's other runner are "
            "not the trainer's; unset it"
        )
    if (file := os.environ.get("VLLM_LOGGING_CONFIG_PATH")) and not os.path.isfile(file):
        yield f"VLLM_LOGGING_CONFIG_PATH={file}: there is no such file; unset it"
    if os.environ.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL":
        yield "TORCH_DISTRIBUTED_DEBUG=DETAIL: process groups of one rank do not work with it; set INFO, or unset it"
