"""Writing a data set: what may be replaced."""

from pathlib import Path

import pytest

from orchard.data.importers.card import CARD
from orchard.data.importers.read import ImportOptions, read
from orchard.data.importers.write import write
from orchard.errors import DataError
from tests.fixtures.logs import bring, csv_file, walks


def test_only_a_data_set_is_replaced_and_only_when_asked(tmp_path: Path) -> None:
    source = csv_file(tmp_path / "log.csv", walks())
    bring(source, tmp_path / "out")
    before = (tmp_path / "out" / CARD).read_text()
    with pytest.raises(DataError, match="pass --overwrite"):
        bring(source, tmp_path / "out", max_history=2)
    examples = read(source, None, ImportOptions(max_history=2), lambda count: None)
    write(tmp_path / "out", examples, source="log.csv", overwrite=True)
    assert (tmp_path / "out" / CARD).read_text() != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="is not a data set; choose another folder"):
        write(tmp_path / "mine", examples, source="log.csv", overwrite=True)
