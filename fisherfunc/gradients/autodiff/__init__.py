"""What autograd can be asked of a model as a function: gradients of its losses, and what they reach."""
