"""Four small models that reach every branch, against the official code: logits, loss, stages, every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polaformer_jax import weights
from polaformer_jax.weights import rules
from tests.support.golden_models import GOLDEN_FOLDER, SMALL, build_small, float32_tolerance, images, relative_error
from tests.support.quick import QUICK

# One has most kinds of blocks; the others take three times as long again.
models = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "swin_mixed" else pytest.mark.slow) for name in SMALL]
)


@models
def test_float64(name, x64):
    golden = np.load(GOLDEN_FOLDER / f"small_{name}.npz")
    graphdef, params = build_small(name, jnp.float64)
    x = images(4, SMALL[name]["spec"]["img_size"], jnp.float64)

    def loss(params):
        model = nnx.merge(graphdef, params)
        logits = model(x)
        stages = _stages(nnx.merge(graphdef, jax.lax.stop_gradient(params)), x)
        return -jnp.sum(golden["targets"] * jax.nn.log_softmax(logits), axis=-1).mean(), (logits, stages)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    (found, (logits, stages)), gradients = run(params)
    assert relative_error(logits, golden["logits"]) < 1e-9
    for i, stage in enumerate(stages):
        assert relative_error(stage, golden[f"stage{i}"]) < 1e-7, f"stage {i}"
    assert relative_error(found, golden["loss"]) < 1e-9
    official = {
        rules.official_name(path, gradient.ndim): rules.to_official(path, np.asarray(gradient))
        for path, gradient in weights.flatten(gradients).items()
    }
    assert {f"grad/{path}" for path in official} == {key for key in golden.files if key.startswith("grad/")}
    for path, gradient in official.items():
        expected = golden[f"grad/{path}"].astype(np.float64)
        # The floor is for the k bias of softmax attention, whose gradient is zero but for rounding.
        assert np.linalg.norm(gradient - expected) <= 1e-7 * np.linalg.norm(expected) + 1e-12, path


@models
def test_float32_logits(name):
    golden = np.load(GOLDEN_FOLDER / f"small_{name}.npz")
    graphdef, params = build_small(name, jnp.float32)
    x = images(4, SMALL[name]["spec"]["img_size"], jnp.float32)
    logits = jax.jit(lambda params: nnx.merge(graphdef, params)(x), compiler_options=QUICK)(params)
    assert logits.dtype == jnp.float32
    assert relative_error(logits, golden["logits"]) < float32_tolerance(SMALL[name])


def _stages(model, x):
    """Stage outputs as the official code has them: in Pola-Swin after the patch merging."""
    maps = model.features(x)
    stages = [tokens.reshape(tokens.shape[0], -1, tokens.shape[-1]) for tokens in maps]
    if not hasattr(model, "layers"):
        return stages
    return [
        tokens if stage.downsample is None else stage.downsample(tokens, of_map.shape[1:3])
        for tokens, of_map, stage in zip(stages, maps, model.layers, strict=True)
    ]
