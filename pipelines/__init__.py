"""Recipes: each module has a function that returns a complete configuration, and runs as a script.

A recipe may import the configuration records and `train`; nothing in `miles` imports a recipe.
"""
