"""What the replicas of an endpoint share: catalog deltas and pins, as files in one folder.

Delta n makes version n of version n - 1. Its file appears whole or not at all, and only once: of
two replicas that write the same number, one is told to look again. Whoever starts later reads them
all, and so arrives at the same catalog.
"""

import json
import os
import uuid
from pathlib import Path

from serve.catalog.store import CatalogStore, CatalogVersion
from serve.errors import ConflictError
from serve.schema import DeltaRequest


class SharedState:
    """The shared folder of the endpoints of one base catalog."""

    def __init__(self, folder: Path, catalog: str) -> None:
        """`catalog` is the digest of the catalog that version 0 is."""
        self._folder = folder / catalog[:16]
        self._deltas = self._folder / "deltas"
        self._deltas.mkdir(parents=True, exist_ok=True)

    @property
    def policies(self) -> Path:
        """Where accepted policies are kept."""
        return self._folder / "policies"

    def next_after(self, version: int) -> DeltaRequest | None:
        """The delta that makes the version after this one, once there is one."""
        path = self._path(version + 1)
        return DeltaRequest.model_validate_json(path.read_text()) if path.is_file() else None

    def append(self, version: int, delta: DeltaRequest) -> None:
        """Write down what makes `version`.

        Raises:
            ConflictError: another replica has made that version.
        """
        whole = self._deltas / f".{uuid.uuid4().hex}"
        whole.write_text(delta.model_dump_json())
        try:
            os.link(whole, self._path(version))
        except FileExistsError as error:
            raise ConflictError(
                f"catalog version {version} was made elsewhere at the same time; look at the "
                "catalog again and send the delta anew"
            ) from error
        finally:
            whole.unlink()

    def catch_up(self, catalog_store: CatalogStore) -> CatalogVersion:
        """Apply every delta that the store has not seen; return the catalog version then in use."""
        while (delta := self.next_after(catalog_store.current.version)) is not None:
            catalog_store.activate(
                catalog_store.apply(delta.model_copy(update={"base_version": None}))
            )
        return catalog_store.current

    def pin(self, variant: str, version: str | None) -> None:
        """Note which version of a variant all replicas are to hold; None follows training."""
        whole = self._folder / f".{uuid.uuid4().hex}"
        whole.write_text(json.dumps({"version": version}))
        whole.replace(self._folder / f"pin-{variant}.json")

    def pinned(self, variant: str) -> str | None:
        """The version noted."""
        path = self._folder / f"pin-{variant}.json"
        return json.loads(path.read_text())["version"] if path.is_file() else None

    def _path(self, version: int) -> Path:
        return self._deltas / f"{version:09d}.json"
