"""Checkpoints between Hugging Face and Megatron's `torch_dist`, both ways, exact.

Tensors go by name through a family's parameter map (`families/`); no model is built.
"""
