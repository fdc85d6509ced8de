"""What the replicas of an endpoint share: catalogue deltas and pins, as files in one folder.

Delta n makes version n of version n - 1. Its file appears whole or not at all, and only once: of
two replicas that write the same number, one is told to look again. Whoever starts later reads them
all, and so arrives at the same catalogue.
"""

import json
import os
import uuid
from pathlib import Path

from serve.catalog.store import Shelf, Stock
from serve.errors import ConflictError
from serve.schema import DeltaRequest


class Ledger:
    """The shared folder of the endpoints of one base catalogue."""

    def __init__(self, folder: Path, catalogue: str) -> None:
        """`catalogue` is the digest of the catalogue that version 0 is."""
        self._folder = folder / catalogue[:16]
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
                f"catalogue version {version} was made elsewhere at the same time; look at the "
                "catalogue again and send the delta anew"
            ) from error
        finally:
            whole.unlink()

    def catch_up(self, stock: Stock) -> Shelf:
        """Put every delta that the stock has not seen; returns the shelf then in use."""
        while (delta := self.next_after(stock.shelf.version)) is not None:
            stock.put(stock.after(delta.model_copy(update={"base_version": None})))
        return stock.shelf

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
