"""Feedback: what was shown, joined with what users did about it, as data to learn from."""
