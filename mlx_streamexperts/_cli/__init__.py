"""Shared by the command lines: options, running mlx-lm's programs, closing lines."""
