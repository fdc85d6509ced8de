"""Benchmarks: each module NAME has a function `run(quick)`, started by `orchard bench NAME`."""
