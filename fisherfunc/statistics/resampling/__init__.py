"""Intervals by resampling sequences."""
