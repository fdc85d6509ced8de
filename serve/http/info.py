"""What the endpoint tells about itself: items, catalog, policies."""

import numpy as np

from serve.catalog.store import CatalogVersion
from serve.errors import UnknownNameError
from serve.policies.ab_test import MAIN
from serve.policies.slot import PolicySlot
from serve.schema import CatalogInfo, ItemInfo, PolicyInfo, VariantInfo
from serve.service import Service


def item_info(catalog_version: CatalogVersion, item_id: int) -> ItemInfo:
    """What is known of an item; raises UnknownNameError where there is none."""
    row, known = np.zeros(1, np.int64), np.zeros(1, np.bool_)
    if -(2**63) <= item_id < 2**63:
        row, known = catalog_version.catalog.find(np.array([item_id], dtype=np.int64))
    if not (known[0] and catalog_version.snapshot.live[row[0]]):
        raise UnknownNameError(f"item {item_id} is not in the catalog")
    at = int(row[0])
    others, _ = catalog_version.snapshot.items(catalog_version.catalog.leaf_of_item[[at]])
    return ItemInfo(
        item_id=item_id,
        sid=catalog_version.plain_sid(at),
        title=catalog_version.catalog.title[at],
        shares_sid_with=[int(i) for i in catalog_version.catalog.item_id[others] if i != item_id],
        filters=[
            name for name in catalog_version.filters if catalog_version.offer((name,)).items[at]
        ],
        catalog=catalog_version.name,
    )


def catalog_info(service: Service, catalog_version: CatalogVersion) -> CatalogInfo:
    """A version of the catalog in numbers."""
    offer = catalog_version.offer(())
    return CatalogInfo(
        version=catalog_version.version,
        digest=catalog_version.catalog.digest,
        items=offer.total,
        leaves=offer.view.num_leaves,
        levels=catalog_version.catalog.trie.depth,
        level_size=list(catalog_version.catalog.level_size),
        filters=sorted(catalog_version.filters),
        kept=service.catalog_store.kept,
    )


def policy_info(service: Service) -> PolicyInfo:
    """Every variant."""
    return PolicyInfo(variants=[_variant_info(service, slot) for slot in service.slots.values()])


def _variant_info(service: Service, slot: PolicySlot) -> VariantInfo:
    others = sum(s.share for s in service.slots.values() if not s.shadow and s.name != MAIN)
    return VariantInfo(
        name=slot.name,
        policy=str(slot.version),
        step=slot.version.step,
        digest=slot.version.digest,
        share=1.0 - others if slot.name == MAIN else slot.share,
        shadow=slot.shadow,
        pinned=slot.pinned is not None,
        kept=slot.kept,
        engine=slot.engine,
        decoders=["beam", "beam_sample", "ved"] if slot.guided else ["beam", "beam_sample"],
        refused=slot.refused,
    )
