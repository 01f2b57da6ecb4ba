"""Eigenvalues from products with a matrix alone."""
