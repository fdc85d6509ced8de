"""Train on Amazon Industrial and Scientific from scratch: SFT, RL and an SFT control."""

from benchmarks.shared.measure import Report
from benchmarks.shared.recipe import measure


def run(quick: bool) -> Report:
    """Run three seeds; `quick` runs one for a few updates, as a smoke test."""
    cut = ("sft.epochs=1", "learner.steps=2", "evaluate.test_rows=100", "evaluate.valid_rows=50")
    return measure(
        "amazon_industrial",
        seeds=1 if quick else 3,
        bars={"ndcg@10/sid": 0.095, "hr@10/sid": 0.140},
        published="counted item transitions .098 / .127, tuned co-occurrence .103 / .132",
        changes=(*cut, "output=runs/bench-quick") if quick else (),
    )
