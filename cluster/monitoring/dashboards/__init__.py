"""Grafana dashboards, defined in `boards.py`; `generate.py` writes their JSON files."""
