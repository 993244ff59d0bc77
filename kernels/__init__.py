"""The operations that a decode step consists of, one file each.

Every file has the formula, and a torch twin that runs on any device and in every dtype: it is what the CPU runs and
what a fused kernel for the same signature is compared with. `kernels.dispatch` chooses the implementations.
"""
