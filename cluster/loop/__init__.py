"""The closed loop: rounds of serving, collecting, training, judging and publishing."""
