"""The published figures: one module each, `run(quick)` in it, started by `orchard bench NAME`."""
