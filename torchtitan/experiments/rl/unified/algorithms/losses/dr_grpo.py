# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Dr. GRPO."""

from torchtitan.experiments.rl.unified.algorithms.losses.grpo import GRPO


class DrGRPO(GRPO):
    """GRPO's terms divided by a constant: the length of a completion does not change what its tokens weigh.

    Source: Understanding R1-Zero-Like Training, arXiv:2503.20783, section 3.
    """

    normalization = "constant"
