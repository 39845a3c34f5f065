"""Learning quality of every method: ``python -m benchmarks.experiments.run``."""
