"""The dense route: gradients are formed, one slab of columns at a time. The reference, and the way for any model."""
