# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Where the processes of a job run: Monarch host meshes, by `[cluster]`."""

from torchtitan.experiments.rl.unified.config.derived import on_many_hosts
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.errors import ParityError


class Hosts:
    """The host meshes of a job.

    Args:
        config: the job, checked.

    Attributes:
        trainer: of the trainer's ranks.
        generators: one for each replica.
    """

    def __init__(self, config: JobConfig) -> None:
        from monarch.actor import attach_to_workers, enable_transport, this_host

        cluster, replicas = config.cluster, config.generator.replicas
        if on_many_hosts(config):
            enable_transport(cluster.address)

        def attach(workers: list[str]):
            return attach_to_workers(ca="trust_all_connections", workers=workers)

        self.trainer = attach(cluster.trainer) if cluster.trainer else this_host()
        if cluster.generators:
            hosts = [attach([worker]) for worker in cluster.generators]
            self.generators = [hosts[replica % len(hosts)] for replica in range(replicas)]
        else:
            self.generators = [this_host()] * replicas


def bind_to_cores(cores: str, ranks: int) -> list[dict[str, str]] | None:
    """Monarch's `proc_bind` of `ranks` processes that share the CPU cores in `cores`, such as "0-3,8"; "": any."""
    return [{"cpus": cores}] * ranks if cores else None


def one_arithmetic(found: dict[str, str]) -> str:
    """What all processes compute by.

    Args:
        found: by the process's name, see `Device.arithmetic`.

    Raises:
        ParityError: names two that differ.
    """
    (first, one), *others = found.items()
    for name, other in others:
        if other != one:
            raise ParityError(
                f"{first} computes by {one}, {name} by {other}: their log-probs would differ. Run both on machines of "
                "one kind, or cap the better one with RL_CPU_ISA"
            )
    return one
