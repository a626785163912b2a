# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Reinforcement learning with TorchTitan models. This folder, not the torchtitan wheel's, owns this name."""
