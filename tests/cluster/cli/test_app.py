"""The command line and its errors, without Ray."""

import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from cluster.cli import app as cli
from cluster.training.run import check_engines, prepare
from cluster.training.run_dir import open_run_dir, save_policy
from orchard import config
from orchard.errors import EngineError
from orchard.policy import model
from orchard.policy.titles import from_titles
from orchard.policy.weights import digest, snapshot
from orchard.testing import save_model_folder, tiny_policy, tiny_title_tokenizer
from orchard.types import PolicyVersion
from tests.fixtures.runs import TinyRun

@pytest.fixture
def world(tiny_run: TinyRun) -> Path:
    return tiny_run()


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs a failing command and returns its error message."""

    def run(*arguments: object) -> str:
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
        return said

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
    world: Path, refused: Callable[..., str]
) -> None:
    assert "did you mean learner.lr" in refused("sft", world, "learner.lrr=1")
    assert "does not exist" in refused("train", world.parent / "nothing.toml")
    assert "data.path" in refused("sft", world, "data.path=nowhere")
    (world.parent / "data" / "valid.parquet").unlink()
    assert "valid.parquet does not exist" in refused("sft", world)
    assert "unknown reward rul" in refused("train", world, "rewards.weights={rul=1.0}")


def test_training_without_a_policy_names_the_remedy(
    world: Path, refused: Callable[..., str]
) -> None:
    assert "run `orchard sft` first" in refused("train", world)
    assert "holds no config.json" in refused("train", world, f"model.path={world.parent}")


def test_items_that_form_no_catalog_are_refused(world: Path, refused: Callable[..., str]) -> None:
    items = world.parent / "data" / "items.parquet"
    good = pq.read_table(items)["sid"].to_pylist()
    rewrite(items, sid=[None, *good[1:]])
    assert "has no semantic ID" in refused("sft", world)
    rewrite(items, sid=[good[0][:2], *good[1:]])
    assert "depth 2 where 3 was expected" in refused("sft", world)
    rewrite(items, sid=[[0, 0, 99], *good[1:]])
    assert "codes there run from 0 to 5" in refused("sft", world, "data.level_size=[4,5,6]")


def test_rows_that_cannot_be_used_are_refused(world: Path, refused: Callable[..., str]) -> None:
    train = world.parent / "data" / "train.parquet"
    rows = pq.read_table(train)
    history = rows["history"].to_pylist()
    rewrite(train, history=[[], *history[1:]])
    assert "empty history" in refused("sft", world)
    rewrite(train, history=[[12345], *history[1:]])
    assert "item 12345 is not in the catalog" in refused("sft", world)
    pq.write_table(rows.slice(0, 0), train)
    assert "has no rows" in refused("sft", world)
    words = {
        "target": (pa.array(["x"] * len(rows)), "`target` .* holds string; it must hold integers"),
        "history": (rows["target"], "`history` .* it must hold lists of integers"),
    }
    for name, (values, message) in words.items():
        at = rows.column_names.index(name)
        pq.write_table(rows.set_column(at, name, values), train)
        assert re.search(message, refused("sft", world))
    pq.write_table(rows, train)
    rewrite(train, target=[None, *rows["target"].to_pylist()[1:]])
    assert "has no `target` (1 such rows)" in refused("sft", world)


def test_a_machine_without_vllm_is_told_so_at_once(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unusable() -> None:
        raise EngineError("vLLM is not there")

    monkeypatch.setattr("cluster.training.run.check_vllm", unusable)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    asked = config.load(world, ["rollout.engine=vllm", "evaluate.engine=torch"])
    prepare(asked, "sft")  # which searches nothing by vLLM
    with pytest.raises(EngineError, match="not there"):
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
    ("file", "content", "message"),
    [
        ("model.safetensors", b"", "model.safetensors are damaged or cut short"),
        ("config.json", b"{", "config.json is no JSON object"),
        ("config.json", b'{"model_type": "zorg"}', "has model_type 'zorg'"),
        ("tokenizer.json", b"{", "holds no loadable tokenizer"),
        ("policy.json", b"{", "policy.json is damaged"),
    ],
)
def test_a_damaged_policy_is_refused(
    file: str, content: bytes, message: str, world: Path, refused: Callable[..., str]
) -> None:
    (saved_policy(world) / file).write_bytes(content)
    assert message in refused("train", world)


def test_a_policy_of_another_catalog_is_refused(world: Path, refused: Callable[..., str]) -> None:
    saved_policy(world)
    items = world.parent / "data" / "items.parquet"
    sids = pq.read_table(items)["sid"].to_pylist()
    rewrite(items, sid=[sids[-1], *sids[1:-1], sids[0]])
    assert "was trained on catalog" in refused("train", world)


def test_a_run_continues_only_under_its_own_configuration(
    world: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    warm = saved_policy(world)
    cli.main(["train", str(world), "learner.lr=0.5", "--dry-run"])  # RL has not begun
    assert "model.layers" in refused("train", world, "model.layers=3")
    (warm.parent / "checkpoints" / "learner-train").mkdir(parents=True)
    said = refused("train", world, "learner.lr=0.5")
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


def test_synthetic_data_is_written_once(tmp_path: Path, refused: Callable[..., str]) -> None:
    out = tmp_path / "fresh"
    cli.main(["data", "synth", str(out), "--items", "80", "--users", "50"])
    assert (out / "items.parquet").is_file()
    refused("data", "synth", out)


def test_unknown_names_are_answered_with_the_known_ones(
    refused: Callable[..., str], world: Path
) -> None:
    assert "learner" in refused("bench", "nonsense")
    assert "choose valid or test" in refused("evaluate", world, "--split", "train")
    assert "does not exist" in refused("report", world.parent / "none")
    assert "is no run folder" in refused("report", world.parent)
    assert not (world.parent / "report.html").exists()


def test_items_may_be_titles_in_the_tokens_of_a_policy(
    world: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "set model.path to its folder" in refused("sft", world, "data.titles=true")
    items = world.parent / "data" / "items.parquet"
    titles = [f"pen {'abcdefgh'[i % 8]}{'xyz'[i // 8 % 3]}" for i in range(60)]
    rewrite(items, title=titles)
    cli.main(["sft", str(world), "data.titles=true", "data.title_tokens=300", "--dry-run"])
    assert "distinct sequences: 24" in capsys.readouterr().out
    assert "greater than or equal to 259" in refused("sft", world, "data.title_tokens=9")
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
