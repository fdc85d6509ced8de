"""Ray actors and sessions: pools, jobs, memory."""
