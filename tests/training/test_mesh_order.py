"""Meshes of several hosts and slices, and batches whose order does not depend on them."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from polaformer_jax.errors import UserError
from polaformer_jax.training import loop, sharding
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.metrics import read_scalars
from tests.support.device_order import permuted
from tests.training.test_sharding import config_of


@dataclasses.dataclass(frozen=True)
class Device:
    """What JAX's arrangement of devices looks at; this one knows no slices."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


@dataclasses.dataclass(frozen=True)
class SliceDevice(Device):
    slice_index: int = 0
    coords: tuple[int, int, int] | None = None
    core_on_chip: int = 0


def gpus(hosts, each=8):
    """Those of one host share a slice, as NVLink does not leave it."""
    kind = "NVIDIA H100 80GB HBM3"
    return [SliceDevice(n, n // each, "gpu", kind, slice_index=n // each) for n in range(hosts * each)]


def tpus(kind, sides, *, host=(2, 2, 1), slices=1):
    """A torus of chips, and hosts of a few neighbours each."""
    found = []
    for number in range(slices):
        for z, y, x in np.ndindex(*reversed(sides)):
            corner = tuple(at // side for at, side in zip((x, y, z), host, strict=True))
            process = int(np.ravel_multi_index(corner, [s // h for s, h in zip(sides, host, strict=True)]))
            hosts = np.prod(sides) // np.prod(host)
            found.append(SliceDevice(len(found), number * hosts + process, "tpu", kind, number, (x, y, z)))
    return found


V4, V5E, V5P = "TPU v4", "TPU v5 lite", "TPU v5"


@pytest.mark.parametrize(
    "devices, fsdp",
    [
        (gpus(1), 8),
        (gpus(2), 1),
        (gpus(2), 8),
        (gpus(4), 4),
        ([Device(n, n // 2) for n in range(8)], 2),
        (tpus(V5E, (4, 4, 1)), 4),
        (tpus(V5E, (16, 16, 1)), 8),
        (tpus(V4, (4, 4, 4)), 1),
        (tpus(V4, (4, 4, 4)), 2),
        (tpus(V4, (4, 4, 4)), 16),
        (tpus(V5E, (4, 4, 1), slices=2), 16),
        (tpus(V5P, (2, 2, 4), slices=4), 4),
    ],
    ids=lambda value: value if isinstance(value, int) else f"{len(value)} {value[0].device_kind}",
)
def test_rows_of_fsdp_stay_inside_a_slice(devices, fsdp):
    shuffled = [devices[n] for n in np.random.default_rng(0).permutation(len(devices))]
    found = sharding.arranged(shuffled if devices[0].platform == "tpu" else devices, len(devices) // fsdp, fsdp)
    assert found.shape == (len(devices) // fsdp, fsdp)
    assert sorted(device.id for device in found.flat) == list(range(len(devices)))
    slices = np.vectorize(lambda device: getattr(device, "slice_index", device.process_index))(found)
    assert (slices == slices[:, :1]).all()
    assert (np.diff(slices[:, 0]) >= 0).all()


TOPOLOGIES = """
import json
import warnings

warnings.simplefilter("ignore")
from jax.experimental import topologies

from polaformer_jax.aot.topologies import topology_devices
from polaformer_jax.training.sharding import arranged

found = []
for name, fsdp in (("v5e:4x4", 1), ("v5e:4x4", 4), ("v5e:16x16", 8), ("v4:4x4x4", 2)):
    found.append((topology_devices(name), fsdp))
found.append((topologies.get_topology_desc("v5e:4x4", "tpu", num_slices=2).devices, 16))
for devices, fsdp in found:
    mesh = arranged(devices, len(devices) // fsdp, fsdp)
    print(json.dumps([[[getattr(d, "slice_index", 0), d.process_index, *d.coords] for d in row] for row in mesh]))
"""


@pytest.mark.slow
def test_topologies_of_the_tpu_compiler_are_arranged():
    pytest.importorskip("libtpu")
    done = subprocess.run([sys.executable, "-c", TOPOLOGIES], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    meshes = [np.array(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[[[")]
    assert [mesh.shape[:2] for mesh in meshes] == [(16, 1), (4, 4), (32, 8), (32, 2), (2, 16)]
    for mesh in meshes:
        assert len({tuple(place) for place in mesh[..., [0, 2, 3, 4]].reshape(-1, 4)}) == mesh[..., 0].size
        assert (mesh[..., 0] == mesh[:, :1, 0]).all()
    assert meshes[0][:8, 0, 1].tolist() == [0, 0, 1, 1, 1, 1, 0, 2]  # by links, not process by process


def test_rows_that_are_larger_than_a_slice_take_whole_ones():
    found = sharding.arranged(gpus(4, each=2), 2, 4)
    assert [[device.slice_index for device in row] for row in found] == [[0, 0, 1, 1], [2, 2, 3, 3]]


def test_some_of_the_devices_are_as_many_of_each_process():
    chosen = sharding._of_all_processes(gpus(2), 4)
    assert [(device.process_index, device.id) for device in chosen] == [(0, 0), (0, 1), (1, 8), (1, 9)]
    with pytest.raises(UserError, match="is 3, of 16 devices in 2 processes: .* or a multiple of 2"):
        sharding._of_all_processes(gpus(2), 3)


# --- batches


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_every_row_belongs_to_one_process_and_lies_on_its_devices(seed, processes):
    devices = np.array(jax.devices())
    mesh = Mesh(permuted(seed)(devices, 4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rows = [sharding.local_rows(mesh, 32, list(own)) for own in devices.reshape(processes, -1)]
    assert sorted(np.concatenate(rows)) == list(range(32)) and {len(own) for own in rows} == {32 // processes}
    batch = sharding.to_devices({"row": np.arange(32)}, mesh)["row"]
    for own, expected in zip(devices.reshape(processes, -1), rows, strict=True):
        held = [np.asarray(shard.data) for shard in batch.addressable_shards if shard.device in own]
        np.testing.assert_array_equal(np.sort(np.concatenate(held)), expected)


def trained(digits_dir, workdir, **changes):
    """A run with mixing and a last batch that is padded: its losses, the evaluation, and the final parameters."""
    config = config_of(digits_dir, **{"model.name": "dense", "model.kernel_size": None, "train.steps": 6, **changes})
    result = loop.train(config, workdir)
    scalars = read_scalars(workdir)
    return scalars["loss"][1], result.evaluation


@pytest.fixture(scope="module")
def on_one_device(digits_dir, tmp_path_factory):
    return trained(digits_dir, tmp_path_factory.mktemp("one"), data=1, fsdp=1)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_run_on_any_order_of_devices_is_that_of_one(seed, on_one_device, digits_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "arranged", permuted(seed))
    monkeypatch.setattr(sharding, "LEAST_SPLIT", 64)
    losses, evaluation = trained(digits_dir, tmp_path / "any", data=4, fsdp=2)
    wanted, alone = on_one_device
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert (evaluation.counted, evaluation.skipped) == (alone.counted, alone.skipped) == (360, 0)
    for name in ("label", "prediction", "mask"):
        np.testing.assert_array_equal(evaluation.outputs[name], alone.outputs[name])
    np.testing.assert_allclose(evaluation.outputs["probability"], alone.outputs["probability"], rtol=1e-4)
    source = Experiment(config_of(digits_dir)).inputs.source("test")
    assert evaluation.outputs["label"].tolist() == [source[n]["label"] for n in range(360)]
    if seed == 1:  # and bit for bit that of the order that JAX would have taken
        monkeypatch.undo()
        monkeypatch.setattr(sharding, "LEAST_SPLIT", 64)
        usual, ordered = trained(digits_dir, tmp_path / "usual", data=4, fsdp=2)
        np.testing.assert_array_equal(losses, usual)
        np.testing.assert_array_equal(evaluation.outputs["probability"], ordered.outputs["probability"])
