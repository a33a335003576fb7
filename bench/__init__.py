"""Benchmarks, and the report that writes the README's tables."""
