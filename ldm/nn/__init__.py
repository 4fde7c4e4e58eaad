"""Blocks that networks are made of: tensors in, tensors out. Import from the submodules."""
