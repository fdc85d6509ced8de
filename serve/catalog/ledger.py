"""Ledger of deltas, of the catalog or of events: one file per version, chained by digests.

Delta n turns version n - 1 into version n. Its file holds the digest of delta n - 1 (of the base
catalog for the first), the digest of the version that it makes, and its own digest. It is created
atomically and only once: of two replicas that write the same number, one gets a ConflictError.
`head.json` names the newest delta, so that a ledger that lost its end is noticed too.

Recovery: a ledger with a missing, damaged or foreign file is never applied in part. Its error names
the file. Restore that file from a backup; or move it, all later deltas and `head.json` out of the
folder, and the catalog goes on from the version before.
"""

import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from pydantic import BaseModel, ValidationError

from orchard.errors import DataError
from serve.errors import ConflictError

_log = logging.getLogger("orchard.serve")
_NAME = re.compile(r"[0-9]{9}\.json")
HEAD = "head.json"
"""Name of the file that names the newest delta."""


class LedgerError(DataError):
    """A delta of the ledger is missing, damaged, or belongs to another ledger."""


D = TypeVar("D", bound=BaseModel)


@dataclass(frozen=True, kw_only=True)
class Entry(Generic[D]):
    """One delta of the ledger, verified."""

    version: int
    """Version that the delta makes."""
    previous: str
    """Digest of the delta before it; of the base catalog for the first."""
    makes: str
    """Digest of the version that it makes; empty in files of earlier releases."""
    delta: D
    digest: str
    """SHA-256 of everything above."""


class Ledger(Generic[D]):
    """Deltas in a folder, and the position up to which this replica has applied them."""

    def __init__(self, folder: Path, catalog: str, model: type[D]) -> None:
        """Start at version 0 of the catalog with the digest `catalog`; deltas are of `model`."""
        self._folder, self._base, self._model = folder, catalog, model
        self._version, self._digest = 0, catalog
        self._chained = False  # whether a delta with digests has been applied

    def next_entry(self) -> Entry[D] | None:
        """Return the delta after the current position, None if there is none yet.

        Raises:
            LedgerError: it is damaged, does not continue the ledger, or is missing though later
                ones exist.
        """
        path = self._path(self._version + 1)
        head = self._head()
        if not path.is_file():
            later = [n for n in self._numbers() if n > self._version]
            newest = max([*later, head[0] if head else 0])
            if newest > self._version and not path.is_file():  # looked up again: it may be new
                raise self._error(self._version + 1, f"is missing, the newest is delta {newest}")
            return None
        entry = self._read(self._version + 1, self._digest, chained=self._chained)
        if head is not None and head[0] == entry.version and head[1] != entry.digest:
            raise self._error(entry.version, f"is not the delta that {HEAD} names")
        return entry

    def advance(self, entry: Entry[D]) -> None:
        """Count the next delta as applied."""
        assert entry.version == self._version + 1
        self._version, self._digest = entry.version, entry.digest
        self._chained = self._chained or bool(entry.makes)

    def append(self, version: int, delta: D, makes: str) -> None:
        """Write the delta that creates `version`, whose digest is `makes`, and count it as applied.

        Raises:
            ConflictError: another replica has already created that version.
        """
        assert version == self._version + 1
        tree: dict[str, Any] = {
            "version": version, "previous": self._digest, "makes": makes,
            "delta": delta.model_dump(mode="json", exclude_defaults=True),
        }  # fmt: skip
        digest = _digest(tree)
        temporary = self._write({**tree, "digest": digest})
        try:
            os.link(temporary, self._path(version))
        except FileExistsError as error:
            raise ConflictError(
                f"another replica created version {version} at the same time; read the catalog "
                "again and send a new delta"
            ) from error
        finally:
            temporary.unlink()
        self._version, self._digest, self._chained = version, digest, True
        try:
            head = self._head()
            if head is None or head[0] < version:
                self._write({"version": version, "digest": digest}).replace(self._folder / HEAD)
        except (OSError, LedgerError):  # the delta itself is written, and every replica applies it
            _log.warning("%s does not name delta %d", self._folder / HEAD, version, exc_info=True)

    def operations(self, version: int) -> list[D]:
        """Return the changes that lead from version 0 to a version, rollbacks resolved.

        Raises:
            LedgerError: a delta up to the version cannot be used.
        """
        # Changes that lead to each version so far; a version shares those of the one before.
        changes: list[tuple[D, ...]] = [()]
        previous, chained = self._base, False
        for number in range(1, version + 1):
            entry = self._read(number, previous, chained=chained)
            previous, chained = entry.digest, chained or bool(entry.makes)
            target = _rollback_of(entry.delta)
            changes.append((*changes[-1], entry.delta) if target is None else changes[target])
        return list(changes[version])

    def verify(self) -> int:
        """Read the whole ledger without applying it; return the newest version.

        Raises:
            LedgerError: a delta cannot be used.
        """
        reader = Ledger(self._folder, self._base, self._model)
        while (entry := reader.next_entry()) is not None:
            reader.advance(entry)
        return reader._version

    def error(self, version: int, why: str) -> LedgerError:
        """Return the error for a delta that cannot be applied, with what to do."""
        return self._error(version, why)

    def _read(self, number: int, previous: str, *, chained: bool) -> Entry[D]:
        """Read and verify one delta that has to follow the delta with digest `previous`."""
        path = self._path(number)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise self._error(number, "is missing") from error
        except PermissionError as error:
            raise LedgerError(f"delta {path} may not be read; give it read permission") from error
        except (OSError, UnicodeDecodeError) as error:
            raise self._error(number, "is damaged") from error
        if not text.strip():
            raise self._error(number, "is empty")
        try:
            tree: Any = json.loads(text)
        except ValueError as error:
            raise self._error(number, "is cut short or damaged") from error
        if not isinstance(tree, dict):
            raise self._error(number, "is not a delta")
        fields = cast("dict[str, Any]", tree)
        try:
            if "digest" not in fields and not chained:  # written by an earlier release
                delta = self._model.model_validate(fields)
                _log.warning("delta %s has no digest: an earlier release wrote it", path)
                return Entry(
                    version=number, previous=previous, makes="", delta=delta, digest=_digest(fields)
                )
            own = fields.pop("digest", None)
            if own != _digest(fields):
                raise self._error(number, "does not have the digest that it names")
            if fields.get("previous") != previous or fields.get("version") != number:
                raise self._error(number, "does not continue this ledger")
            delta = self._model.model_validate(fields.get("delta"))
        except ValidationError as error:
            raise self._error(number, f"is not a delta ({error.errors()[0]['msg']})") from error
        target = _rollback_of(delta)
        if target is not None and target >= number:
            raise self._error(number, f"goes back to version {target}, which came later")
        return Entry(
            version=number, previous=previous, makes=str(fields.get("makes", "")), delta=delta,
            digest=str(own),
        )  # fmt: skip

    def _head(self) -> tuple[int, str] | None:
        """Return version and digest of the newest delta, None if none was written yet."""
        path = self._folder / HEAD
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            return int(tree["version"]), str(tree["digest"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LedgerError(
                f"{path} is damaged; restore it from a backup, or remove it to accept the "
                "deltas next to it as they are"
            ) from error

    def _numbers(self) -> Sequence[int]:
        """Return the numbers of the files in the folder."""
        names = (entry.name for entry in os.scandir(self._folder))
        return [int(name.partition(".")[0]) for name in names if _NAME.fullmatch(name)]

    def _error(self, number: int, why: str) -> LedgerError:
        """Return the error for a file, with its remedies."""
        return LedgerError(
            f"delta {self._path(number)} {why}; restore it from a backup, or move it, all later "
            f"deltas and {HEAD} out of the folder to continue from catalog version {number - 1}"
        )

    def _write(self, tree: dict[str, Any]) -> Path:
        """Write a temporary file in the folder, down to the disk, and return its path."""
        temporary = self._folder / f".{uuid.uuid4().hex}"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(tree, file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        return temporary

    def _path(self, version: int) -> Path:
        return self._folder / f"{version:09d}.json"


def _rollback_of(delta: BaseModel) -> int | None:
    """Return the version that a delta goes back to, if it is one that can and does."""
    return getattr(delta, "rollback_to", None)


def _digest(tree: dict[str, Any]) -> str:
    """Return the SHA-256 of a JSON tree, independent of the order of its keys."""
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
