"""Training batches: packing trees into rows, supervised batches, micro-batches."""
