"""Workers that run the learner's jobs: in groups of Ray Train, or one in the driver's process."""
