"""What a pass will do and take, and what it took."""
