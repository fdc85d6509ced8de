"""Folders that are there whole or not at all."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from orchard.errors import DataError


def check_output_dir(out: Path, *, mark: str, kind: str, overwrite: bool) -> None:
    """Raise DataError unless `out` is new, empty, or a folder of ours that may be replaced.

    Args:
        out: the folder.
        mark: a file by which our folders are known. What lacks it is never deleted.
        kind: what our folders are, for messages.
        overwrite: replace one.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or not (out / mark).is_file():
        raise DataError(f"{out} exists and is no {kind}; choose another folder")
    if not overwrite:
        raise DataError(f"{out} holds a {kind} already; choose another folder or pass --overwrite")


@contextmanager
def atomic_dir(out: Path) -> Generator[Path]:
    """A temporary folder that takes the place of `out` when the block ends well."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        retired = out.with_name(f".{out.name}.retired")
        if out.exists():
            shutil.rmtree(retired, ignore_errors=True)
            out.rename(retired)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(retired, ignore_errors=True)


def atomic_write(path: Path, text: str) -> None:
    """Write a file whole: a reader finds the old text or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
