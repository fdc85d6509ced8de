"""ScoredTrees -> PolicyVersion: credit, packing, loss, and the update itself."""
