"""Training runs: controller, main loop, evaluation and run folder."""
