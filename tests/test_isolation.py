# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A job on one host listens on loopback alone, and does without a host name: in a network of its own."""

import ipaddress
import json
import os
import shutil
import subprocess
import sys
from contextlib import closing

import pytest
from torchtitan.experiments.rl.unified import simple_rl_multiprocess
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.isolation import other_users
from torchtitan.experiments.rl.unified.preflight import check

# Runs a job on a host of another name and prints what listened meanwhile, as /proc/net has it.
HOST = """
import fcntl, json, os, socket, struct, subprocess, sys, tempfile, time
hosts, command = sys.argv[1], sys.argv[2:]
with socket.socket() as s:
    for name, address in (("lo", ""), ("lo:0", "10.9.9.9")):
        if address:
            request = struct.pack("16sHH4s8x", name.encode(), socket.AF_INET, 0, socket.inet_aton(address))
            fcntl.ioctl(s, 0x8916, request)  # SIOCSIFADDR
        fcntl.ioctl(s, 0x8914, struct.pack("16sH14x", name.encode(), 0x41))  # SIOCSIFFLAGS: up, running
socket.sethostname("elsewhere")
with tempfile.NamedTemporaryFile("w") as file:
    print("127.0.0.1 localhost", hosts, sep="\\n", file=file, flush=True)
    subprocess.run(["mount", "--bind", file.name, "/etc/hosts"], check=True)
job = subprocess.Popen(command, stdout=sys.stderr)
found = set()
while job.poll() is None:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in open(table).readlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A":  # LISTEN
                found.add(local.split(":")[0])
    time.sleep(0.2)
print(json.dumps([job.returncode, sorted(found)]))
"""
NAMESPACES = ["unshare", "--user", "--map-root-user", "--net", "--uts", "--mount"]
FLAGS = "--training.steps 1 --evaluation.interval 0 --metrics.no-enable_tensorboard"
FLAGS += " --generator.tensor_parallel_degree 2 --parallelism.tensor_parallel_degree 2"
FLAGS += " --parallelism.data_parallel_replicate_degree 1"


def address(words: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Of /proc/net's hexadecimal words, each in this machine's order of bytes."""
    parts = [bytes.fromhex(words[i : i + 8])[::-1] for i in range(0, len(words), 8)]
    found = ipaddress.ip_address(b"".join(parts))
    return getattr(found, "ipv4_mapped", None) or found


def test_addresses_are_read():
    assert str(address("0100007F")) == "127.0.0.1" and str(address("0" * 8)) == "0.0.0.0"
    assert address("0" * 24 + "01000000").is_loopback and not address("0" * 32).is_loopback
    assert str(address("0" * 16 + "FFFF00000909090A")) == "10.9.9.9"


@pytest.mark.slow
@pytest.mark.parametrize("hosts", ["10.9.9.9 elsewhere", ""], ids=["a name that is not loopback", "no name"])
def test_a_job_listens_on_loopback_alone(hosts, tmp_path):
    if not shutil.which("unshare") or subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode:
        pytest.skip("this kernel gives no network namespace")
    job = [sys.executable, simple_rl_multiprocess.__file__, "--job.dump_folder", str(tmp_path / "run"), *FLAGS.split()]
    command = [*NAMESPACES, sys.executable, "-c", HOST, hosts, *job]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    status, listeners = json.loads(ran.stdout.splitlines()[-1])
    assert status == 0, ran.stderr
    assert listeners and all(address(words).is_loopback for words in listeners), [*map(address, listeners)]


@pytest.mark.skipif(os.getuid() != 0, reason="starts a process of another user")
def test_other_users_are_a_warning(tmp_path):
    flags = ["--job.dump_folder", str(tmp_path / "run"), "--evaluation.interval", "0"]
    with subprocess.Popen(["sleep", "100"], user=4321) as process:
        try:
            with closing(check(load_job_config(flags))) as job:
                assert any(line.startswith("4321 can reach this job's") for line in job.warnings)
        finally:
            process.kill()
    assert "4321" not in other_users()
