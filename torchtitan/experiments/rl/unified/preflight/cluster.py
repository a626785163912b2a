# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Whether the hosts of `[cluster]` answer and fit the layout."""

import ipaddress
import socket
from urllib.parse import urlsplit

from torchtitan.experiments.rl.unified.config.derived import trainer_ranks
from torchtitan.experiments.rl.unified.config.load import JobConfig

_CONNECT_SECONDS = 5


def check_cluster(config: JobConfig) -> None:
    """Every worker of `[cluster]` answers, and the layout fits them.

    Raises:
        ValueError: names the key, the address and what is wrong with it.
    """
    cluster = config.cluster
    for key in ("trainer", "generators"):
        for address in getattr(cluster, key):
            where = f"[cluster] {key}: {address!r}"
            parts = urlsplit(address)
            if parts.scheme != "tcp" or not parts.hostname or not parts.port:
                raise ValueError(f'{where} is no address of a Monarch worker; it looks like "tcp://host:port"')
            try:
                socket.create_connection((parts.hostname, parts.port), _CONNECT_SECONDS).close()
            except OSError as error:
                raise ValueError(
                    f"{where} cannot be reached ({error}); start a worker there: python -c 'from monarch.actor import "
                    "run_worker_loop_forever as run; "
                    f'run(ca="trust_all_connections", address="{address}")\''
                ) from error
    if shared := set(cluster.trainer) & set(cluster.generators):
        raise ValueError(f"[cluster] {shared.pop()!r} is named for trainer and generators: start a worker for each")
    if not (cluster.trainer or cluster.generators):
        return
    if cluster.trainer and (ranks := trainer_ranks(config)) % len(cluster.trainer):
        raise ValueError(
            f"[cluster] trainer names {len(cluster.trainer)} workers, which the trainer's {ranks} ranks do not divide "
            "among: each takes as many as the others; [parallelism] says how many there are"
        )
    if cluster.address == "tcp" and not _reachable(name := socket.gethostname()):
        raise ValueError(
            f'[cluster] address = "tcp" is this host\'s name, and {name} stands for no address that other hosts reach: '
            'set it to one, such as "tcp://10.0.0.1:0"'
        )
    parts = urlsplit(cluster.address)
    if parts.port:
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((parts.hostname, parts.port))
        except OSError as error:
            raise ValueError(f"[cluster] address {cluster.address!r} cannot be used here: {error}") from error


def _reachable(name: str) -> bool:
    """Whether a host's name stands for an address that other hosts may reach."""
    try:
        found = [ipaddress.ip_address(address[0].partition("%")[0]) for *_, address in socket.getaddrinfo(name, None)]
    except OSError:
        return False
    return any(not (address.is_loopback or address.is_link_local) for address in found)
