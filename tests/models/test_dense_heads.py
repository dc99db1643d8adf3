"""Segmentation heads and the resizing of maps against MMSegmentation 1.2.2 and PyTorch 2.13, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polaformer_jax import weights
from polaformer_jax.models.batch_norm import parameter_count
from polaformer_jax.models.dense_heads import FPN, ConvModule, FCNHead, SemanticFPNHead, UPerHead
from polaformer_jax.models.initializers import AbstractKeys
from polaformer_jax.weights import rules
from tests.support import GOLDEN_FOLDER
from tests.support.golden_models import filled, relative_error
from tests.support.quick import QUICK
from tests.support.small_models import noise

GOLDEN = np.load(GOLDEN_FOLDER / "dense_heads.npz")
CHANNELS, WIDTH, CLASSES = (3, 4, 5, 6), 4, 3


class Semantic(nnx.Module):
    def __init__(self, *, channels=CHANNELS, width=WIDTH, **types):
        self.neck = FPN(channels, width, **types)
        self.decode_head = SemanticFPNHead((width,) * 4, width, num_classes=CLASSES, **types)

    def __call__(self, maps, **options):
        return {"logits": self.decode_head(self.neck(maps), **options)}


class UPer(nnx.Module):
    def __init__(self, **types):
        self.decode_head = UPerHead(CHANNELS, WIDTH, num_classes=CLASSES, **types)
        self.auxiliary_head = FCNHead(CHANNELS[2], WIDTH, num_classes=CLASSES, **types)

    def __call__(self, maps, **options):
        return {"logits": self.decode_head(maps, **options), "auxiliary": self.auxiliary_head(maps[2], **options)}


NETS = {"semantic": Semantic, "uper": UPer}
every = pytest.mark.parametrize("name", NETS)


def golden(prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN.files if key.startswith(prefix)}


def build(name: str, dtype, param_dtype=None):
    """(graphdef, state) with the golden weights, all of which must be found under MMSegmentation's names."""
    make = functools.partial(NETS[name], dtype=dtype, param_dtype=param_dtype or dtype)
    return filled(make, golden(f"{name}/weight/"))


def maps(dtype):
    return [jnp.asarray(GOLDEN[f"map/{i}"], dtype) for i in range(4)]


def official(tree) -> dict[str, np.ndarray]:
    flat = {name: np.asarray(leaf) for name, leaf in weights.flatten(tree).items()}
    return {rules.official_name(name, a.ndim): rules.to_official(name, a) for name, a in flat.items()}


@every
def test_logits_gradients_and_statistics_are_those_of_mmsegmentation(name, x64):
    graphdef, state = build(name, jnp.float64)
    x = maps(jnp.float64)
    cotangents = {key: jnp.asarray(value, jnp.float64) for key, value in golden(f"{name}/cotangent/").items()}

    def loss(state, last):
        net = nnx.merge(graphdef, state)
        outputs = net([*x[:3], last], mask=jnp.ones(3, bool))
        total = sum(jnp.sum(outputs[key] * cotangents[key]) for key in cotangents)
        return total, (outputs, nnx.to_pure_dict(nnx.state(net, nnx.BatchStat)))

    def run(state):
        return nnx.merge(graphdef, state)(x), jax.grad(loss, (0, 1), has_aux=True)(state, x[3])

    evaluated, ((gradients, of_map), (outputs, statistics)) = jax.jit(run, compiler_options=QUICK)(state)
    for key in cotangents:
        assert relative_error(evaluated[key], GOLDEN[f"{name}/eval/{key}"]) < 1e-10, key
        assert relative_error(outputs[key], GOLDEN[f"{name}/train/{key}"]) < 1e-10, key
    running, after = official(statistics), golden(f"{name}/after/")
    assert running.keys() == after.keys()
    for path in after:
        assert relative_error(running[path], after[path]) < 1e-10, path
    found = {path: value for path, value in official(gradients).items() if path not in after}
    expected = golden(f"{name}/grad/")
    assert relative_error(of_map, expected.pop("map/3")) < 1e-10
    assert found.keys() == expected.keys()
    for path in expected:
        assert relative_error(found[path], expected[path]) < 1e-10, path


@every
def test_bfloat16_is_close_and_logits_are_float32(name):
    graphdef, state = build(name, jnp.bfloat16, jnp.float32)

    def run(state):
        net, x = nnx.merge(graphdef, state), maps(jnp.bfloat16)
        return {"eval": net(x), "train": net(x, mask=jnp.ones(3, bool))}

    for mode, outputs in jax.jit(run, compiler_options=QUICK)(state).items():
        for key, value in outputs.items():
            assert value.dtype == jnp.float32
            assert relative_error(value, GOLDEN[f"{name}/{mode}/{key}"]) < 0.03, (mode, key)


@every
def test_masked_examples_add_nothing(name):
    """What padding examples hold changes neither the others' logits nor the statistics."""
    graphdef, state = build(name, jnp.float32)

    @jax.jit
    def run(state, x):
        net = nnx.merge(graphdef, state)
        logits = net(x, mask=jnp.arange(3) < 2)["logits"]
        return logits[:2], nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))

    x = maps(jnp.float32)
    (logits, statistics), (others, same) = run(state, x), run(state, [a.at[2].set(1e3) for a in x])
    np.testing.assert_array_equal(logits, others)
    jax.tree.map(np.testing.assert_array_equal, statistics, same)
    assert not np.array_equal(logits, run(state, [a.at[1].set(1e3) for a in x])[0])


@every
def test_maps_of_one_value(name):
    """Every map 1 x 1, one example: finite in evaluation and in training."""
    graphdef, state = build(name, jnp.float32)
    x = [a[:1, :1, :1] for a in maps(jnp.float32)]

    def run(state):
        net = nnx.merge(graphdef, state)
        return [net(x, mask=mask)["logits"] for mask in (None, jnp.ones(1, bool))]

    for logits in jax.jit(run, compiler_options=QUICK)(state):
        assert logits.shape == (1, 1, 1, CLASSES)
        assert np.isfinite(logits).all()


def test_dropout_drops_whole_channels():
    """With weights of one input channel only, an example's logits are those of that channel: scaled, or the bias."""
    head = FCNHead(3, 2, num_classes=1, dropout=0.5, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    head.conv_seg.kernel[...] = jnp.asarray([1.0, 0.0]).reshape(1, 1, 2, 1)
    x = noise(16, 4, 4, 3)
    plain, dropped = np.asarray(head(x)), np.asarray(head(x, key=jax.random.key(0)))
    kept = np.array([np.allclose(a, 2 * b, rtol=1e-5) for a, b in zip(dropped, plain, strict=True)])
    gone = ~dropped.any(axis=(1, 2, 3))
    assert (kept ^ gone).all()
    assert 3 < kept.sum() < 13
    np.testing.assert_array_equal(head(x, key=None), plain)


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda **types: FPN((64, 128, 320, 512), **types), 2_623_488),
        (lambda **types: SemanticFPNHead((256,) * 4, num_classes=150, **types), 1_643_158),
        (lambda **types: UPerHead((64, 128, 320, 512), num_classes=150, **types), 29_711_510),
        (lambda **types: FCNHead(320, num_classes=150, **types), 776_342),
    ],
)
def test_parameters_of_full_sizes(make, count):
    head = make(dtype=jnp.float32, param_dtype=jnp.float32, rngs=AbstractKeys())
    assert parameter_count(head) == count


def test_initial_values():
    """The standard deviations and bounds of MMSegmentation; biases 0."""
    types = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    conv, neck = ConvModule(3, 32, 64, **types).conv, FPN((32, 64), 64, **types)
    assert conv.bias is None
    assert np.std(conv.kernel[...]) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    lateral, smooth = neck.lateral_convs[0].conv, neck.fpn_convs[0].conv
    for kernel, fans in ((lateral.kernel[...], 32 + 64), (smooth.kernel[...], 9 * 128)):
        assert np.max(np.abs(kernel)) == pytest.approx((6 / fans) ** 0.5, rel=0.02)
        assert np.std(kernel) == pytest.approx((2 / fans) ** 0.5, rel=0.05)
    seg = FCNHead(8, 64, num_classes=32, **types).conv_seg
    assert np.std(seg.kernel[...]) == pytest.approx(0.01, rel=0.05)
    assert not np.any(seg.bias[...])
    assert not np.any(smooth.bias[...])


def test_other_maps_are_an_error():
    types = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    neck = FPN((3, 4), 4, **types)
    with pytest.raises(ValueError, match="expected .* with 3, 4 channels"):
        neck([noise(1, 4, 4, 3), noise(1, 2, 2, 5)])
    with pytest.raises(ValueError, match=r"maps of shapes \[\(1, 4, 4, 3\)\], expected"):
        neck([noise(1, 4, 4, 3)])
