"""Training batches: trees packed into rows, supervised batches and micro-batches."""
