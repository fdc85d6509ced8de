"""Train the policy on scored trees: advantages, packing, loss and optimizer steps."""
