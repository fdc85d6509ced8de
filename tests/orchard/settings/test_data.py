"""The folder of a run's data."""

from pathlib import Path

import pytest

from orchard.settings.data import DataConfig, data_root


def test_a_relative_path_is_one_of_the_working_directory_or_under_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ORCHARD_DATA", raising=False)
    (tmp_path / "data" / "shop").mkdir(parents=True)
    assert DataConfig(path=Path("shop")).path == Path("data/shop")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "shop").mkdir(parents=True)
    monkeypatch.setenv("ORCHARD_DATA", str(elsewhere))
    assert data_root() == elsewhere
    assert DataConfig(path=Path("shop")).path == elsewhere / "shop"
    (tmp_path / "shop").mkdir()
    assert DataConfig(path=Path("shop")).path == Path("shop")
    assert DataConfig(path=Path("nowhere")).path == Path("nowhere")
    assert DataConfig(path=tmp_path / "nowhere").path == tmp_path / "nowhere"
