"""The bench of a GPU, with tiny shapes on the CPU."""

import pytest
import torch

from benchmarks.speed import gpu
from orchard.errors import EngineError


@pytest.mark.slow
def test_every_part_is_measured_without_a_gpu_in_quick_mode() -> None:
    rows = gpu.run(quick=True)["rows"]
    assert {row["part"] for row in rows} == {"equality", "updates", "searches", "vocabulary"}
    (dense,) = [row for row in rows if row.get("way") == "dense, float32"]
    assert dense["logprob_gap"] < 1e-4
    packed, flat = [row for row in rows if row.get("way") in ("packed, dense", "flat")]
    assert packed["prompts"] == flat["prompts"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_told_so() -> None:
    with pytest.raises(EngineError, match="needs a GPU"):
        gpu.run(quick=False)
