"""`python -m benchmarks` measures the system on this machine and writes docs/performance.md."""
