"""Several results beside each other."""
