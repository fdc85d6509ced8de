"""Amazon Industrial and Scientific from scratch: warm start, RL, control."""

from benchmarks.shared.measure import Report
from benchmarks.shared.recipe import measure


def run(quick: bool) -> Report:
    """Three seeds; `quick` takes one, cut to a few updates, which only shows that it runs."""
    cut = ("sft.epochs=1", "learner.steps=2", "evaluate.test_rows=100", "evaluate.valid_rows=50")
    return measure(
        "amazon_industrial",
        seeds=1 if quick else 3,
        bars={"ndcg@10/sid": 0.095, "hr@10/sid": 0.140},
        beside="counted item transitions .098 / .127, tuned co-occurrence .103 / .132",
        changes=(*cut, "output=runs/bench-quick") if quick else (),
    )
