"""Layer 5: `fisher_spectrum` and its parts. Composes the layers below; prints nothing, touches no file."""
