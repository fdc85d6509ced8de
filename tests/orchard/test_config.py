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
    ("override", "said"),
    [
        ("learner.learning_rate=1", "unknown key learner.learning_rate"),
        ("rollout.beams=4", "unknown key rollout.beams"),
        ("lerner.lr=1", "unknown key lerner"),
        ("learner.lr=-1", "learner.lr = -1"),
        ("rollout.engine=sglang", "rollout.engine"),
        ("model.heads=3", "not a multiple"),
        ("learner.dual_clip=0.5", "above 1"),
        ("learner={dropout=0.1,updates_per_batch=2}", "under different dropout is noise"),
        ("learner={tis_clip=2.0,dropout=0.1}", "learner.tis_clip > 0 needs"),
        ("name=a/b", "name"),
        ("rewards.weights={}", "rewards.weights"),
        ("rollout={add_target=true,search='think'}", "rollout.add_target = true has no effect"),
        ("learner.value.outcome={transition=1.0}", "rewards.weights does not"),
        ("learner", "section.key=value"),
        ("name.deeper=1", "not a section"),
    ],
)
def test_what_cannot_work_is_refused_by_name(run_file: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        config.load(run_file, [override])


def test_a_misspelt_key_is_answered_with_the_nearest_one(run_file: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean learner.grad_clip"):
        config.load(run_file, ["learner.gradclip=1"])


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        config.load(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(ConfigError, match="not valid TOML"):
        config.load(broken)
    broken.write_text('name = "toy"')
    with pytest.raises(ConfigError, match="data is missing"):
        config.load(broken)


def test_differences_name_key_and_both_values(run_file: Path) -> None:
    before, after = config.load(run_file), config.load(run_file, ["learner.lr=0.5"])
    assert config.differences(before, after) == ["learner.lr = 0.5 (was 0.0002)"]


def test_every_shipped_run_file_is_valid() -> None:
    folder = Path(__file__).parents[2] / "cluster" / "runs"
    names = [config.load(path).name for path in sorted(folder.glob("*.toml"))]
    assert len(names) == len(set(names)) > 0


def test_the_configuration_needs_neither_torch_nor_ray() -> None:
    code = "import sys, orchard.config; print({'torch', 'ray'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["rollout.search=ved", "rollout.engine=torch"], "set model.value_head = true"),
        (
            ["model.value_head=true", "rollout.decode=requests"],
            'cannot run the head .* set rollout.decode = "worker"',
        ),
        (
            [
                "model.value_head=true",
                "rollout.decode=requests",
                "rollout.engine=torch",
                "evaluate.engine=vllm",
            ],
            'evaluate.engine to "torch"',
        ),
    ],
)
def test_guidance_needs_a_value_head_and_an_engine_that_runs_it(
    run_file: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(run_file, changes)


def test_every_engine_runs_a_value_head_next_to_the_model(run_file: Path) -> None:
    for engine in ("vllm", "torch"):
        changes = ["model.value_head=true", "rollout.search=ved", f"rollout.engine={engine}"]
        assert config.load(run_file, changes).rollout.engine == engine
