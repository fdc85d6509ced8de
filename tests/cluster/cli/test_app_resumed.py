"""Commands on a run that has begun: damaged policies, changed settings, other data."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.cli import app as cli
from cluster.training.evaluate import evaluation_file
from cluster.training.run import prepare
from orchard import config
from orchard.evaluation import ranking
from orchard.testing import (
    make_evaluation,
)
from tests.fixtures.begun import saved_policy
from tests.fixtures.refusals import Refusal, rewrite


@pytest.mark.parametrize(
    ("file", "content", "code"),
    [
        ("model.safetensors", b"", "policy.damaged"),
        ("config.json", b"{", "policy.damaged"),
        ("config.json", b'{"model_type": "zorg"}', "policy.unknown_model"),
        ("tokenizer.json", b"{", "policy.damaged"),
        ("policy.json", b"{", "policy.damaged"),
    ],
)
def test_a_damaged_policy_is_refused(
    file: str, content: bytes, code: str, world: Path, refused: Callable[..., Refusal]
) -> None:
    (saved_policy(world) / file).write_bytes(content)
    assert refused("train", world).code == code


def test_a_policy_of_another_catalog_is_refused(
    world: Path, refused: Callable[..., Refusal]
) -> None:
    saved_policy(world)
    items = world.parent / "data" / "items.parquet"
    sids = pq.read_table(items)["sid"].to_pylist()
    rewrite(items, sid=[sids[-1], *sids[1:-1], sids[0]])
    assert refused("train", world).code == "catalog.mismatch"


@pytest.mark.slow
def test_a_run_continues_only_under_its_own_configuration(
    world: Path, refused: Callable[..., Refusal], capsys: pytest.CaptureFixture[str]
) -> None:
    warm = saved_policy(world)
    cli.main(["train", str(world), "learner.lr=0.5", "--dry-run"])  # RL has not begun
    changed = refused("train", world, "model.layers=3")
    assert changed.code == "config.changed"
    assert "model.layers" in changed.said
    (warm.parent / "checkpoints" / "learner-train").mkdir(parents=True)
    said = refused("train", world, "learner.lr=0.5").said
    assert "learner.lr = 0.5 (was 0.0002)" in said
    assert f"choose another name, to continue from its policy with model.path={warm}" in said
    cli.main(["train", str(world), "learner.steps=999", "--dry-run"])
    cli.main(["train", str(world), "name=another", f"model.path='{warm}'", "learner.lr=0.5",
              "--dry-run"])  # fmt: skip
    assert capsys.readouterr().out.count("everything checks out") == 2


@pytest.fixture
def other_data(world: Path) -> Path:
    """Folder of other interactions with the same items."""
    folder = world.parent / "other"
    shutil.copytree(world.parent / "data", folder)
    for split in ("train", "valid", "test"):
        path = folder / f"{split}.parquet"
        rewrite(path, target=pq.read_table(path)["target"].to_pylist()[::-1])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("file", ["train", "valid"])
def test_a_run_does_not_continue_on_other_data(
    file: str, world: Path, other_data: Path, refused: Callable[..., Refusal]
) -> None:
    warm = saved_policy(world)
    recorded = (warm.parent / "config.toml").read_text()
    assert "made from different data" in refused("sft", world, f"data.path={other_data}").said
    assert "train has content" in refused("train", world, f"data.path={other_data}").said
    path = world.parent / "data" / f"{file}.parquet"
    path.write_bytes((other_data / path.name).read_bytes())
    assert f"{file} has content" in refused("sft", world).said
    assert f"{file} has content" in refused("train", world).said
    assert (warm.parent / "config.toml").read_text() == recorded
    cli.main(["train", str(world), "name=another", f"model.path={warm}", "--dry-run"])


def test_a_run_continues_where_its_data_were_moved_or_its_test_split_changed(
    world: Path, other_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_policy(world)
    data = world.parent / "data"
    data.rename(data.with_name("moved"))
    (data.with_name("moved") / "test.parquet").write_bytes(
        (other_data / "test.parquet").read_bytes()
    )
    cli.main(["train", str(world), f"data.path={data.with_name('moved')}", "--dry-run"])
    assert "everything checks out" in capsys.readouterr().out


@pytest.mark.slow
def test_an_evaluation_on_other_rows_is_refused_before_anything_is_searched(
    world: Path, other_data: Path, refused: Callable[..., Refusal]
) -> None:
    run = prepare(config.load(world), "evaluate", policy=saved_policy(world))
    warm = make_evaluation(0.5, num_rows=len(run.test))
    warm = replace(warm, row=np.arange(len(run.test)), split=run.test.digest)
    ranking.write(warm, evaluation_file(run, "warm_start"))
    against = ("--against", "warm_start")
    assert "different splits" in refused("evaluate", world, "--split", "valid", *against).said
    assert (
        "different splits" in refused("evaluate", world, f"data.path={other_data}", *against).said
    )
