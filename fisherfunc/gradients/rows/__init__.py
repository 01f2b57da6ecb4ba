"""What is passed over: tokens, their targets, and the rows of G that they give."""
