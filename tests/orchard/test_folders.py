"""Files and folders are replaced whole, wherever they lie, and links stay links."""

from pathlib import Path

import pytest

from orchard.errors import DataError
from orchard.folders import atomic_dir, atomic_file, check_output_dir


def fill(out: Path, text: str) -> None:
    with atomic_dir(out) as partial:
        (partial / "mark").write_text(text)


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "mark").write_text("old")
    (tmp_path / "out").symlink_to("disk")
    fill(tmp_path / "out", "new")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "mark").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]
    (tmp_path / "ahead").symlink_to("later")  # to a folder that is not there yet
    fill(tmp_path / "ahead", "new")
    assert (tmp_path / "later" / "mark").read_text() == "new"


@pytest.mark.parametrize("name", [".", "../here", "sub/.."])
def test_the_working_folder_is_filled_and_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    if name.startswith("sub"):
        (here / "sub").mkdir()
    inode = here.stat().st_ino
    for text in ("first", "second"):
        fill(Path(name), text)
        assert (here / "mark").read_text() == text
        assert [path.name for path in here.iterdir()] == ["mark"]
        if name.startswith("sub"):
            (here / "sub").mkdir()
    assert here.stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_failure_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(out: Path) -> None:
        with atomic_dir(out) as partial:
            (partial / "mark").write_text("new")
            raise DataError("no")

    fill(tmp_path / "out", "old")
    monkeypatch.chdir(tmp_path / "out")
    for out in (Path("."), tmp_path / "out", tmp_path / "other"):
        with pytest.raises(DataError, match="no"):
            fail(out)
    assert (tmp_path / "out" / "mark").read_text() == "old"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mark", "out"]


def test_only_folders_of_a_kind_are_replaced(tmp_path: Path) -> None:
    def check(out: Path, *, overwrite: bool = False) -> None:
        check_output_dir(out, mark="mark", kind="data set", overwrite=overwrite)

    (tmp_path / "empty" / ".partial").mkdir(parents=True)  # of a run that was killed
    check(tmp_path / "empty")
    check(tmp_path / "new")
    fill(tmp_path / "out", "old")
    with pytest.raises(DataError, match="pass --overwrite"):
        check(tmp_path / "out")
    check(tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "mark").unlink()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(DataError, match="is not a data set"):
        check(tmp_path / "out", overwrite=True)


def test_a_file_that_fails_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_text("old")

    def fail() -> None:
        with atomic_file(path) as partial:
            partial.write_text("half")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["table"]
