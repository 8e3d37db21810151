"""The memory promise: how a budget is divided, what a pass takes, what all models hold."""
