# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What every test shares: nothing here, nor in a process that a test starts, asks the Hugging Face hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
