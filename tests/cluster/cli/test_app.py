"""The command line and its errors, without Ray."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from cluster.cli import app as cli
from cluster.cli import commands
from cluster.training.evaluate import evaluation_file
from cluster.training.run import check_engines, prepare
from cluster.training.run_dir import open_run_dir, save_policy
from orchard import config
from orchard.errors import EngineError, OrchardError
from orchard.evaluation import ranking
from orchard.policy import model
from orchard.policy.titles import from_titles
from orchard.policy.weights import digest, snapshot
from orchard.testing import (
    make_evaluation,
    save_model_folder,
    tiny_policy,
    tiny_title_tokenizer,
)
from orchard.types import PolicyVersion
from tests.fixtures.runs import TinyRun


@pytest.fixture
def world(tiny_run: TinyRun) -> Path:
    return tiny_run()


@dataclass(frozen=True)
class Refusal:
    """Message of a failing command, and the code of its error."""

    said: str
    code: str


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., Refusal]:
    """Return a function that runs a failing command and returns its refusal."""

    def run(*arguments: object) -> Refusal:
        capsys.readouterr()
        before = ray.is_initialized()  # by tests that share this process
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in arguments])
        said = capsys.readouterr().err
        assert end.value.code == 2
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert "Traceback" not in said
        assert ray.is_initialized() == before
        error = end.value.__context__
        assert isinstance(error, OrchardError)
        return Refusal(said, error.code)

    return run


def rewrite(path: Path, **columns: object) -> None:
    table = pq.read_table(path)
    for name, values in columns.items():
        at = table.column_names.index(name)
        table = table.set_column(at, name, pa.array(values, table.schema.field(name).type))
    pq.write_table(table, path)


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


def saved_policy(world: Path) -> Path:
    """Create a run folder with an untrained SFT policy, as `orchard sft` writes it."""
    run = prepare(config.load(world), "sft")
    open_run_dir(run)
    first = model.create(run.config.model, run.tokenizer, seed=0)
    save_policy(
        run, run.result, PolicyVersion(step=1, digest=digest(snapshot(first))), snapshot(first)
    )
    return run.result


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
    assert f"choose another name, to go on from what it has learned with model.path={warm}" in said
    cli.main(["train", str(world), "learner.steps=999", "--dry-run"])
    cli.main(["train", str(world), "name=another", f"model.path='{warm}'", "learner.lr=0.5",
              "--dry-run"])  # fmt: skip
    assert capsys.readouterr().out.count("everything checks out") == 2


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


@pytest.fixture
def other_data(world: Path) -> Path:
    """Folder of other interactions with the same items."""
    folder = world.parent / "other"
    shutil.copytree(world.parent / "data", folder)
    for split in ("train", "valid", "test"):
        path = folder / f"{split}.parquet"
        rewrite(path, target=pq.read_table(path)["target"].to_pylist()[::-1])
    return folder


@pytest.mark.parametrize("file", ["train", "valid"])
def test_a_run_does_not_continue_on_other_data(
    file: str, world: Path, other_data: Path, refused: Callable[..., Refusal]
) -> None:
    warm = saved_policy(world)
    recorded = (warm.parent / "config.toml").read_text()
    assert "made from other data" in refused("sft", world, f"data.path={other_data}").said
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
