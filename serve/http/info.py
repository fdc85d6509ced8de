"""Information about items, the catalog and the served policies."""

import numpy as np

from serve.catalog.schema import CatalogInfo, ItemInfo
from serve.catalog.store import CatalogVersion
from serve.errors import UnknownNameError
from serve.policies.ab_test import MAIN
from serve.policies.slot import PolicySlot
from serve.schema import PolicyInfo, VariantInfo
from serve.service import Service


def item_info(catalog_version: CatalogVersion, item_id: int) -> ItemInfo:
    """Describe an item; raise UnknownNameError if the catalog does not contain it."""
    catalog = catalog_version.catalog
    rows, in_catalog = np.zeros(1, np.int64), np.zeros(1, np.bool_)
    if -(2**63) <= item_id < 2**63:
        rows, in_catalog = catalog.lookup(np.array([item_id], dtype=np.int64))
    if not (in_catalog[0] and catalog_version.snapshot.live[rows[0]]):
        raise UnknownNameError(f"item {item_id} is not in the catalog")
    row = int(rows[0])
    # Rows of all live items with the same semantic ID.
    same_leaf, _ = catalog_version.snapshot.items(catalog.leaf_of_item[[row]])
    return ItemInfo(
        item_id=item_id,
        sid=catalog_version.plain_sid(row),
        title=catalog.title[row],
        shares_sid_with=[int(i) for i in catalog.item_id[same_leaf] if i != item_id],
        filters=[
            name
            for name in catalog_version.filters
            if catalog_version.filtered_items((name,)).items[row]
        ],
        catalog=catalog_version.name,
    )


def catalog_info(service: Service, catalog_version: CatalogVersion) -> CatalogInfo:
    """Describe a catalog version."""
    all_items = catalog_version.filtered_items(())
    return CatalogInfo(
        version=catalog_version.version,
        digest=catalog_version.digest,
        items=all_items.total,
        leaves=all_items.view.num_leaves,
        levels=catalog_version.catalog.trie.depth,
        level_size=list(catalog_version.catalog.level_size),
        filters=sorted(catalog_version.filters),
        kept=service.catalog_store.kept,
        bundle=service.catalog_store.assigner.digest,
        deltas_refused=service.catalog_refused,
    )


def policy_info(service: Service) -> PolicyInfo:
    """Describe all policy variants."""
    return PolicyInfo(variants=[_variant_info(service, slot) for slot in service.slots.values()])


def _variant_info(service: Service, slot: PolicySlot) -> VariantInfo:
    """Describe one variant; the main one gets the share that the others leave."""
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
        decoders=slot.decoders,
        guide=slot.guide_digest,
        guide_notes=list(slot.guide_notes),
        guide_events=len(slot.events) if slot.guide_digest else 0,
        context={
            column.name: list(column.values)
            for column in service.catalog_store.current.tokenizer.context.columns
        },
        refused=slot.refused,
    )
