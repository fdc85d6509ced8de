"""A user -> items: the trained policy behind HTTP."""
