"""Calls of a user's module that leave it, and what it holds, as they were."""
