"""Time, memory and learning quality beside other methods: run as ``python -m benchmarks.<program>``."""
