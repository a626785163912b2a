#!/bin/bash
# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

# Sets up what is missing, then runs the tests. Arguments go to pytest: bash scripts/run_tests.sh -k import
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"
# The report is tested in a browser where there is one; those tests are skipped, with the reason, where there is none.
if ! command -v chromedriver >/dev/null && command -v apt-get >/dev/null && [[ $(id -u) == 0 ]]; then
    echo "tests: installing chromium and chromium-driver" >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends chromium chromium-driver >/dev/null 2>&1 ||
        echo "tests: chromium could not be installed, tests in a browser will be skipped" >&2
fi
exec python -m pytest "$@"
