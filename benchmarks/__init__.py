"""Measurements, each run by ``python -m benchmarks.NAME``. Their committed results are the only source of figures."""
