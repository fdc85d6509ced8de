"""Training rows: prompts, supervised tasks, rationales, synthetic data, importers."""
