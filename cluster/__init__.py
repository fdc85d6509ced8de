"""The composition root: the only room that knows the others, and the command line."""
