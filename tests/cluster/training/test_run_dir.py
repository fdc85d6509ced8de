"""Policies of a run carry the tokenizer bundle of its data."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.cli import app as cli
from cluster.training.run import prepare
from cluster.training.run_dir import open_run_dir, save_policy
from orchard import config
from orchard.errors import CatalogError, CheckpointError
from orchard.policy.store import FILE, Policy
from orchard.types import PolicyVersion
from tests.fixtures.bundles import write_shop
from tests.fixtures.runs import TinyRun


@pytest.mark.slow
def test_warm_start_training_and_export_carry_the_bundle(tiny_run: TinyRun, tmp_path: Path) -> None:
    made = write_shop(tmp_path / "data")
    path = tiny_run()
    run = prepare(config.load(path), "sft")
    open_run_dir(run)
    first = Policy.open(run.policy)
    assert first.bundle is not None
    assert first.bundle.digest == made.digest
    shutil.rmtree(tmp_path / "data" / "sids")  # the run goes on with its own copy
    save_policy(run, run.result, PolicyVersion(step=1, digest=first.version.digest), first.weights)
    found = Policy.open(run.result).bundle
    assert found is not None
    assert found.table.digest == made.table.digest
    # RL on the same data without their bundle takes over that of the warm start.
    run = prepare(config.load(path), "train")
    open_run_dir(run)
    save_policy(run, run.result, PolicyVersion(step=2, digest=first.version.digest), first.weights)
    cli.main(["export", str(path), str(tmp_path / "out")])
    for folder in (run.result, tmp_path / "out"):
        policy = Policy.open(folder)
        assert policy.bundle is not None
        assert policy.bundle.digest == made.digest
        assert policy.bundle.titles is not None
        assert json.loads((folder / FILE).read_text())["bundle"] == made.digest
    assert "(`sids/`) gives new ones semantic IDs" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_a_policy_from_before_takes_the_bundle_of_its_data(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    made = write_shop(tmp_path / "data")
    path = tiny_run(data={"bundle": "", "level_size": [3, 40]})
    run = prepare(config.load(path), "sft")
    open_run_dir(run)
    assert Policy.open(run.policy).bundle is None
    run.policy.rename(run.result)
    path = tiny_run(data={"level_size": [3, 40]})
    cli.main(["export", str(path), str(tmp_path / "out")])
    exported = Policy.open(tmp_path / "out").bundle
    assert exported is not None
    assert exported.digest == made.digest


@pytest.mark.slow
def test_a_run_with_the_bundle_of_other_items_does_not_start(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    write_shop(tmp_path / "data")
    write_shop(tmp_path / "other", seed=1)
    shutil.rmtree(tmp_path / "data" / "sids")
    shutil.copytree(tmp_path / "other" / "sids", tmp_path / "data" / "sids")
    settings = config.load(tiny_run())
    with pytest.raises(CatalogError, match="items differ.*data.bundle"):
        prepare(settings, "sft")
    data = settings.data.model_copy(update={"bundle": ""})
    assert prepare(replace_data(settings, data), "sft").bundle is None


def replace_data(settings: config.Config, data: object) -> config.Config:
    return settings.model_copy(update={"data": data})


@pytest.mark.slow
def test_a_policy_goes_on_with_new_items_of_its_bundle(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = write_shop(tmp_path / "data")
    run = prepare(config.load(tiny_run()), "sft")
    open_run_dir(run)
    new = tmp_path / "new.parquet"
    old = pq.read_table(tmp_path / "data" / "items.parquet").select(["item_id", "title"])
    more = pa.table({"item_id": [900, 901], "title": ["red oak lamp", "blue steel drill"]})
    pq.write_table(pa.concat_tables([old, more]), new)
    out = tmp_path / "data" / "all.parquet"
    cli.main(["data", "encode", str(made.folder), str(new), str(out), "--append"])
    path = tiny_run(name="later", data={"items": "all.parquet"}, model={"path": str(run.policy)})
    later = prepare(config.load(path), "sft")
    open_run_dir(later)
    assert "goes on with 2 new ones" in caplog.text
    grown = Policy.open(later.policy)
    assert len(grown.tokenizer.catalog) == 62
    assert grown.bundle is not None
    assert grown.bundle.version == 2
    before = Policy.open(run.policy)
    assert before.weights.keys() == grown.weights.keys()
    # What is not started anew is what the policy had: all but the rows of codes without an item.
    assert later.growth is not None
    for name, value in before.weights.items():
        differs = (value != grown.weights[name]).reshape(len(value), -1).any(axis=1).sum()
        assert differs in (0, later.growth.num_unseen)
    # Other codebooks: the same items under other semantic IDs are no growth.
    write_shop(tmp_path / "other", seed=1)
    path = tiny_run(
        name="x", data={"path": str(tmp_path / "other")}, model={"path": str(run.policy)}
    )
    with pytest.raises(CheckpointError, match="have codebooks"):
        prepare(config.load(path), "sft")
