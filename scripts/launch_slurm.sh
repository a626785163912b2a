#!/bin/bash
# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

# The RL job on the hosts of a SLURM allocation: srun starts a Monarch worker on each, [cluster] is filled with them.
#
#     sbatch --nodes 4 --ntasks-per-node 1 scripts/launch_slurm.sh --job.config_file X.toml --weight_sync.transport monarch
#
# The first half of the hosts trains, or as many as RL_TRAINER_HOSTS says; the others generate. Every host needs this
# repository, its environment (bash scripts/setup_env.sh) and the job's folders at the same place. RL_PORT: 26600.
set -euo pipefail
if [[ ${1:-} == --worker ]]; then  # What srun runs on each host: the port, then all hosts in SLURM's order.
    port=$2 hosts=("${@:3}")
    exec python -c 'import sys
from monarch.actor import run_worker_loop_forever as run
run(ca="trust_all_connections", address=sys.argv[1])' "tcp://${hosts[$SLURM_NODEID]}:$port"
fi
# sbatch runs a copy of this file: the repository is where the job was submitted from.
ROOT="${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)}"
fail() { echo "error: $1" >&2; exit 1; }
[[ -e $ROOT/scripts/launch_slurm.sh ]] || fail "$ROOT is not this repository: submit the job from its top folder"
[[ -n ${SLURM_JOB_NODELIST:-} ]] || fail "this runs in a SLURM allocation: sbatch --nodes N scripts/launch_slurm.sh"
[[ -e $ROOT/.venv/bin/activate ]] || fail "there is no environment in $ROOT: bash scripts/setup_env.sh"
source "$ROOT/.venv/bin/activate"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
count=${#hosts[@]} port=${RL_PORT:-26600}
trainers=${RL_TRAINER_HOSTS:-$((count / 2))}
((trainers > 0 && trainers < count)) || fail "of $count hosts $trainers cannot train: some train and some generate"
workers=("${hosts[@]/#/tcp://}")
workers=("${workers[@]/%/:$port}")
srun --nodes "$count" --ntasks "$count" --ntasks-per-node 1 --kill-on-bad-exit=1 \
    bash "$ROOT/scripts/launch_slurm.sh" --worker "$port" "${hosts[@]}" &
workers_running=$!
trap 'kill $workers_running 2>/dev/null; wait $workers_running 2>/dev/null || true' EXIT
for host in "${hosts[@]}"; do
    for ((second = 0; ; second++)); do
        if (: >"/dev/tcp/$host/$port") 2>/dev/null; then break; fi
        kill -0 $workers_running 2>/dev/null || fail "the workers ended: see srun's output above"
        ((second < 300)) || fail "the worker on $host does not answer at port $port"
        sleep 1
    done
done
python "$ROOT/torchtitan/experiments/rl/unified/simple_rl_multiprocess.py" "$@" \
    --cluster.address "tcp://${SLURMD_NODENAME:-${hosts[0]}}:0" \
    --cluster.trainer "${workers[@]:0:trainers}" --cluster.generators "${workers[@]:trainers}"
