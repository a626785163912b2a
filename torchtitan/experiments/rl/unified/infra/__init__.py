# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Where it runs: devices, processes, parallelism and the transport of weights."""
