# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What keeps a job apart from strangers: it is reached from its own host alone, and its temporary files are its own."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

ADDRESS = "127.0.0.1"
# Of a folder for temporary files. Monarch and vLLM have sockets there, whose paths have at most 107 characters.
LONGEST_PATH = 60
# As Linux gives them out.
FIRST_USER, NOBODY = 1000, 65534


def stay_on_loopback() -> None:
    """Moves what gloo, NCCL and vLLM listen on to loopback, in this process and those it starts; a user's word wins."""
    for name, value in {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": ADDRESS}.items():
        os.environ.setdefault(name, value)


def keep_stores_on_loopback() -> None:
    """Stores of torch.distributed in this process; a second call changes nothing.

    Symptom: the store of a process group whose address is 127.0.0.1 answers on every interface.
    Cause: TCPStore listens on all, and torch's rendezvous hands it no socket.
    Here: it gets one that is bound to the address, if that is loopback.
    Goes: when torch binds a store to the address it is given.
    """
    from torch.distributed import TCPStore

    rendezvous = import_module("torch.distributed.rendezvous")  # The package has a function of this name.
    stock = rendezvous._create_c10d_store
    if stock.__module__ == __name__:
        return

    def create(hostname, port, rank, world_size, timeout, use_libuv=True):
        if rank or hostname != ADDRESS:
            return stock(hostname, port, rank, world_size, timeout, use_libuv)
        with socket.create_server((hostname, port)) as server:
            return TCPStore(
                hostname,
                server.getsockname()[1],
                world_size,
                is_master=True,
                timeout=timeout,
                use_libuv=use_libuv,
                master_listen_fd=server.detach(),
            )

    rendezvous._create_c10d_store = create


def free_port() -> int:
    """A TCP port of loopback that nobody listens on."""
    with socket.create_server((ADDRESS, 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def own_temporary_folder() -> Iterator[None]:
    """Gives this process and those it starts a folder of their own for temporary files, which goes with this process,
    killed or not."""
    folder = tempfile.mkdtemp(prefix="rl-", dir=None if len(tempfile.gettempdir()) <= LONGEST_PATH else "/tmp")
    # Its input ends with this process. Others of the job end some seconds later.
    script = 'trap "" INT TERM HUP; read -r _ || sleep 10; rm -rf -- "$0"'
    before = os.environ.get("TMPDIR")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(["sh", "-c", script, folder], **pipes, start_new_session=True) as watcher:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = None
            if before is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = before
            shutil.rmtree(folder, ignore_errors=True)
            watcher.communicate(b"\n")


def other_users() -> list[str]:
    """Who else, system accounts aside, has processes here that could reach this job's sockets; in a network namespace
    of its own with loopback alone, nobody."""
    if [name for _, name in socket.if_nameindex()] == ["lo"]:
        return []
    uids = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # It has just ended.
            uids.add(entry.stat().st_uid)
    return sorted(_name(uid) for uid in uids if uid >= FIRST_USER and uid not in (os.getuid(), NOBODY))


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
