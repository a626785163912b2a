# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Make ``torchtitan.experiments.rl`` this project's, whatever else the environment holds.

The torchtitan wheel ships a ``torchtitan/experiments/rl`` folder of its own. This project can neither write over
it (two owners of one file) nor come before it on ``sys.path`` (``torchtitan`` is one package in one place), so a
finder claims that one name. Everything below it is then found through the package's ``__path__``, which is ours alone.

``torchtitan_rl_unified.pth``, next to this file and copied into site-packages by wheel and editable installs alike,
calls `install` when an interpreter starts: in every process, spawned ones too, from any working directory. Every
start of Python pays for it, so the module imports nothing until the name is asked for.
"""

import sys

PACKAGE = "torchtitan.experiments.rl"


def another_torchtitan(folder: str) -> str:
    """What is wrong if `folder`, which torchtitan is found in, is not this environment's own; empty: nothing is.

    PYTHONPATH and the working directory come before an environment's packages.
    """
    import os
    import sysconfig

    own = os.path.join(sysconfig.get_paths()["purelib"], "torchtitan")
    if not os.path.isdir(own) or os.path.realpath(folder) == os.path.realpath(own):
        return ""
    return f"PYTHONPATH or the working directory puts {folder} in front of {own}, which this was installed with"


class _Finder:
    """Finds `PACKAGE` in the folder above this file, and nothing else; not beside another torchtitan."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != PACKAGE:
            return None
        import os
        from importlib.util import spec_from_file_location

        if problem := another_torchtitan(sys.modules["torchtitan"].__path__[0]):
            raise ImportError(problem)
        folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        return spec_from_file_location(name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder])


def install() -> None:
    """Put the finder before all others. A second call changes nothing."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
