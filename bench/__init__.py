"""Benchmarks of tokenmix_kernels: `python -m bench --help`, or `pytest bench` for the short form."""
