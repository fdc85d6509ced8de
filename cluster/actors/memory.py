"""Monitor the memory of a run on the machine that started it."""

import threading

import psutil


class MemoryMonitor:
    """Sampler of the resident memory of this process and its descendants, including Ray's.

    Shared pages count once per process, so the peak is an upper bound.
    """

    def __init__(self, *, every_s: float = 1.0) -> None:
        """Prepare to sample every `every_s` seconds."""
        self.peak_bytes = 0
        self._every_s = every_s
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
            self.peak_bytes = max(self.peak_bytes, resident_bytes())
            if self._done.wait(self._every_s):
                return


def resident_bytes() -> int:
    """Return the resident memory of this process and its descendants in bytes."""
    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # the process ended after it was listed
            continue
    return total
