"""The served catalog: versions, deltas, attributes and filters."""
