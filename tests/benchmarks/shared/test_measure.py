"""The form of a bench's result, and fairness of its timing."""

import json

import pytest

from benchmarks.shared.measure import figure, interleaved, report
from benchmarks.speed import learner


@pytest.mark.parametrize(
    ("value", "asked", "holds"),
    [(8.0, ">= 8", True), (7.9, ">= 8", False), (1e-6, "<= 1e-5", True), (2e-5, "<= 1e-5", False)],
)
def test_a_figure_holds_exactly_when_its_value_meets_the_bound(
    value: float, asked: str, holds: bool
) -> None:
    assert figure("speed", value, "x", asked=asked)["holds"] is holds


def test_cases_take_turns_after_one_unmeasured_call_each() -> None:
    events: list[str] = []
    cases = {name: lambda name=name: events.append(name) for name in ("packed", "flat")}
    seconds = interleaved(cases, repeats=3)
    assert events == ["packed", "flat"] * 4
    assert seconds.keys() == cases.keys()


def test_a_report_is_json_and_names_commit_and_machine() -> None:
    made = report("learner", [figure("speed", 9.0, "x", asked=">= 8")], [{"prompts": 4}])
    assert json.loads(json.dumps(made)) == made
    assert made["commit"]
    assert made["machine"]["cores"]


@pytest.mark.slow
def test_the_learner_bench_finds_equal_updates_and_fewer_tokens() -> None:
    figures = {f["name"]: f for f in learner.run(quick=True)["figures"]}
    for name in ("loss_difference", "gradient_difference", "forward_token_ratio"):
        assert figures[name]["holds"], figures[name]
