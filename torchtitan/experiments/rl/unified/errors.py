# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Every error that crosses rooms."""


class ProcessLost(RuntimeError):
    """A process of the job ended, or did not answer in time."""


class TrainerLost(ProcessLost):
    """It was one of the trainer's."""


class TrainerFailed(RuntimeError):
    """A rank of the trainer raised: started again, it would do so again."""


class WeightTransferError(RuntimeError):
    """Weights did not arrive as they were sent."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; those before it are untouched."""


class NonFiniteError(RuntimeError):
    """A step's loss or gradient norm is NaN or infinite; no optimizer step was taken."""


class ParityError(RuntimeError):
    """A sampled token whose log-prob differs between generator and trainer."""
