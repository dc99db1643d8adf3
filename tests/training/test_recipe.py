"""What the recipe adds to the step: mixing, accumulation, the average, frozen or slower layers, rematerialisation."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals

from polaformer_jax.config import defaults
from polaformer_jax.training import sharding
from polaformer_jax.training.optimizer import head_only, layer_depths, make_optimizer
from polaformer_jax.training.state import TrainState
from polaformer_jax.training.step import make_train_step
from tests.support import dense_model, small_models
from tests.support.quick import QUICK
from tests.support.recipes import image_task

PLAIN = image_task(5, label_smoothing=0.1)
FULL = image_task(5, label_smoothing=0.1, erase_prob=0.25, mixup=0.8, cutmix=1.0)
SGD = optax.sgd(0.1)


@pytest.fixture(scope="module")
def model():
    return small_models.split(dense_model.Dense(num_classes=5, drop_path_rate=0.0, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def deep_model():
    return small_models.split(small_models.build("pvt", kernel_size=1))


def batch_of(seed=0, size=16):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(256, size=(size, 32, 32, 3), dtype=np.uint8),
        "label": rng.integers(5, size=size, dtype=np.int32),
        "mask": np.arange(size) != 2,
    }


def step_of(model, task=FULL, optimizer=SGD, **options):
    step = make_train_step(model[0], task, optimizer, rate=lambda step: jnp.asarray(0.1), seed=0, **options)
    return jax.jit(step, compiler_options=QUICK)


def state_of(model, optimizer=SGD, ema=None):
    return TrainState(jnp.zeros((), jnp.int32), model[1], optimizer.init(model[1]), ema)


def assert_close(one, other, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), one, other)


@pytest.fixture(scope="module")
def whole(model):
    """One full step on the whole batch at once."""
    return step_of(model)(state_of(model), batch_of())


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 8])
def test_accumulated_parts_give_the_update_of_the_whole_batch(model, whole, parts):
    """Mixup partners, erasing and the mask included; the model here has no dropout."""
    state, sums = step_of(model, accumulate=parts)(state_of(model), batch_of())
    assert_close(state.params, whole[0].params)
    for name in ("loss", "accuracy", "grad_norm", "skipped"):
        np.testing.assert_allclose(sums[name], whole[1][name], rtol=2e-5)


@pytest.mark.slow
def test_any_number_of_devices_gives_the_same_recipe(model, whole):
    mesh = sharding.make_mesh(ml_collections.ConfigDict({"data": 8, "fsdp": 1}))
    state = jax.device_put(state_of(model), sharding.replicated(mesh))
    spread, sums = step_of(model, accumulate=2)(state, sharding.to_devices(batch_of(), mesh))
    assert_close(jax.device_get(spread.params), jax.device_get(whole[0].params))
    np.testing.assert_allclose(sums["loss"], whole[1]["loss"], rtol=2e-5)


def test_the_recipe_changes_the_loss_and_nothing_carries_over(model, whole):
    _, plain = step_of(model, PLAIN)(state_of(model), batch_of())
    assert abs(float(plain["loss"][0] - whole[1]["loss"][0])) > 1e-3
    assert plain["loss"][1] == whole[1]["loss"][1] == 15


def test_the_moving_average(model):
    zeros = jax.tree.map(jnp.zeros_like, model[1])
    step = step_of(model, PLAIN, ema_decay=0.75)
    first, _ = step(state_of(model, ema=zeros), batch_of())
    assert_close(first.ema, jax.tree.map(lambda p: 0.25 * p, first.params))
    second, _ = step(first, batch_of(1))
    assert_close(second.ema, jax.tree.map(lambda p, q: 0.1875 * p + 0.25 * q, first.params, second.params))


def test_the_moving_average_is_never_spoilt(model):
    params = jax.tree.map(jnp.copy, model[1])
    params["head"]["bias"] = params["head"]["bias"].at[0].set(jnp.inf)
    after, _ = step_of(model, PLAIN, ema_decay=0.75)(state_of((model[0], params), ema=model[1]), batch_of())
    jax.tree.map(np.testing.assert_array_equal, after.ema, model[1])


def test_without_an_average_there_is_none(whole):
    assert whole[0].ema is None


def test_a_frozen_backbone_stays_as_it_is(model):
    config = defaults().optimizer
    config.clip_norm = 1.0
    trainable = head_only(model[1])
    optimizer = make_optimizer(config, lambda step: jnp.asarray(0.1), trainable=trainable)
    state = state_of(model, optimizer)
    after, sums = step_of(model, PLAIN, optimizer, trainable=trainable)(state, batch_of())
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.params, model[1])
    assert moved == trainable and any(jax.tree.leaves(trainable))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(model[1]["head"]))
    assert float(sums["grad_norm"][0]) > 0


@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_layers_are_counted_from_below(family):
    model = small_models.abstract(family)
    depths = layer_depths(nnx.to_pure_dict(nnx.state(model)))

    def of(tree):
        (depth,) = set(jax.tree.leaves(tree))
        return depth

    if family == "pvt":  # one block a stage
        assert [of(depths[f"block{i}"][0]) for i in (1, 2, 3, 4)] == [1, 2, 3, 4]
        assert [of(depths[f"patch_embed{i}"]) for i in (1, 2, 3, 4)] == [0, 1, 2, 3]
        assert [depths[f"pos_embed{i}"] for i in (1, 2, 3, 4)] == [0, 1, 2, 3]
        assert of(depths["head"]) == 5
    else:  # 2, 2, 1 and 1 blocks
        found = [of(block) for stage in depths["layers"].values() for block in stage["blocks"].values()]
        assert found == [1, 2, 3, 4, 5, 6]
        assert [of(depths["layers"][i]["downsample"]) for i in (0, 1, 2)] == [2, 4, 5]
        assert of(depths["patch_embed"]) == depths["absolute_pos_embed"] == 0
        assert of(depths["norm"]) == of(depths["head"]) == 7


@pytest.mark.slow
def test_lower_layers_learn_more_slowly(deep_model):
    config = defaults().optimizer
    config.layer_decay = 0.5
    decayed = make_optimizer(config, lambda step: jnp.asarray(0.1))
    config.layer_decay = None
    plain = make_optimizer(config, lambda step: jnp.asarray(0.1))
    grads = jax.tree.map(lambda p: jnp.sin(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), deep_model[1])
    first_update = jax.jit(lambda o: o.update(grads, o.init(deep_model[1]), deep_model[1])[0], static_argnums=0)
    slow, fast = first_update(decayed), first_update(plain)
    depths = layer_depths(deep_model[1])
    assert_close(slow, jax.tree.map(lambda u, depth: u * 0.5 ** (5 - depth), fast, depths))


@pytest.mark.slow
@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_rematerialisation_changes_no_gradient(family, capsys):
    model = small_models.build(family, kernel_size=1, drop_rate=0.1, drop_path_rate=0.2)
    graphdef, params = small_models.split(model)
    model.remat = True
    remat, _ = small_models.split(model)
    images = small_models.noise(2, 32, 32, 3)

    def loss(graphdef):
        def of(params):
            logits = nnx.merge(graphdef, params)(images, train=True, rngs=nnx.Rngs(dropout=jax.random.key(0)))
            return jnp.sum(jnp.square(logits))

        return of

    one, other = (jax.jit(jax.value_and_grad(loss(g)), compiler_options=QUICK)(params) for g in (graphdef, remat))
    assert_close(one, other, rtol=1e-4, atol=1e-5)
    kept = []
    for g in (graphdef, remat):
        print_saved_residuals(loss(g), params)
        kept.append(len([line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]))
    assert kept[1] < kept[0] / 2
