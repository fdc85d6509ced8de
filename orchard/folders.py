"""Write output folders and files atomically, and protect existing ones."""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from orchard.errors import DataError

_PARTIAL = ".partial"
"""Name of the temporary folder inside a folder that is filled in place."""


def check_output_dir(out: Path, *, mark: str, kind: str, overwrite: bool) -> None:
    """Raise DataError unless `out` is new, empty, or an Orchard folder that may be replaced.

    Args:
        out: the output folder.
        mark: a file that identifies folders of this kind; a folder without it is never deleted.
        kind: name of the kind of folder, for messages.
        overwrite: allow the replacement of an existing folder.
    """
    if out.is_dir():
        if all(path.name == _PARTIAL for path in out.iterdir()):
            return
    elif not out.exists():
        return
    if not out.is_dir() or not (out / mark).is_file():
        raise DataError(f"{out} exists and is not a {kind}; choose another folder")
    if not overwrite:
        raise DataError(f"{out} holds a {kind} already; choose another folder or pass --overwrite")


def check_readable(*paths: Path) -> None:
    """Raise DataError if a file or folder exists but may not be read by this user."""
    for path in paths:
        try:
            os.close(os.open(path, os.O_RDONLY))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            raise DataError(
                f"{path} may not be read: {error.strerror}; let its owner change its mode, or run "
                "as a user who may"
            ) from error


@contextmanager
def atomic_dir(out: Path) -> Generator[Path]:
    """Yield a temporary folder that replaces `out` if the block succeeds.

    A symbolic link stays, and what it points to is replaced. A folder that cannot be replaced, a
    mount point or the working folder, is filled file by file instead.
    """
    out = out.resolve()
    in_place = out.is_dir() and (out.is_mount() or out == Path.cwd())
    partial = out / _PARTIAL if in_place else out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if in_place:
            _fill(out, partial)
            return
        retired = out.with_name(f".{out.name}.retired")
        if out.exists():
            shutil.rmtree(retired, ignore_errors=True)
            out.rename(retired)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Generator[Path]:
    """Yield the path of a temporary file that replaces `path` if the block succeeds.

    A symbolic link stays, and what it points to is replaced.
    """
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _fill(out: Path, partial: Path) -> None:
    """Replace everything in `out` by the content of its folder `partial`."""
    for path in out.iterdir():
        if path == partial:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in partial.iterdir():
        path.rename(out / path.name)


def atomic_write(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old text or the new text, never a part."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
