"""Measurements. Each script prints a table with floors and appends its figures to benchmarks/results."""
