"""What is measured, as commands: `python -m benchmarks.NAME --json FILE` prints a table and writes the numbers."""
