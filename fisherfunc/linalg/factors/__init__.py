"""Grams from factors of gradients that are never formed."""
