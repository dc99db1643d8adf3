"""Tiny data sets of the Long Range Arena's tasks, made up on the spot."""

import numpy as np

from polaformer_jax.data.lra import store


def write(data_dir, *, train=48, dev=20, test=20, longest=300, seed=0) -> str:
    """Random ListOps symbols whose first digit is the label, and random pairs of texts. Returns the folder."""
    rng = np.random.default_rng(seed)
    with store.writing("lra_listops", data_dir, origin="made up", settings={}) as writer:
        for split, count in (("train", train), ("dev", dev), ("test", test)):
            for _ in range(count):
                symbols = rng.integers(15, size=rng.integers(20, longest), dtype=np.uint8)
                symbols[0] = rng.integers(10)
                lengths = (len(symbols), int((symbols != 14).sum()))
                writer.add(split, int(symbols[0]), symbols.tobytes(), lengths=lengths)
    with store.writing("lra_retrieval", data_dir, origin="made up", settings={}) as writer:
        for split, count in (("train", train), ("dev", dev), ("test", test)):
            for _ in range(count):
                texts = [bytes(rng.integers(256, size=rng.integers(1, longest), dtype=np.uint8)) for _ in range(2)]
                writer.add(split, int(rng.integers(2)), *texts, lengths=tuple(map(len, texts)))
    return str(data_dir)
