#!/bin/bash
# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

# Sets up what is missing, then runs the tests. Arguments go to pytest: bash scripts/run_tests.sh -k import
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"
exec python -m pytest "$@"
