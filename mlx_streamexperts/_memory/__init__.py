"""The memory promise: dividing a budget, predicting and bounding passes, counting all models."""
