"""Build training data: prompts, supervised tasks, rationales, synthetic data and importers."""
