"""Grafana dashboards: `boards.py` says what is on them, `generate.py` writes the JSON beside it."""
