from pathlib import Path

from cluster.training.checks import choices
from orchard.settings.reference import page

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_configuration_page_is_that_of_the_settings() -> None:
    command = "python -m cluster.cli.reference > docs/configuration.md"
    assert PAGE.read_text() == page(choices()), command
