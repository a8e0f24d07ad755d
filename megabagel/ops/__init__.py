"""The compiled operators of csrc/, each beside the same computation in PyTorch or Python.

Imports nothing of ours. Operators are functions of tensors; they know nothing of plans, layouts or models.
"""
