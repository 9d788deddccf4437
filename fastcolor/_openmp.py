"""How OpenMP's threads wait, which can only be chosen before their library is loaded: with torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence


def set_policy(command: Sequence[str], environment: MutableMapping[str, str], loaded: Mapping) -> None:
    """Lets them sleep under `fastcolor video`, unless the environment says otherwise.

    By default a thread that has nothing to do spins for a while, on a core that the encoder and the decoder need. There
    are two pools of them, torch's and the kernels'. Elsewhere nothing is in need of the core.

    Args:
        command: as of `sys.orig_argv`.
        loaded: the modules that are there.
    """
    words = [os.path.basename(word) for word in command[1:]]
    while words and words[0].startswith("-"):  # -m, and others of the interpreter
        words = words[1:]
    if words[:2] == ["fastcolor", "video"] and "torch" not in loaded:
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")


set_policy(sys.orig_argv, os.environ, sys.modules)
