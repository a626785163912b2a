# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What the numbers of a job config may be. Needs the standard library alone."""

from dataclasses import dataclass

# Past this a number of steps, tokens or processes is a slip of the finger.
MOST = 2**40


@dataclass(frozen=True)
class Range:
    """The numbers that mean something for a key, as `Annotated[int, Range(1)]`; of a list or a table, each of its own.

    Attributes:
        least, most: bounds that are allowed themselves.
        above, below: bounds that are not.
        also: single values outside of them, such as a -1 that stands for "all".
    """

    least: float | None = None
    most: float = MOST
    above: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()

    def __contains__(self, value: float) -> bool:
        inside = (self.least is None or self.least <= value) and (self.above is None or self.above < value)
        return value in self.also or (inside and value <= self.most and (self.below is None or value < self.below))

    def __str__(self) -> str:
        bounds = [f"at least {self.least:g}"] if self.least is not None else []
        bounds += [f"above {self.above:g}"] if self.above is not None else []
        bounds += [f"below {self.below:g}"] if self.below is not None else []
        bounds += [f"at most {self.most:g}"] if self.below is None and (self.most != MOST or not bounds) else []
        return " or ".join([*(f"{value:g}" for value in self.also), " and ".join(bounds)])


COUNT = Range(1)
COUNT_OR_NONE = Range(0)
SECONDS = Range(above=0, most=1e7)
# vLLM's own limits; what lies between 0 and 0.01 it raises to 0.01, another distribution than the trainer's.
TEMPERATURE = Range(0.01, 2, also=(0,))
SEED = Range(0, 2**63 - 1)

# torchtitan's dataclasses have no ranges. Keys that this trainer refuses need none.
TORCHTITAN = {
    "optimizer.lr": Range(0, 1),
    "optimizer.beta1": Range(0, below=1),
    "optimizer.beta2": Range(0, below=1),
    "optimizer.eps": Range(above=0, most=1),
    "optimizer.weight_decay": Range(0, 100),
    "lr_scheduler.warmup_steps": COUNT_OR_NONE,
    "lr_scheduler.total_steps": COUNT,
    "lr_scheduler.decay_ratio": Range(0, 1),
    "lr_scheduler.min_lr_factor": Range(0, 1),
    "training.seq_len": Range(2),
    "training.max_norm": Range(above=0),
    "training.steps": COUNT,
    "training.gc_freq": COUNT,
    "parallelism.data_parallel_replicate_degree": COUNT,
    "parallelism.data_parallel_shard_degree": Range(1, also=(-1,)),
    "parallelism.tensor_parallel_degree": COUNT,
    "checkpoint.interval": COUNT,
    # One would leave none while it is written.
    "checkpoint.keep_latest_k": Range(2, also=(0,)),
    "checkpoint.load_step": Range(0, also=(-1,)),
    "comm.init_timeout_seconds": Range(1, 1e7),
    "comm.trace_buf_size": COUNT_OR_NONE,
    "debug.seed": SEED,
}
