"""Small catalogs of one depth and of several."""

import pytest

from orchard.catalog.catalog import Catalog
from orchard.testing import tiny_catalog


@pytest.fixture(params=[False, True], ids=["one depth", "varying depth"])
def catalog(request: pytest.FixtureRequest) -> Catalog:
    return tiny_catalog(seed=3, num_items=40, varying_depth=request.param)
