# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The optimizer's settings on a resume: the job's, whatever the checkpoint was saved with."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@contextmanager
def kept_settings(optimizers: Iterable[Optimizer], schedulers: Iterable[LambdaLR]) -> Iterator[None]:
    """A block that loads a checkpoint: moments and the schedule's position come from there; learning rate, betas, eps,
    weight decay and schedule stay what they were built with.

    Args:
        optimizers: with one scheduler each.
        schedulers: in the same order.
    """
    pairs = list(zip(optimizers, schedulers, strict=True))
    built = [
        ([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups], scheduler.base_lrs)
        for optimizer, scheduler in pairs
    ]
    yield
    for (optimizer, scheduler), (settings, rates) in zip(pairs, built, strict=True):
        scheduler.base_lrs = rates
        for group, own, rate, factor in zip(optimizer.param_groups, settings, rates, scheduler.lr_lambdas, strict=True):
            group.update(own, lr=rate * factor(scheduler.last_epoch))
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
