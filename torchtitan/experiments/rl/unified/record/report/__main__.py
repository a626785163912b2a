# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

import sys

from torchtitan.experiments.rl.unified.record.report import main

main(sys.argv[1:])
