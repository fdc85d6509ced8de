"""The command line; `cluster.cli:main` is the entry point."""

from cluster.cli.app import main

__all__ = ["main"]
