"""One model on several machines: each rank's layers, and what the ranks tell each other."""
