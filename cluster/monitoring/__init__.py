"""Prometheus metrics, the exporter, rules and dashboards."""
