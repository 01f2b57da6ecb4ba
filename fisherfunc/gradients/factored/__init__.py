"""The factored route: Grams from output cotangents and inputs of linear maps; no large gradient is formed."""
