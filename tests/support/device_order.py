"""Meshes whose devices are in a random order, as far from that of the processes as a pod's topology may bring them."""

import numpy as np


def permuted(seed: int):
    """Instead of `sharding.arranged`."""

    def arranged(devices, data, fsdp):
        return np.array(devices)[np.random.default_rng(seed).permutation(len(devices))].reshape(data, fsdp)

    return arranged
