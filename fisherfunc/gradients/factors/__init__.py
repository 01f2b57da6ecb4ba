"""How the gradients of one use of a parameter are held, and how they become its Gram."""
