"""miles: supervised fine-tuning as data -> loss -> optimizer."""

__version__ = "0.1.0"
