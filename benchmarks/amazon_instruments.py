"""Amazon Musical Instruments from scratch: warm start, RL, control."""

from benchmarks.shared.measure import Report
from benchmarks.shared.recipe import measure


def run(quick: bool) -> Report:
    """One seed; `quick` cuts it to a few updates, which only shows that it runs."""
    cut = ("sft.epochs=1", "learner.steps=2", "evaluate.test_rows=100", "evaluate.valid_rows=50")
    return measure(
        "amazon_instruments",
        seeds=1,
        bars={},
        beside="item-kNN HR@10 .1059, NDCG@10 .0831; SASRec .1099 / .0775",
        changes=(*cut, "output=runs/bench-quick") if quick else (),
    )
