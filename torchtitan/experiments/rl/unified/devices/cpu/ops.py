# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Row-invariant matrix products and SiLU on a CPU, in the place of torch's."""

from torchtitan.experiments.rl.unified.devices.cpu.linear import library


def install() -> None:
    """Puts the row-invariant kernels in the place of torch's, in the whole process."""
    library().install()


def uninstall() -> None:
    """Gives torch its kernels back."""
    library().uninstall()
