"""Find the fastest settings for a model on this machine and your prompts."""

from ._command import Runner, Tuner, Workload, main, setup_arg_parser, space

__all__ = ["Runner", "Tuner", "Workload", "main", "setup_arg_parser", "space"]
