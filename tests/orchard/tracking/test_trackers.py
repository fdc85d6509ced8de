"""Trackers receive what the metrics logger writes; the real libraries take it."""

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from orchard.errors import ConfigError
from orchard.tracking.metrics_log import MetricsLogger, read_metrics
from orchard.tracking.trackers import open_tracker

CONFIG = {"seed": 3, "learner": {"lr": 0.1, "path": None}}


class Recorder:
    """Stands for a tracking package, and for the run that it begins: notes every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def note(*positional: Any, **named: Any) -> "Recorder":
            self.calls.append((name, positional, named))
            return self

        return note

    def of(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(positional, named) for call, positional, named in self.calls if call == name]


def log_to(library: Recorder, kind: str, folder: Path) -> None:
    tracker = open_tracker(kind, folder, "toy", CONFIG, library=library)
    with closing(tracker), MetricsLogger(folder, also=[tracker.log]) as metrics_logger:
        metrics_logger.log("sft", 1, {"sft/loss": 2.5, "sft/nan": math.nan})
        metrics_logger.log("train", 1, {"evaluate/ndcg@10/sid": 0.25})


def test_wandb_gets_each_phase_over_its_own_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    library = Recorder()
    log_to(library, "wandb", tmp_path)
    ((_, begun),) = library.of("init")
    assert (begun["name"], begun["mode"], begun["config"]) == ("toy", "offline", CONFIG)
    assert [positional[0] for positional, _ in library.of("log")] == [
        {"sft/sft/loss": 2.5, "sft/step": 1},
        {"train/evaluate/ndcg@10/sid": 0.25, "train/step": 1},
    ]
    assert library.calls[-1][0] == "finish"
    assert set(read_metrics(tmp_path / "metrics.jsonl")) == {"sft", "train"}


def test_mlflow_gets_names_that_it_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    library = Recorder()
    log_to(library, "mlflow", tmp_path)
    assert library.of("log_metrics") == [
        (({"sft/sft/loss": 2.5},), {"step": 1}),
        (({"train/evaluate/ndcg_at_10/sid": 0.25},), {"step": 1}),
    ]
    assert library.of("log_params") == [(({"seed": 3, "learner.lr": 0.1},), {})]
    ((where, _),) = library.of("set_tracking_uri")
    assert str(tmp_path.resolve()) in where[0]
    assert library.calls[-1][0] == "end_run"


def test_a_package_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the package no_such_tracker, .* `tracking`"):
        open_tracker("no_such_tracker", tmp_path, "toy", {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_the_real_package_takes_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(kind, reason=f"{kind} is not installed; the extra `tracking` brings it")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    tracker = open_tracker(kind, tmp_path / "run", "toy", CONFIG)
    with closing(tracker), MetricsLogger(tmp_path / "run", also=[tracker.log]) as metrics_logger:
        metrics_logger.log("train", 1, {"evaluate/ndcg@10/sid": 0.25})
    kept = {"wandb": "wandb/offline-run-*/*.wandb", "mlflow": "mlflow.db"}[kind]
    assert any(path.stat().st_size for path in (tmp_path / "run").glob(kept))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing strays
