"""What the endpoint tells about itself: items, catalogue, policies."""

import numpy as np

from serve.catalog.store import Shelf
from serve.errors import UnknownNameError
from serve.policies.ab_test import MAIN
from serve.policies.slot import Seat
from serve.schema import CatalogueInfo, ItemInfo, PolicyInfo, VariantInfo
from serve.service import Service


def item_info(shelf: Shelf, item_id: int) -> ItemInfo:
    """What is known of an item; raises UnknownNameError where there is none."""
    row, known = np.zeros(1, np.int64), np.zeros(1, np.bool_)
    if -(2**63) <= item_id < 2**63:
        row, known = shelf.catalogue.find(np.array([item_id], dtype=np.int64))
    if not (known[0] and shelf.snapshot.live[row[0]]):
        raise UnknownNameError(f"item {item_id} is not in the catalogue")
    at = int(row[0])
    others, _ = shelf.snapshot.items(shelf.catalogue.leaf_of_item[[at]])
    return ItemInfo(
        item_id=item_id,
        sid=shelf.plain_sid(at),
        title=shelf.catalogue.title[at],
        shares_sid_with=[int(i) for i in shelf.catalogue.item_id[others] if i != item_id],
        filters=[name for name in shelf.filters if shelf.offer((name,)).items[at]],
        catalogue=shelf.name,
    )


def catalogue_info(service: Service, shelf: Shelf) -> CatalogueInfo:
    """A version of the catalogue in numbers."""
    offer = shelf.offer(())
    return CatalogueInfo(
        version=shelf.version,
        digest=shelf.catalogue.digest,
        items=offer.total,
        leaves=offer.view.num_leaves,
        levels=shelf.catalogue.trie.depth,
        level_size=list(shelf.catalogue.level_size),
        filters=sorted(shelf.filters),
        kept=service.stock.kept,
    )


def policy_info(service: Service) -> PolicyInfo:
    """Every variant."""
    return PolicyInfo(variants=[_variant_info(service, seat) for seat in service.seats.values()])


def _variant_info(service: Service, seat: Seat) -> VariantInfo:
    others = sum(s.share for s in service.seats.values() if not s.shadow and s.name != MAIN)
    return VariantInfo(
        name=seat.name,
        policy=str(seat.version),
        step=seat.version.step,
        digest=seat.version.digest,
        share=1.0 - others if seat.name == MAIN else seat.share,
        shadow=seat.shadow,
        pinned=seat.pinned is not None,
        kept=seat.kept,
        engine=seat.engine,
        decoders=["beam", "beam_sample", "ved"] if seat.guided else ["beam", "beam_sample"],
        refused=seat.refused,
    )
