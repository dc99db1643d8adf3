"""Checksums of arrays, the same on any mesh, and of JSON records."""

import functools
import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_MIX = 2654435761  # odd; 2^32 over the golden ratio


@jax.jit
def checksums(tree: Any) -> Any:
    """A uint32 for each array of a pytree.

    The sum, modulo 2^32, of the array's words times odd numbers that differ by position. An odd factor is
    invertible, so every change of a single word is detected; of other changes, one in four thousand million is missed.
    Integer sums do not depend on their order, so a sharded array and a replicated one have the same checksum.
    """
    return jax.tree.map(_checksum, tree)


def named(tree: Any) -> dict[str, list]:
    """What a checkpoint records of a pytree: name -> [shape, dtype, checksum], in types that JSON has."""
    sums = jax.device_get(checksums(tree))
    return {
        name: [*description, int(total)]
        for (name, description), total in zip(described(tree).items(), jax.tree.leaves(sums), strict=True)
    }


def described(tree: Any) -> dict[str, list]:
    """Name -> [shape, dtype] of each array, or of each `jax.ShapeDtypeStruct`."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}


def _checksum(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, _WORD[min(x.dtype.itemsize, 4)]).astype(jnp.uint32)
    strides = [int(np.prod(words.shape[axis + 1 :], dtype=np.int64)) % 2**32 for axis in range(words.ndim)]
    place = functools.reduce(
        jnp.add,
        (jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(s) for axis, s in enumerate(strides)),
        jnp.zeros(words.shape, jnp.uint32),
    )
    return jnp.sum(words * ((place * np.uint32(_MIX)) ^ (place >> 7) | np.uint32(1)), dtype=jnp.uint32)


_WORD = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the checksum of its text, for JSON."""
    text = json.dumps(record)
    return {"crc32": zlib.crc32(text.encode()), "record": text}


def opened(found: Any) -> dict[str, Any] | None:
    """The record, or None if `found` is not what `sealed` returned."""
    if not isinstance(found, dict) or not isinstance(text := found.get("record"), str):
        return None
    return json.loads(text) if zlib.crc32(text.encode()) == found.get("crc32") else None
