"""Commands that measure: `python -m benchmarks.NAME` in the repository's root. The last line
printed is JSON.
"""
