# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Reinforcement learning with one model definition: TorchTitan's Trainer trains it and vLLM generates with it.

The log-probs of every sampled token are equal bit for bit on both sides. Importing this package, or any module in it,
changes nothing in the process; see README.md for the commands.
"""
