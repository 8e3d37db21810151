"""What every command line shares: options, mlx-lm's own programs, closing lines."""
