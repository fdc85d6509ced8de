"""Search algorithms: functions from an engine and prompts to candidates."""
