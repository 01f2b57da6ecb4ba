"""Before any gradient: how the model reads a batch, which tokens there are, and their losses."""
