"""What `bench train` trains on, without a download: tasks with a held-out part.

text           the standard library's source, for a causal language model
instructions   its signatures, each followed by its docstring: the loss of the docstrings
packages       its docstrings, each with its top-level package as the label
digits         scikit-learn's images of digits, with few labels (examples/pretrain_digits.py)
"""
