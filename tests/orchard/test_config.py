import subprocess
import sys
from pathlib import Path

import pytest

from orchard import config
from orchard.errors import ConfigError

MINIMAL = 'name = "toy"\n[data]\npath = "somewhere"\n'


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def test_a_resolved_run_reads_back_as_itself(run_file: Path) -> None:
    settings = config.load(run_file, ["learner.dual_clip=0", "rewards.weights={rule=1.0}"])
    run_file.write_text(config.dump(settings))
    assert config.load(run_file) == settings


def test_overrides_reach_their_key_with_their_type(run_file: Path) -> None:
    settings = config.load(
        run_file, ["learner.lr=3e-5", "rollout.engine=torch", "learner.kl.weight=0"]
    )
    assert settings.learner.lr == 3e-5
    assert settings.rollout.engine == "torch"
    assert settings.learner.kl.weight == 0


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("learner.learning_rate=1", "unknown_key"),
        ("rollout.beams=4", "unknown_key"),
        ("lerner.lr=1", "unknown_key"),
        ("learner.lr=-1", "bad_value"),
        ("name=a/b", "bad_value"),
        ("model.heads=3", "not_a_multiple"),
        ("model.kv_heads=3", "not_a_multiple"),
        ("rewards.listwise={hidden_size=9}", "not_a_multiple"),
        ("learner.dual_clip=0.5", "dual_clip_too_low"),
        ("learner={dropout=0.1,updates_per_batch=2}", "dropout_of_two_passes"),
        ("cluster.publish_format=adapter", "no_adapters_to_publish"),
        ("learner={tis_clip=2.0,dropout=0.1}", "tis_of_other_ratios"),
        ("learner={tis_clip=2.0,logprob='full'}", "tis_of_other_ratios"),
        ("learner={tis_clip=2.0,ratio='sequence'}", "tis_of_other_ratios"),
        ("learner.tis_clip=0.5", "tis_clip_too_low"),
        ("rewards.weights={}", "no_reward"),
        ("rewards.weights={rule=0.0}", "no_reward"),
        ("data={path='x',rationales='why',rationale_template='{next}'}", "two_rationales"),
        ("sft.tasks.titles=1.0", "tasks_without_text"),
        ("sft.valid_beams=5", "bad_value"),  # NDCG@10 selects the best version
        ("evaluate.valid_beams=9", "bad_value"),
        ("learner", "bad_override"),
        ("name.deeper=1", "bad_override"),
    ],
)
def test_what_cannot_work_is_refused_by_code(run_file: Path, override: str, code: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config.load(run_file, [override])
    assert refused.value.code == f"config.{code}"


def test_items_are_written_in_one_notation(run_file: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        config.load(run_file, ["prompt.history={history} then", "data.titles=true"])
    assert refused.value.code == "config.two_notations"


def test_two_workers_need_processes(run_file: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        config.load(run_file, ["learner.workers=2", "cluster.in_process=true"])
    assert refused.value.code == "config.workers_in_process"


def test_dropout_and_lag_exclude_each_other(run_file: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        config.load(run_file, ["learner.dropout=0.1", "cluster.max_off_policy_steps=1"])
    assert refused.value.code == "config.dropout_of_two_passes"


def test_every_error_has_its_sentence_and_the_first_one_its_code(run_file: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        config.load(run_file, ["learner.lr=-1", "model.heads=3", "rollout.beams=4"])
    said = str(refused.value)
    assert "learner.lr = -1: " in said
    assert "model.hidden_size = 128 is not a multiple of model.heads = 3; choose one" in said
    assert "unknown key rollout.beams" in said
    assert refused.value.code == "config.not_a_multiple"  # sections in their order


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ('prompt.title="{title}" # {item}', '"{title}" # {item}'),
        ("prompt.title='{title}', '{item}'", "'{title}', '{item}'"),
        ("prompt.title='{title}'", "{title}"),
        ('prompt.title="{title} # {item}"', "{title} # {item}"),
        ("prompt.title={title} # {item}", "{title} # {item}"),
        ('prompt.title="{title}" and "{item}"', '"{title}" and "{item}"'),
        ("data.items=5 # 6", "5 # 6"),
        ("data.items=2024", "2024"),
        ("data.items=#1", "#1"),
        ("data.items='a' 'b'", "'a' 'b'"),
        ("data.items=1,", "1,"),
    ],
)
def test_quotes_and_hashes_of_an_override_are_kept(
    run_file: Path, override: str, value: str
) -> None:
    key = override.partition("=")[0].split(".")
    settings = config.load(run_file, [override, "prompt.history={history}"])
    assert getattr(getattr(settings, key[0]), key[1]) == value


def test_a_number_with_a_comment_is_no_number(run_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"learner.lr = '1e-4 # as before'"):
        config.load(run_file, ["learner.lr=1e-4 # as before"])


def test_a_quoted_part_of_a_key_may_have_dots(run_file: Path) -> None:
    settings = config.load(run_file, ['rewards.weights."my.own"=2', "rewards.weights.rule=1"])
    assert settings.rewards.weights == {"my.own": 2.0, "rule": 1.0}


def test_a_home_folder_is_found_in_files_and_overrides(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    run_file.write_text('name = "toy"\noutput = "~/runs"\n[data]\npath = "~/data"\n')
    settings = config.load(run_file, ["model.path=~/base", "serve.state='~/state'"])
    assert settings.run_dir == Path("/home/ada/runs/toy")
    assert settings.data.path == Path("/home/ada/data")
    assert settings.model.path == Path("/home/ada/base")
    assert settings.serve.state == Path("/home/ada/state")
    settings = config.load(run_file, ["data.items=~/items.parquet", "data.train=['~/a', 'b']"])
    assert settings.data.items == "/home/ada/items.parquet"
    assert settings.data.train == ("/home/ada/a", "b")
    assert "~" not in config.dump(settings)
    with pytest.raises(ConfigError, match="output = .*write the folder out"):
        config.load(run_file, ["output=~nobody-of-this-name/runs"])


def test_a_misspelt_key_is_answered_with_the_nearest_one(run_file: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean learner.grad_clip"):
        config.load(run_file, ["learner.gradclip=1"])


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    contents = ((None, "no_file"), ("name = ", "bad_toml"), ('name = "toy"', "missing_key"))
    for content, code in contents:
        if content is not None:
            broken.write_text(content)
        with pytest.raises(ConfigError) as refused:
            config.load(broken)
        assert refused.value.code == f"config.{code}"
    assert str(refused.value) == "data is missing; set it in the run file or as data=..."


def test_differences_name_key_and_both_values(run_file: Path) -> None:
    before, after = config.load(run_file), config.load(run_file, ["learner.lr=0.5"])
    assert config.differences(before, after) == ["learner.lr = 0.5 (was 0.0002)"]


def test_every_shipped_run_file_is_valid() -> None:
    folder = Path(__file__).parents[2] / "cluster" / "runs"
    names = [config.load(path).name for path in sorted(folder.glob("*.toml"))]
    assert len(names) == len(set(names)) > 0


@pytest.mark.slow
def test_the_configuration_needs_neither_torch_nor_ray() -> None:
    code = "import sys, orchard.config; print({'torch', 'ray'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
