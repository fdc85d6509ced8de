from pathlib import Path

from orchard.settings.reference import page

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_configuration_page_is_that_of_the_settings() -> None:
    assert PAGE.read_text() == page(), "python -m cluster.reference > docs/configuration.md"
