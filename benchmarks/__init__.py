"""Measurements, one file per claim, always as ratios within one run. docs/performance.md keeps the figures."""
