# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Whether this machine lets a job's processes do what each of them will: each is tried once, here."""

import os
import resource
import socket
import tempfile

from torchtitan.experiments.rl.unified.config.derived import on_many_hosts, trainer_ranks
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.isolation import ADDRESS, LONGEST_PATH
from torchtitan.experiments.rl.unified.weights.checksum import library

# Files and sockets that one process of a job has open, at most, beside one for each other process.
_FILES = 96


def check_kernels(config: JobConfig) -> None:
    """The kernels that processes of the job run are compiled, and can be loaded.

    Raises:
        ValueError: says what keeps them from it.
    """
    try:
        library()
        if config.parity.check != "off":
            this_device().load_kernels()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"compiled kernels: {error}") from error


def check_temporary_folder(config: JobConfig) -> None:
    """Sockets can be made in the folder for temporary files.

    Raises:
        ValueError: names the folder and what is wrong with it.
    """
    name = os.environ.get("TMPDIR", "")
    if name and not (os.path.isdir(name) and os.access(name, os.W_OK | os.X_OK)):
        raise ValueError(f"TMPDIR={name} is no folder that can be written in: make it, or unset TMPDIR")
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryDirectory(dir=folder if len(folder) <= LONGEST_PATH else "/tmp") as place:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(f"{place}/socket")
    except OSError as error:
        raise ValueError(f"no socket can be made in the folder for temporary files ({error}): set TMPDIR") from None


def check_network(config: JobConfig) -> None:
    """Processes of this host can talk to each other.

    Raises:
        ValueError: names what they cannot use.
    """
    here = {name for _, name in socket.if_nameindex()}
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # NCCL's may begin with "=" (this one) or "^" (not this one), and be a beginning of names.
        asked = [name.strip() for name in os.environ.get(variable, "").lstrip("=").split(",")]
        for name in filter(None, asked):
            if not name.startswith("^") and not any(each.startswith(name) for each in here):
                raise ValueError(f"{variable}={name}: there is no such interface, but {', '.join(sorted(here))}")
    if on_many_hosts(config):
        return
    try:
        with socket.create_server((ADDRESS, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        raise ValueError(
            f"processes of this host cannot reach each other by {ADDRESS} ({error.strerror or error}): is the loopback "
            "interface up? (ip link set lo up)"
        ) from None


def check_open_files(config: JobConfig) -> None:
    """A process of the job may have as many files and sockets open as it takes.

    Raises:
        ValueError: says the limit, and what raises it.
    """
    ranks = trainer_ranks(config) + config.generator.replicas * config.generator.tensor_parallel_degree
    needed, (limit, _) = _FILES + 8 * ranks, resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise ValueError(
            f"a process here may open {limit} files, and one of this job takes {needed}: ulimit -n {needed}"
        )


CHECKS = (check_kernels, check_temporary_folder, check_network, check_open_files)
