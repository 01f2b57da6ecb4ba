"""A user's data as sequences, each a batch of one."""
