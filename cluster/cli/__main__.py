"""Entry point of `python -m cluster.cli`."""

from cluster.cli.app import main

main()
