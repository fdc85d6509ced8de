"""From a request to ranked items: batching, scheduling, search."""
