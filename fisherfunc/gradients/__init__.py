"""Layer 3: token losses and the gradients of each of them. It knows functions of parameters, no module."""
