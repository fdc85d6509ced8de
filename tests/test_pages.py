"""Pages and project files: links, line lengths, workflows and versions agree."""

import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PAGES = sorted(
    Path(name)
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()
    if not name.startswith("tests/") and (ROOT / name).is_file()
)  # fmt: skip
GENERATED = ("docs/configuration.md", "docs/figures.md", "CHANGELOG.md")
"""Pages with lines of their own: two that commands write, and one line per entry."""


def prose(text: str) -> str:
    """Leave out code blocks and code spans."""
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


@cache
def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose((ROOT / page).read_text())):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page} links to {link}"


@pytest.mark.parametrize("page", [p for p in PAGES if str(p) not in GENERATED], ids=str)
def test_prose_has_lines_of_a_hundred_characters(page: Path) -> None:
    lines = prose((ROOT / page).read_text()).splitlines()
    commands_and_tables = ("    ", "|")
    assert [x for x in lines if len(x) > 100 and not x.startswith(commands_and_tables)] == []


def test_every_page_has_a_place_on_the_site() -> None:
    def pages(entry: Any) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        below = entry.values() if isinstance(entry, dict) else entry
        return set[str]().union(*map(pages, below))

    tree = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert pages(tree["nav"]) == {str(p.relative_to("docs")) for p in PAGES if p.parts[0] == "docs"}


def test_every_page_is_linked_from_another() -> None:
    linked = set[Path]()
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s#]+)", prose((ROOT / page).read_text())):
            linked.add(((ROOT / page).parent / link).resolve())
    docs = {
        ROOT / page for page in PAGES if page.parts[0] == "docs" and "runbooks" not in page.parts
    }
    assert docs - linked == set()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_what_exists(path: Path) -> None:
    workflow: dict[Any, Any] = yaml.safe_load(path.read_text())
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert workflow["permissions"] == {"contents": "read"}
    assert True in workflow  # YAML 1.1 reads the key `on` as true
    for job in workflow["jobs"].values():
        named = job.get("strategy", {}).get("matrix", {}).get("target", [])
        runs = " ".join(step.get("run", "") for step in job["steps"])
        assert {*named, *re.findall(r"make ([a-z]+)", runs)} <= targets
        for test in re.findall(r"tests/\S+\.py", runs):
            assert (ROOT / test).is_file()


def test_project_files_are_well_formed_and_name_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml"):
        body: dict[str, Any] = yaml.safe_load(form.read_text())
        assert all("label" in part["attributes"] for part in body["body"])
    updates: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())
    for update in updates["updates"]:
        assert (ROOT / update["directory"].strip("/")).is_dir()


def test_hooks_and_workflows_check_spelling_with_the_same_version() -> None:
    hooks: dict[str, Any] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (typos,) = (repo for repo in hooks["repos"] if repo["repo"].endswith("/typos"))
    assert f"crate-ci/typos@{typos['rev']}" in (ROOT / ".github/workflows/checks.yml").read_text()
