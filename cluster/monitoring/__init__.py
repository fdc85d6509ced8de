"""Prometheus metrics with their exporter, alert rules and Grafana dashboards."""
