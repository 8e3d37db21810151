"""Run-ahead decoding: a whole token in one graph, checked afterwards."""
