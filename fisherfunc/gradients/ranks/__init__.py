"""A pass over ranks: each passes over sequences of its own, and holds its rows of the Grams."""
