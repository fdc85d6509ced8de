"""Training runs: the controller, the main loop and the run folder."""
