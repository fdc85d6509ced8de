"""The command line; `cluster.cli:main` is the entry point."""
