"""Pallas kernels of the models' parts: what operations on whole arrays would send to memory and back stays on the chip.

A package for each part: `polarity`, the attention core, `windows`, softmax attention within windows, and `mlp`, the
second half of a block. `placement` says for
which devices, and runs a kernel on each device's own examples.
"""
