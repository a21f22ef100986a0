"""Benchmarks: the engine of lib beside a full recompute and the libraries that do the same work.

`make bench` runs everything and writes `benchmarks/results.json`; `python -m benchmarks --quick`
proves in some minutes that all contenders work and are exact.
"""
