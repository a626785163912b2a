# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What `[cluster]` may say, checked before anything starts."""

import socket

import pytest
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.preflight import cluster as hosts


@pytest.fixture
def worker():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"tcp://127.0.0.1:{listening.getsockname()[1]}"


def complaint(*flags: str) -> str:
    with pytest.raises(ValueError) as caught:
        hosts.check_cluster(load_job_config(list(flags)))
    return str(caught.value)


def test_workers_must_be_there(worker):
    hosts.check_cluster(load_job_config([]))
    hosts.check_cluster(load_job_config(["--cluster.trainer", worker, "--cluster.address", "tcp://127.0.0.1:0"]))
    assert "'node1' is no address of a Monarch worker" in complaint("--cluster.trainer", "node1")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"tcp://127.0.0.1:{closed.getsockname()[1]}"
    assert f"[cluster] generators: '{nobody}' cannot be reached" in complaint("--cluster.generators", nobody)
    assert "start a worker for each" in complaint("--cluster.trainer", worker, "--cluster.generators", worker)
    assert "cannot be used here" in complaint("--cluster.trainer", worker, "--cluster.address", worker)


def test_workers_must_be_able_to_answer(worker, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert '"tcp" is this host\'s name, and localhost stands for no address' in complaint("--cluster.trainer", worker)
    monkeypatch.setattr(socket, "gethostname", lambda: "192.0.2.2")
    hosts.check_cluster(load_job_config(["--cluster.trainer", worker]))


def test_ranks_divide_among_their_workers(worker):
    two = [worker, worker.replace("127.0.0.1", "localhost")]
    flags = ["--cluster.address", "tcp://127.0.0.1:0", "--parallelism.data_parallel_replicate_degree"]
    hosts.check_cluster(load_job_config([*flags, "4", "--cluster.trainer", *two]))
    assert "names 2 workers, which the trainer's 3 ranks" in complaint(*flags, "3", "--cluster.trainer", *two)
