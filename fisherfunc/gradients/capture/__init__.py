"""How a model uses its parameters: which calls, in which role, and what may be exploited."""
