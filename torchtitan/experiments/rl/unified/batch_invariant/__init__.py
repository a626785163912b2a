# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Forward arithmetic in which a row has the same bits whatever the other rows are."""

from torchtitan.experiments.rl.unified.batch_invariant.mode import backward_arithmetic, batch_invariant_mode
from torchtitan.experiments.rl.unified.batch_invariant.support import check_supported

__all__ = ["backward_arithmetic", "batch_invariant_mode", "check_supported"]
