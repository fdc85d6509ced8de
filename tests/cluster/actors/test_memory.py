import subprocess
import sys

from cluster.actors.memory import MemoryMonitor, resident_bytes

HOLD = "x = bytearray(80 << 20); print('held', flush=True); input()"


def test_the_memory_of_children_counts_and_the_peak_remembers_it() -> None:
    before = resident_bytes()
    with MemoryMonitor(every_s=0.01) as watch:
        child = subprocess.Popen(
            [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        during = resident_bytes()
        while watch.peak_bytes < during:  # ends as soon as one more sample is taken
            pass
        child.communicate(b"\n")
    assert during > before + (80 << 20)
    assert watch.peak_bytes >= during > resident_bytes()
