"""Bytes: where they lie in a checkpoint, how they are read, and how files are written."""
