"""Any mesh gives the same training; state is created, kept and read sharded; devices send each other what they must."""

import gc
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import polaformer_jax as pf
from polaformer_jax import weights
from polaformer_jax.aot.collectives import collectives
from polaformer_jax.errors import UserError
from polaformer_jax.training import evaluation, loop, runtime, sharding
from polaformer_jax.training.checkpoints import Checkpoints
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.programs import ProgramCache
from polaformer_jax.training.state import TrainState
from polaformer_jax.training.step import make_train_step
from tests.support import small_models
from tests.support.quick import QUICK
from tests.support.recipes import digits as get_config
from tests.support.recipes import image_task

pytestmark = pytest.mark.usefixtures("shallow")


def mesh_of(data, fsdp):
    return sharding.make_mesh(ml_collections.ConfigDict({"data": data, "fsdp": fsdp}))


def slow(*meshes):
    return [pytest.param(*mesh, marks=pytest.mark.slow) for mesh in meshes]


def config_of(digits_dir="data", data=2, fsdp=4, **changes):
    """Two steps of a batch of 16."""
    config = get_config()
    config.data.data_dir = str(digits_dir)
    config.data.workers = 0
    config.model.kernel_size = 1  # compiles in half the time
    config.augment.mixup = 0.8
    config.ema.decay = 0.9
    config.train.epochs = None
    config.train.steps = 2
    config.train.batch_size = 16
    config.schedule.warmup = 1.0
    config.eval.batch_size = 96
    config.log.pictures = False
    config.mesh.data, config.mesh.fsdp = data, fsdp
    config.update_from_flattened_dict(changes)
    return config


# --- the rule


@pytest.mark.parametrize(
    "shape, spec",
    [
        ((256, 512), PartitionSpec(None, "fsdp")),
        ((512, 256), PartitionSpec("fsdp")),
        ((256, 256), PartitionSpec("fsdp")),  # the first of equals
        ((1000, 258), PartitionSpec("fsdp")),
        ((1001, 256), PartitionSpec(None, "fsdp")),  # the largest of those that 4 divides
        ((1001, 257), PartitionSpec()),
        ((127, 128), PartitionSpec()),  # small
        ((128, 128), PartitionSpec("fsdp")),
        ((), PartitionSpec()),
    ],
)
def test_the_rule(shape, spec):
    mesh = mesh_of(2, 4)
    assert sharding.state_sharding(shape, mesh).is_equivalent_to(jax.NamedSharding(mesh, spec), len(shape))


def test_without_fsdp_every_device_has_everything():
    assert sharding.state_sharding((512, 512), mesh_of(8, 1)).spec == PartitionSpec()


@pytest.mark.parametrize(
    "data, fsdp, shape", [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (1, 8, (1, 8)), (3, 2, (3, 2)), (1, 1, (1, 1))]
)
def test_meshes(data, fsdp, shape):
    mesh = mesh_of(data, fsdp)
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == shape


@pytest.mark.parametrize(
    "data, fsdp, message",
    [
        (9, 1, "mesh.data=9, mesh.fsdp=1, but there are 8 devices: give mesh.data 1 to 8"),
        (5, 2, "mesh.data=5, mesh.fsdp=2, but there are 8 devices: give mesh.data 1 to 4"),
        (0, 1, "mesh.data=0"),
        (-1, 3, "mesh.fsdp=3 does not divide the 8 devices: set mesh.data"),
        (-1, 16, "mesh.fsdp=16, but there are 8 devices: give 1 to 8"),
        (-1, 0, "mesh.fsdp=0"),
    ],
)
def test_meshes_that_cannot_be(data, fsdp, message):
    with pytest.raises(UserError, match=message):
        mesh_of(data, fsdp)


def test_a_batch_is_checked_against_both_axes():
    with pytest.raises(UserError, match="train.batch_size=12 cannot be split evenly over 8 devices: take 8 or 16"):
        sharding.check_batch(12, mesh_of(2, 4), "train.batch_size")
    sharding.check_batch(12, mesh_of(2, 2), "train.batch_size")


# --- the same training

FULL = image_task(5, label_smoothing=0.1, erase_prob=0.25, mixup=0.8, cutmix=1.0)
OPTIMIZER = optax.adamw(1e-3)


@pytest.fixture(scope="module")
def model():
    return small_models.split(small_models.build("pvt", kernel_size=1, drop_path_rate=0.2))


@pytest.fixture
def split_everything(monkeypatch):
    """Also what is small, as everything is in a small model."""
    monkeypatch.setattr(sharding, "LEAST_SPLIT", 64)


def losses(model, data, fsdp, steps=20, **options):
    """Of the full recipe, with stochastic depth; `options` are those of the step."""
    graphdef, params = model
    mesh = mesh_of(data, fsdp)
    state = TrainState(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params), params)
    state = jax.tree.map(lambda x: sharding.place(np.asarray(x), sharding.state_sharding(x.shape, mesh)), state)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    split = sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(placed))
    assert split > 100 if fsdp > 1 else split == 0
    options |= {"rate": lambda step: jnp.asarray(1e-3), "seed": 0, "ema_decay": 0.9, "mesh": mesh}
    step = make_train_step(graphdef, FULL, OPTIMIZER, **options)
    step = jax.jit(step, out_shardings=(placed, sharding.replicated(mesh)), compiler_options=QUICK)
    found = []
    for number in range(steps):
        rng = np.random.default_rng(number)
        batch = {
            "image": rng.integers(256, size=(16, 32, 32, 3), dtype=np.uint8),
            "label": rng.integers(5, size=16, dtype=np.int32),
            "mask": np.arange(16) != 2,
        }
        state, sums = step(state, sharding.to_devices(batch, mesh))
        found.append([float(sums["loss"][0]), float(sums["grad_norm"][0])])
    return np.array(found)


@pytest.fixture(scope="module")
def on_one_device(model):
    return losses(model, 1, 1)


@pytest.mark.slow  # of two dense layers: test_mesh_order.py
@pytest.mark.parametrize("data, fsdp", [(2, 4), (8, 1), (2, 1), (4, 1), (1, 2), (1, 4), (1, 8), (2, 2), (4, 2)])
def test_any_mesh_gives_the_same_training(model, on_one_device, split_everything, data, fsdp):
    np.testing.assert_allclose(losses(model, data, fsdp), on_one_device, rtol=3e-5)


# --- the state


@pytest.mark.parametrize("data, fsdp", [(2, 4), *slow((8, 1), (1, 8), (1, 1))])
def test_initial_weights_are_those_of_create_model_on_any_mesh(data, fsdp):
    config = config_of(data=data, fsdp=fsdp, seed=3)
    found = Experiment(config, num_examples=1437).params.initial()
    expected = pf.create_model(
        config.model.name, num_classes=10, img_size=32, kernel_size=1, rngs=nnx.Rngs(config.seed)
    )
    jax.tree.map(np.testing.assert_array_equal, found, small_models.split(expected)[1])


def bytes_on(device):
    """Of all arrays. (Their shards are not looked at: that would make further arrays, of the same memory.)"""
    arrays = [array for array in jax.live_arrays() if device in array.sharding.device_set]
    return sum(math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize for array in arrays)


@pytest.mark.slow
def test_no_device_ever_holds_the_whole_state(monkeypatch):
    experiment = Experiment(config_of(data=1, fsdp=8), num_examples=1437)
    device, place, seen = jax.devices()[0], sharding.place, []
    gc.collect()
    before = bytes_on(device)

    def watched(array, where):
        placed = place(array, where)
        seen.append(bytes_on(device) - before)
        return placed

    monkeypatch.setattr(sharding, "place", watched)
    abstract = jax.tree.leaves(experiment.params.abstract)
    whole = 4 * sum(leaf.size for leaf in abstract)
    share = 4 * sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in abstract)
    assert share < 0.35 * whole  # many of its tensors are small
    params = experiment.params.initial()
    assert len(seen) == len(abstract)
    assert max(seen) < share + 0.1 * whole  # and one tensor as it is drawn
    del params
    state = experiment.states.initial()
    gc.collect()
    assert bytes_on(device) - before < 4.1 * share  # with moments and average
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(experiment.states.abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)


def test_weights_of_a_file_go_straight_to_their_shards(tmp_path):
    model = pf.create_model("pola_pvt_nano", num_classes=10, img_size=32, kernel_size=1, rngs=nnx.Rngs(1))
    pf.save_weights(model, tmp_path / "w.safetensors")
    config = config_of(**{"init.weights": str(tmp_path / "w.safetensors")})
    experiment = Experiment(config, num_examples=1437)
    params = experiment.params.initial()
    jax.tree.map(np.testing.assert_array_equal, params, small_models.split(model)[1])
    for leaf, expected in zip(jax.tree.leaves(params), jax.tree.leaves(experiment.params.abstract), strict=True):
        assert leaf.sharding == expected.sharding


# --- the compiled step


@pytest.fixture(scope="module")
def trained(digits_dir, tmp_path_factory):
    """A whole run with fsdp: its config, work directory and result, and the text of its compiled step."""
    workdir, texts = tmp_path_factory.mktemp("run"), []
    config, compile_it = config_of(digits_dir), ProgramCache.program

    def compiled(step, batch):
        program = compile_it(step, batch)
        if step.name == "training step":
            texts.append(program.as_text())
        return program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgramCache, "program", compiled)
        patch.setattr(runtime, "compiler_options", lambda config: QUICK)
        return config, workdir, loop.train(config, workdir), texts[0]


def check_program(experiment, text):
    found, fsdp = collectives(text), experiment.mesh.shape["fsdp"]
    params = jax.tree.leaves(experiment.params.abstract)
    split = [leaf for leaf in params if not leaf.sharding.is_fully_replicated]

    # Gradients, every one of them, are summed over all devices; beside them a few numbers.
    summed = [item for item in found if item.kind in ("all-reduce", "reduce-scatter")]
    size = sum(leaf.size * 4 for leaf in params)
    assert size <= sum(item.bytes for item in summed) < 1.01 * size
    assert max(item.group for item in summed) == experiment.mesh.size

    # Parameters that are split, and nothing else, are gathered, once each, from a row of the mesh; those of blocks that
    # are computed again in the backward pass are gathered there again.
    gathered = [item for item in found if item.kind == "all-gather"]
    expected = [leaf.shape for leaf in split]
    if experiment.config.model.remat:
        by_path = jax.tree.leaves_with_path(experiment.params.abstract)
        in_blocks = [leaf for path, leaf in by_path if "block" in jax.tree_util.keystr(path)]
        expected += [leaf.shape for leaf in in_blocks if not leaf.sharding.is_fully_replicated]
        assert len(expected) > len(split) or not split
    assert sorted(shape for item in gathered for _, shape in item.shapes) == sorted(expected)
    assert {item.group for item in gathered} == ({fsdp} if split else set())

    # Mixup's partners come from the device at the mirrored place: images, targets and mask.
    moved = [item for item in found if item.kind == "collective-permute"]
    share = experiment.config.train.batch_size // experiment.mesh.size
    assert sum(item.bytes for item in moved) == share * (32 * 32 * 3 * 4 + 10 * 4 + 1)
    assert len(summed) + len(gathered) + len(moved) == len(found)

    # All of the state is used again.
    state = jax.tree.leaves(experiment.states.abstract)
    assert text.splitlines()[0].count("-alias)") == len(state)


@pytest.mark.slow
def test_the_compiled_step_sends_parameters_and_gradients_and_no_activations(trained):
    config, *_, text = trained
    check_program(Experiment(config), text)
    assert any(item.kind == "all-gather" for item in collectives(text))


@pytest.mark.slow
@pytest.mark.parametrize("data, fsdp, remat", [(8, 1, False), (1, 8, False), (2, 4, True)])
def test_the_same_on_other_meshes_and_with_recomputation(data, fsdp, remat):
    experiment = Experiment(config_of(data=data, fsdp=fsdp, **{"model.remat": remat}), num_examples=1437)
    batch = experiment.abstract_batch(experiment.config.train.batch_size)
    check_program(experiment, experiment.train_step.trace(batch).lower().compile(QUICK).as_text())


# --- checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("data, fsdp", [(2, 2), (1, 1), (4, 1), (1, 4), (2, 1), (1, 2)])
def test_a_checkpoint_restores_on_any_mesh(trained, digits_dir, data, fsdp):
    config, workdir, *_ = trained
    states = []
    for mesh in ((config.mesh.data, config.mesh.fsdp), (data, fsdp)):
        abstract = Experiment(config_of(digits_dir, *mesh)).states.abstract
        with Checkpoints(workdir / "checkpoints", keep_last=1, best_metric="accuracy", read_only=True) as checkpoints:
            states.append(checkpoints.restore(abstract).state)
        for leaf, expected in zip(jax.tree.leaves(states[-1]), jax.tree.leaves(abstract), strict=True):
            assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
@pytest.mark.parametrize("data", [1, None])
def test_a_checkpoint_is_evaluated_on_one_device_and_on_all(trained, digits_dir, tmp_path, data):
    _, workdir, result, _ = trained
    config = None if data is None else config_of(digits_dir, data=data, fsdp=1)
    json_path, file = tmp_path / "e.json", tmp_path / "w.safetensors"
    written = evaluation.evaluate(config, workdir, json_path=json_path, weights_path=file)
    assert written["images"] == 360
    assert written["loss"] == pytest.approx(result.evaluation.metrics["loss"], rel=1e-5)
    with Checkpoints(workdir / "checkpoints", keep_last=1, best_metric="accuracy", read_only=True) as checkpoints:
        params, _ = checkpoints.restore_params(Experiment(config_of(digits_dir)).params.abstract)
    exported = weights.read_file(file).tensors
    for name, leaf in weights.flatten(params).items():
        np.testing.assert_array_equal(exported[name], leaf)
