#!/bin/bash
# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

# Sets up what is missing, then runs the RL job. Arguments go to it: bash scripts/run_rl.sh --training.steps 10
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
exec python "$ROOT/torchtitan/experiments/rl/unified/simple_rl_multiprocess.py" "$@"
