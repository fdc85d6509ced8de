"""Monitor the memory of a run on the machine that started it."""

import threading
from collections.abc import Callable

import psutil


class MemoryMonitor:
    """Sampler of the memory of this process and its descendants, including Ray's.

    By default pages that processes share count once per process, so the peak is an upper bound.
    """

    def __init__(self, *, every_s: float = 1.0, measure: Callable[[], int] | None = None) -> None:
        """Prepare to call `measure`, by default `resident_bytes`, every `every_s` seconds."""
        self.peak_bytes = 0
        self._every_s, self._measure = every_s, measure or resident_bytes
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> "MemoryMonitor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, self._measure())
            if self._done.wait(self._every_s):
                return


def resident_bytes(*, proportional: bool = False) -> int:
    """Return the resident memory of this process and its descendants in bytes.

    With `proportional`, a page that several processes share counts once (PSS, Linux).
    """
    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        try:
            if proportional:
                total += process.memory_full_info().pss
            else:
                total += process.memory_info().rss
        except psutil.Error:  # the process ended after it was listed
            continue
    return total
