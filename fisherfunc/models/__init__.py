"""Layer 4: modules as pure functions, and the Hugging Face adapter. The user's module is never touched."""
