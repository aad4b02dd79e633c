"""Runnable recipes: each module has a function that returns a complete configuration, and a main."""
