"""AdamW, its decay mask and clipping do what the official trainer's do: ten steps of two models in float64."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from polaformer_jax.config import defaults
from polaformer_jax.training.optimizer import clip_by_global_norm, decay_mask, head_only, layer_depths, make_optimizer
from polaformer_jax.training.state import TrainState
from polaformer_jax.training.step import make_train_step
from polaformer_jax.weights import flatten, rules
from tests.support.golden_models import GOLDEN_FOLDER, SMALL, build_small, images
from tests.support.quick import QUICK

GOLDEN = json.loads((GOLDEN_FOLDER / "adamw_steps.json").read_text())


@dataclasses.dataclass(frozen=True)
class SoftTargets:
    """The task of the golden run: ready images, and a distribution over the classes for each."""

    def augment(self, batch, key):
        return {**batch, "inputs": batch["image"]}

    def losses(self, logits, batch):
        return optax.softmax_cross_entropy(logits, batch["target"])

    def metrics(self, logits, batch):
        return {}


def official(params):
    """Arrays under their official names."""
    return {rules.official_name(name, leaf.ndim): np.asarray(leaf) for name, leaf in flatten(params).items()}


def rate(step):
    return jnp.asarray(1e-3, jnp.result_type(float))


def golden_optimizer(golden):
    config = defaults().optimizer
    config.weight_decay = golden["weight_decay"]
    config.b1, config.b2 = golden["betas"]
    config.eps = golden["eps"]
    config.clip_norm = golden["clip_grad"]
    return make_optimizer(config, rate)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_llss", "pvt_llll"])
def test_ten_steps_of_the_official_trainer(name, x64):
    golden = GOLDEN[name]
    graphdef, params = build_small(name, jnp.float64, drop_path_rate=0.0)
    optimizer = golden_optimizer(golden)
    step = make_train_step(graphdef, SoftTargets(), optimizer, rate=rate, seed=0)
    step = jax.jit(step, compiler_options=QUICK)
    state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))
    batch = {
        "image": images(4, SMALL[name]["spec"]["img_size"], jnp.float64),
        "target": jnp.asarray(np.load(GOLDEN_FOLDER / f"small_{name}.npz")["targets"], jnp.float64),
        "mask": jnp.ones(4, bool),
    }
    losses, norms = [], []
    for _ in range(10):
        state, sums = step(state, batch)
        losses.append(float(sums["loss"][0] / sums["loss"][1]))
        norms.append(float(sums["grad_norm"][0]))

    assert losses == pytest.approx(golden["losses"], rel=1e-9)
    assert norms == pytest.approx(golden["grad_norms"], rel=1e-8)
    final = official(state.params)
    assert final.keys() == golden["final_param_norms"].keys() - set(SMALL[name]["unused"])
    for key, value in final.items():
        assert np.linalg.norm(value) == pytest.approx(golden["final_param_norms"][key], rel=1e-8, abs=1e-10), key


@pytest.mark.parametrize("name", GOLDEN)
def test_the_same_parameters_decay_as_in_the_official_trainer(name):
    _, params = build_small(name, jnp.float32)
    marked = jax.tree.map(lambda decays, p: np.full(p.shape, decays), decay_mask(params), params)
    undecayed = {key for key, value in official(marked).items() if not value.any()}
    assert undecayed == set(GOLDEN[name]["no_weight_decay"]) - set(SMALL[name]["unused"])


@pytest.mark.parametrize("scale, factor", [(0.5, 1.0), (1.0, 5.0 / (5.0 + 1e-6)), (10.0, 5.0 / (50.0 + 1e-6))])
def test_clipping(scale, factor, x64):
    gradients = {"a": jnp.array([3.0, 0.0]) * scale, "b": jnp.array(4.0) * scale}
    clipped, _ = clip_by_global_norm(5.0).update(gradients, optax.EmptyState())
    for name, value in clipped.items():
        np.testing.assert_allclose(value, gradients[name] * factor, rtol=1e-14)


def test_clipping_by_value_comes_before_the_norm():
    config = defaults().optimizer
    config.clip_value, config.clip_norm = 1.0, 5.0
    config.weight_decay = 0.0
    grads = {"w": jnp.asarray([3.0, -0.5, -20.0])}
    optimizer = make_optimizer(config, lambda step: jnp.asarray(1e-3))
    _, state = optimizer.update(grads, optimizer.init(grads), grads)
    first_moment = next(
        part.mu for part in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")
    )
    np.testing.assert_allclose(first_moment["w"], 0.1 * np.array([1.0, -0.5, -1.0]), rtol=1e-5)


SEGMENTER = {
    "backbone": {"layers": {0: {"blocks": {0: {"w": jnp.ones(2)}}}, 1: {"blocks": {0: {"w": jnp.ones(2)}}}}},
    "norms": {0: {"scale": jnp.ones(2)}},
    "decode_head": {"conv_seg": {"kernel": jnp.ones(2)}},
}


def test_heads_may_have_another_rate_than_the_backbone():
    config = defaults().optimizer
    config.head_factor, config.weight_decay = 10.0, 0.0
    optimizer = make_optimizer(config, rate)
    updates, _ = optimizer.update(SEGMENTER, optimizer.init(SEGMENTER), SEGMENTER)
    np.testing.assert_allclose(updates["decode_head"]["conv_seg"]["kernel"], -1e-2, rtol=1e-5)
    np.testing.assert_allclose(updates["norms"][0]["scale"], -1e-2, rtol=1e-5)
    np.testing.assert_allclose(updates["backbone"]["layers"][0]["blocks"][0]["w"], -1e-3, rtol=1e-5)


def test_layers_of_a_segmenters_backbone_are_counted_as_those_of_a_classifier():
    depths = layer_depths(SEGMENTER)
    assert [depths["backbone"]["layers"][i]["blocks"][0]["w"] for i in (0, 1)] == [1, 2]
    assert depths["norms"][0]["scale"] == depths["decode_head"]["conv_seg"]["kernel"] == 3
    heads = head_only(SEGMENTER)
    assert heads["norms"][0]["scale"] and not heads["backbone"]["layers"][1]["blocks"][0]["w"]
