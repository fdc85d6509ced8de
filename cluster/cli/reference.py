"""Print the configuration reference page.

`python -m cluster.cli.reference > docs/configuration.md` writes it.
"""

from cluster.training.checks import choices
from orchard.settings.reference import page

if __name__ == "__main__":
    print(page(choices()), end="")
