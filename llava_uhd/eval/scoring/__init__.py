"""Scores of the benchmarks as pure functions: no files, no models. One module per family."""
