"""Spectra by several processes, and of projected rows."""
