"""Write the raw files of a simulated shop: a log of purchases and a list of products.

    python examples/raw_log.py OUT

`orchard.data.synthetic_world` simulates the shop: 500 products, 1,000 customers, text identifiers
and dates.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv

from orchard import ragged
from orchard.data.synthetic import titles
from orchard.data.synthetic_world import WorldParams, make_world, simulate_users


def write(out: Path) -> None:
    """Write `log.csv` (customer, sku, bought) and `products.csv` (sku, name)."""
    world_rng, user_rng = np.random.default_rng(0).spawn(2)
    world = make_world(WorldParams(num_items=500, num_users=1000), world_rng)
    events = simulate_users(world, user_rng)
    sku = np.array([f"SKU-{number:04d}" for number in range(len(world.code))])
    customer = np.array([f"C{number:05d}" for number in range(len(events.start) - 1)])
    order = np.argsort(events.timestamp, kind="stable")  # one log in time order
    bought = events.timestamp[order].astype("datetime64[s]").astype(str)
    out.mkdir(parents=True, exist_ok=True)
    log = {
        "customer": customer[ragged.row_of(events.start)[order]],
        "sku": sku[events.item[order]],
        "bought": np.char.replace(bought, "T", " "),
    }
    csv.write_csv(pa.table(log), out / "log.csv")
    csv.write_csv(pa.table({"sku": sku, "name": titles(world.code)}), out / "products.csv")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
