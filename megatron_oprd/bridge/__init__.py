"""OPRD-Bridge: linear maps into one subspace for layers of models with unequal hidden sizes (OPRD eq. (12)-(13)).

The modules here read, write and check bridge files. `fit.py` is the command that makes them, from `fitting/`.
"""
