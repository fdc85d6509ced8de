"""The command line and its errors, without Ray."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.cli import app as cli
from cluster.cli import commands
from cluster.training.checks import check_engines
from cluster.training.run import prepare
from orchard import config
from orchard.errors import EngineError
from orchard.policy.titles import from_titles
from orchard.testing import (
    save_model_folder,
    tiny_policy,
    tiny_title_tokenizer,
)
from tests.fixtures.begun import saved_policy
from tests.fixtures.refusals import Refusal, rewrite


def test_a_dry_run_shows_the_resolved_run_and_writes_nothing(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["sft", str(world), "sft.epochs=3", "--dry-run"])
    said = capsys.readouterr().out
    assert "epochs = 3" in said
    assert "items: 60" in said
    assert not (world.parent / "runs").exists()


def test_misspelt_keys_and_missing_files_are_refused(
    world: Path, refused: Callable[..., Refusal]
) -> None:
    misspelt = refused("sft", world, "learner.lrr=1")
    assert misspelt.code == "config.unknown_key"
    assert "did you mean learner.lr" in misspelt.said
    assert refused("train", world.parent / "nothing.toml").code == "config.no_file"
    assert refused("sft", world, "data.path=nowhere").code == "config.no_data"
    (world.parent / "data" / "valid.parquet").unlink()
    assert refused("sft", world).code == "data.no_file"


@pytest.mark.parametrize(
    ("command", "override"),
    [
        ("sft", "rewards.weights={rul=1.0}"),
        ("train", "rollout.search=bean"),
        ("plan", "learner.estimator=grp"),
        ("evaluate", "rollout.engine=sglang"),
        ("submit", "cluster.tracker=wandbb"),
        ("fit critic", "critic.backend=jax"),
    ],
)
def test_names_that_nothing_registers_are_refused_by_every_command(
    world: Path, refused: Callable[..., Refusal], command: str, override: str
) -> None:
    assert refused(*command.split(), world, override).code == "config.unknown_name"


def test_training_without_a_policy_names_the_remedy(
    world: Path, refused: Callable[..., Refusal]
) -> None:
    without = refused("train", world)
    assert without.code == "config.no_policy"
    assert "run `orchard sft` first" in without.said
    assert refused("train", world, f"model.path={world.parent}").code == "policy.missing"


def test_items_that_form_no_catalog_are_refused(
    world: Path, refused: Callable[..., Refusal]
) -> None:
    items = world.parent / "data" / "items.parquet"
    good = pq.read_table(items)["sid"].to_pylist()
    rewrite(items, sid=[None, *good[1:]])
    assert refused("sft", world).code == "catalog.no_sid"
    rewrite(items, sid=[good[0][:2], *good[1:]])
    assert refused("sft", world).code == "catalog.mixed_depth"
    rewrite(items, sid=[[0, 0, 99], *good[1:]])
    large = refused("sft", world, "data.level_size=[4,5,6]")
    assert large.code == "catalog.code_out_of_range"
    assert "codes there run from 0 to 5" in large.said


def test_rows_that_cannot_be_used_are_refused(world: Path, refused: Callable[..., Refusal]) -> None:
    train = world.parent / "data" / "train.parquet"
    rows = pq.read_table(train)
    history = rows["history"].to_pylist()
    rewrite(train, history=[[], *history[1:]])
    assert refused("sft", world).code == "data.empty_history"
    rewrite(train, history=[[12345], *history[1:]])
    unknown = refused("sft", world)
    assert unknown.code == "data.unknown_item"
    assert "item 12345 " in unknown.said
    pq.write_table(rows.slice(0, 0), train)
    assert refused("sft", world).code == "data.no_rows"
    words = {
        "target": (pa.array(["x"] * len(rows)), "`target` .* holds string; it must hold integers"),
        "history": (rows["target"], "`history` .* it must hold lists of integers"),
    }
    for name, (values, message) in words.items():
        at = rows.column_names.index(name)
        pq.write_table(rows.set_column(at, name, values), train)
        wrong = refused("sft", world)
        assert wrong.code == "data.wrong_type"
        assert re.search(message, wrong.said)
    pq.write_table(rows, train)
    rewrite(train, target=[None, *rows["target"].to_pylist()[1:]])
    missing = refused("sft", world)
    assert missing.code == "data.missing_value"
    assert "has no `target` (1 such rows)" in missing.said


def test_a_machine_without_vllm_is_told_so_at_once(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.engine.availability.find_spec", lambda name: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    asked = config.load(world, ["rollout.engine=vllm", "evaluate.engine=torch"])
    prepare(asked, "sft")  # which searches nothing by vLLM
    with pytest.raises(EngineError, match="not installed"):
        check_engines(asked, "train")
    monkeypatch.setenv("RAY_ADDRESS", "ray-head:6379")  # whose workers may well have it
    check_engines(asked, "train")


def test_a_beam_wider_than_the_catalog_is_announced(
    world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cli.main(["sft", str(world), "evaluate.beams=5000", "--dry-run"])
    assert "wider than the catalog" in caplog.text


def test_synthetic_data_is_written_once(tmp_path: Path, refused: Callable[..., Refusal]) -> None:
    out = tmp_path / "fresh"
    cli.main(["data", "synth", str(out), "--items", "80", "--users", "50"])
    assert (out / "items.parquet").is_file()
    refused("data", "synth", out)


def test_unknown_names_are_answered_with_the_known_ones(
    refused: Callable[..., Refusal], world: Path
) -> None:
    bench = refused("bench", "nonsense")
    assert bench.code == "config.unknown_name"
    assert "learner" in bench.said
    assert refused("evaluate", world, "--split", "train").code == "config.unknown_name"
    assert refused("report", world.parent / "none").code == "data.no_run"
    assert refused("report", world.parent).code == "data.no_run"
    assert not (world.parent / "report.html").exists()


@pytest.mark.slow
def test_items_may_be_titles_in_the_tokens_of_a_policy(
    world: Path, refused: Callable[..., Refusal], capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused("sft", world, "data.titles=true").code == "config.no_title_tokens"
    items = world.parent / "data" / "items.parquet"
    titles = [f"pen {'abcdefgh'[i % 8]}{'xyz'[i // 8 % 3]}" for i in range(60)]
    rewrite(items, title=titles)
    cli.main(["sft", str(world), "data.titles=true", "data.title_tokens=300", "--dry-run"])
    assert "distinct sequences: 24" in capsys.readouterr().out
    small = refused("sft", world, "data.title_tokens=9")
    assert small.code == "config.bad_value"
    assert "greater than or equal to 259" in small.said
    tokenizer = tiny_title_tokenizer()
    policy, _ = tiny_policy(from_titles(titles, tokenizer), tokenizer=tokenizer)
    save_model_folder(policy, tokenizer, world.parent / "text")
    cli.main(
        ["sft", str(world), "data.titles=true", f"model.path={world.parent / 'text'}", "--dry-run"]
    )
    said = capsys.readouterr().out
    assert "items: 60" in said
    assert "distinct sequences: 24" in said
    assert "levels: 7" in said


def test_a_home_folder_that_the_shell_left_alone_is_found(
    world: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., Refusal]
) -> None:
    monkeypatch.setenv("HOME", str(world.parent))
    cli.main(["sft", "~/run.toml", "--dry-run"])
    assert f"run folder {world.parent}/none" in refused("report", "~/none").said
    said = refused("evaluate", world, "--policy=~/nothing").said
    assert f"{world.parent}/nothing" in said
    assert not Path("~").exists()


def test_a_quickstart_takes_a_folder_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, seen = tmp_path / """it's a "run" #3""", list[config.Config]()

    def stop(settings: config.Config, phase: str) -> None:
        seen.append(settings)
        raise EngineError("enough")

    monkeypatch.setattr(commands, "check_engines", stop)
    with pytest.raises(EngineError):
        commands.quickstart(output, [])
    assert (seen[0].output, seen[0].data.path) == (output, output / "quickstart-data")


def test_a_base_model_whose_tokenizer_is_longer_than_its_table_is_refused(
    world: Path, refused: Callable[..., Refusal]
) -> None:
    warm = saved_policy(world)
    description = json.loads((warm / "config.json").read_text())
    rows = description["vocab_size"] - 2
    (warm / "config.json").write_text(json.dumps(description | {"vocab_size": rows}))
    assert (
        f"embedding table {rows} rows" in refused("sft", world, f"model.path={warm}", "name=b").said
    )


def test_a_policy_folder_that_is_a_link_is_written_where_it_points(world: Path) -> None:
    warm = saved_policy(world)
    elsewhere = world.parent / "big disk" / "warm_start"
    elsewhere.parent.mkdir()
    warm.rename(elsewhere)
    warm.symlink_to(elsewhere)
    before = (elsewhere / "policy.json").stat().st_ino
    saved_policy(world)
    assert warm.is_symlink()
    assert (elsewhere / "policy.json").stat().st_ino != before
    for folder in (warm.parent, elsewhere.parent):
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    modes = {path.name: path.stat().st_mode & 0o777 for path in warm.iterdir() if path.is_file()}
    assert modes["model.safetensors"] == modes["policy.json"]
