"""Parts that several benchmarks share: measuring, tables, plots, rivals."""
