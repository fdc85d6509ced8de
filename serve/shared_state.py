"""State shared by the replicas of an endpoint: catalog deltas and pins, as files in one folder.

Delta n turns version n - 1 into version n. Its file is created atomically and only once: of two
replicas that write the same number, one gets a ConflictError. A replica that starts later applies
all deltas and so reaches the same catalog.
"""

import json
import os
import uuid
from pathlib import Path

from serve.catalog.store import CatalogStore, CatalogVersion
from serve.errors import ConflictError
from serve.schema import DeltaRequest


class SharedState:
    """Shared folder of the replicas that serve one base catalog."""

    def __init__(self, folder: Path, catalog: str) -> None:
        """Open or create the folder; `catalog` is the digest of the catalog at version 0."""
        self._folder = folder / catalog[:16]
        self._deltas = self._folder / "deltas"
        self._deltas.mkdir(parents=True, exist_ok=True)

    @property
    def policies(self) -> Path:
        """Folder of archived policies."""
        return self._folder / "policies"

    def next_after(self, version: int) -> DeltaRequest | None:
        """Return the delta from this version to the next, None if there is none yet."""
        path = self._path(version + 1)
        return DeltaRequest.model_validate_json(path.read_text()) if path.is_file() else None

    def append(self, version: int, delta: DeltaRequest) -> None:
        """Write the delta that creates `version`.

        Raises:
            ConflictError: another replica has already created that version.
        """
        temporary = self._deltas / f".{uuid.uuid4().hex}"
        temporary.write_text(delta.model_dump_json())
        try:
            os.link(temporary, self._path(version))
        except FileExistsError as error:
            raise ConflictError(
                f"another replica created catalog version {version} at the same time; read the "
                "catalog again and send a new delta"
            ) from error
        finally:
            temporary.unlink()

    def catch_up(self, catalog_store: CatalogStore) -> CatalogVersion:
        """Apply all new deltas to the store; return its current catalog version."""
        while (delta := self.next_after(catalog_store.current.version)) is not None:
            catalog_store.activate(
                catalog_store.apply(delta.model_copy(update={"base_version": None}))
            )
        return catalog_store.current

    def pin(self, variant: str, version: str | None) -> None:
        """Record the version of a variant that all replicas pin; None follows training."""
        temporary = self._folder / f".{uuid.uuid4().hex}"
        temporary.write_text(json.dumps({"version": version}))
        temporary.replace(self._folder / f"pin-{variant}.json")

    def pinned(self, variant: str) -> str | None:
        """Return the pinned version of a variant, None if it follows training."""
        path = self._folder / f"pin-{variant}.json"
        return json.loads(path.read_text())["version"] if path.is_file() else None

    def _path(self, version: int) -> Path:
        return self._deltas / f"{version:09d}.json"
