"""Ray sessions, actor pools, jobs and memory monitoring."""
