"""The rooms, the arrows between them, and where Ray may be spoken."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "orchard": set[str](),
    "rollout": {"orchard"},
    "rewards": {"orchard"},
    "learner": {"orchard"},
    "serve": {"orchard", "rollout"},
    "cluster": {"orchard", "rollout", "rewards", "learner", "serve"},
}
# Arrows between the inner packages of one package; modules beside them are free to be imported.
INNER = {
    "orchard": {
        "settings": set[str](),
        "catalog": set[str](),
        "evaluation": set[str](),
        "tracking": set[str](),
        "guide": {"catalog"},
        "semantic_ids": {"catalog"},
        "policy": {"catalog", "guide", "semantic_ids", "settings"},
        "data": {"catalog", "evaluation", "policy", "semantic_ids", "settings"},
        "feedback": {"catalog", "data", "evaluation", "guide", "policy", "settings"},
        "simulation": {"data", "feedback", "settings"},
        "scorers": {"catalog", "data", "evaluation", "guide", "settings"},
    },
    "rollout": {"engine": set[str](), "search": {"engine"}},
    "learner": {"advantage": set[str](), "batch": {"advantage"}, "workers": {"advantage", "batch"}},
    "serve": {
        "catalog": set[str](),
        "policies": set[str](),
        "decoding": {"catalog", "policies"},
        "http": {"catalog", "policies"},
    },
    "cluster": {
        "actors": set[str](),
        "monitoring": set[str](),
        "report": set[str](),
        "training": {"actors", "monitoring", "report"},
        "planning": {"actors", "report", "training"},
        "loop": {"actors", "monitoring", "report", "training"},
        "cli": {"actors", "loop", "monitoring", "planning", "report", "training"},
    },
}
MOST_MODULES = 16
RAY_SHELLS = {
    "rollout": {"actor.py"},
    "learner": {"ray_trainer.py", "trainer_handle.py"},
    "serve": {"app.py"},
}
LONGEST_FILE = 350
LONGER = {"tests/golden/test_golden.py"}  # tables of what has changed since the recording


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Top-level packages that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.slow
@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_is_the_folder_of_its_name_and_nothing_else_claims_it(room: str) -> None:
    module = importlib.import_module(room)
    assert module.__file__ is not None
    assert Path(module.__file__).parent == ROOT / room
    assert set(packages_distributions().get(room, ["orchard"])) == {"orchard"}


@pytest.mark.slow
@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows_point_downwards_only(room: str) -> None:
    for path in modules(room):
        rooms = set(imported(path)) & MAY_IMPORT.keys() - {room}
        assert rooms <= MAY_IMPORT[room], path


@pytest.mark.slow
@pytest.mark.parametrize("room", ["orchard", "rewards", *RAY_SHELLS])
def test_only_the_shells_speak_ray(room: str) -> None:
    for path in modules(room):
        if path.name not in RAY_SHELLS.get(room, set()):
            assert "ray" not in set(imported(path)), path


@pytest.mark.slow
@pytest.mark.parametrize("room", INNER)
def test_inner_packages_import_only_what_lies_below_them(room: str) -> None:
    inner = {path.name for path in (ROOT / room).iterdir() if (path / "__init__.py").is_file()}
    assert INNER[room].keys() == inner
    for name, allowed in INNER[room].items():
        for path in modules(f"{room}/{name}"):
            found = set(inner_imported(path, room)) & INNER[room].keys() - {name}
            assert found <= allowed, path


def inner_imported(path: Path, room: str) -> Iterator[str]:
    """Inner packages of `room` that a module imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            parts = [name.split(".") for name in names]
            yield from (part[1] for part in parts if part[0] == room and len(part) > 1)


def test_no_folder_is_flat_and_long() -> None:
    for room in (*MAY_IMPORT, "benchmarks"):
        for folder in {path.parent for path in modules(room)}:
            assert len(list(folder.glob("*.py"))) <= MOST_MODULES + 1, folder  # and __init__


def test_docstrings_stand_alone() -> None:
    opening = re.compile(r'^\s*r?"""(Of|What|Whoever|Where|How) ', re.MULTILINE)
    for room in (*MAY_IMPORT, "benchmarks"):
        for path in modules(room):
            found = opening.search(path.read_text())
            assert found is None, f"{path}: {found[0] if found else ''}"


def test_no_file_is_too_long_to_read() -> None:
    for room in (*MAY_IMPORT, "benchmarks", "tests"):
        for path in modules(room):
            if str(path.relative_to(ROOT)) not in LONGER:
                assert len(path.read_text().splitlines()) <= LONGEST_FILE, path


def test_tests_mirror_modules() -> None:
    """`tests/a/b/test_c.py` and `test_c_some_aspect.py` test `a/b/c`, a module or a page."""
    for room in (*MAY_IMPORT, "benchmarks"):
        for path in (ROOT / "tests" / room).rglob("test_*.py"):
            words = path.stem.removeprefix("test_").split("_")
            names = {"_".join(words[:length]) for length in range(1, len(words) + 1)}
            folder = ROOT / path.parent.relative_to(ROOT / "tests")
            assert names & {module.stem for module in folder.glob("*.*")}, path


def test_bare_folders_hide_no_installed_package() -> None:
    assert not any((ROOT / name / "__init__.py").exists() for name in ("tests", "docker"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("imported", "heavy"),
    [
        ("orchard.config", {"torch", "ray", "transformers"}),
        ("orchard; dir(orchard)", {"torch", "ray", "numpy"}),
    ],
)
def test_settings_and_public_names_load_nothing_heavy(imported: str, heavy: set[str]) -> None:
    code = f"import sys, {imported}; print({heavy} & set(sys.modules))"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "set()"
