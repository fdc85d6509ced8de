"""Advantage estimators: group, sibling and step-aligned."""
