"""Grams of parameters with the tokens that their rows are of."""
