# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""DAPO's asymmetric clip."""

from torchtitan.experiments.rl.unified.algorithms.losses.base import ClippedLoss


class DAPO(ClippedLoss):
    """The clipped surrogate with a wider range upwards, which leaves room for unlikely tokens to grow.

    Source: DAPO, arXiv:2503.14476, eq. 8 and section 3.1.
    """
