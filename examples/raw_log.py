"""A shop's raw files, as one would get them: a log of purchases and a list of products.

    python examples/raw_log.py OUT

The shop is made up (`orchard.data.synthetic_world`): 500 products, 1,000 customers, identifiers of
its own, dates.
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
    maker, nature = np.random.default_rng(0).spawn(2)
    world = make_world(WorldParams(num_items=500, num_users=1000), maker)
    events = simulate_users(world, nature)
    sku = np.array([f"SKU-{number:04d}" for number in range(len(world.code))])
    customer = np.array([f"C{number:05d}" for number in range(len(events.start) - 1)])
    order = np.argsort(events.timestamp, kind="stable")  # as a shop's till writes it
    bought = events.timestamp[order].astype("datetime64[s]").astype(str)
    out.mkdir(parents=True, exist_ok=True)
    log = {
        "customer": customer[ragged.owners(events.start)[order]],
        "sku": sku[events.item[order]],
        "bought": np.char.replace(bought, "T", " "),
    }
    csv.write_csv(pa.table(log), out / "log.csv")
    csv.write_csv(pa.table({"sku": sku, "name": titles(world.code)}), out / "products.csv")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
