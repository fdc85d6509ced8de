"""Train on Amazon Musical Instruments from scratch: SFT, RL and an SFT control."""

from benchmarks.shared.measure import Report
from benchmarks.shared.recipe import measure


def run(quick: bool) -> Report:
    """Run one seed; `quick` runs it for a few updates, as a smoke test."""
    cut = ("sft.epochs=1", "learner.steps=2", "evaluate.test_rows=100", "evaluate.valid_rows=50")
    return measure(
        "amazon_instruments",
        seeds=1,
        bars={},
        published="item-kNN HR@10 .1059, NDCG@10 .0831; SASRec .1099 / .0775",
        changes=(*cut, "output=runs/bench-quick") if quick else (),
    )
