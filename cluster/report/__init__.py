"""HTML report of a run, and comparison of several runs."""
