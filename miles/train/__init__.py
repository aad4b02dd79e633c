"""The trainers: Megatron ranks fed by the data stream. See loop.py for the run as a whole."""
