# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Monarch actors: endpoints of a few lines over the plain classes Trainer and Generator."""

from torchtitan.experiments.rl.unified.infra.process import watch_processes

watch_processes()  # before a module of this package imports Monarch
