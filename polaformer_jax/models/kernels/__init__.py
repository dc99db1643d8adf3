"""Pallas kernels of the models' parts: what operations on whole arrays would send to memory and back stays on the chip.

A package for each part: `polarity`, the attention core. `placement` says for which devices, and runs a kernel on each
device's own examples.
"""
