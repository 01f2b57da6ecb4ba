"""Layer 1: linear algebra on Gram matrices. It knows no model."""
