"""Triton kernels for what lies between the matrix products, and for the 8-bit products themselves.

Each file opens with its formula and layout and holds the kernel and its twin in plain torch. The twin is the
reference, the CPU path, and what runs where Triton does not.
"""
