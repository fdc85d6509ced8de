"""The `orchard` command line; `cluster.cli:main` is its entry point."""

from cluster.cli.app import main

__all__ = ["main"]
