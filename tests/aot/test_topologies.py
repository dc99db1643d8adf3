"""Names of devices that are not present, what they need, and what the compiler is told of them."""

import importlib.metadata
import importlib.util
import types

import jax
import pytest

from polaformer_jax.aot import gpu_targets, topologies
from polaformer_jax.aot.topologies import compiler_options, no_default, topology_devices
from polaformer_jax.errors import UserError
from polaformer_jax.hardware.chips import chip_of


@pytest.mark.parametrize(
    "topology, message",
    [
        ("v5e", "expected a TPU topology, such as v5e:2x4"),
        ("v5e:2by4", "expected a TPU topology"),
        ("cpu:0", "expected a TPU topology"),
        ("cpu:9", "this process has 8 CPU devices already"),
        ("h100:0", "h100 or h100:8"),
        ("h100:", "h100 or h100:8"),
        ("h100:2x4", "h100 or h100:8"),
        ("a100", "h100 or h100:8"),
    ],
)
def test_topologies_that_cannot_be(topology, message):
    with pytest.raises(UserError, match=message):
        topology_devices(topology)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the TPU compiler, libtpu .but no TPU.: .*polaformer_jax\[tpu\]"):
        topology_devices("v5e:2x4")


def installed(monkeypatch, **versions):
    """Only these distributions are installed."""
    found = [
        types.SimpleNamespace(metadata={"Name": name.replace("_", "-")}, version=version)
        for name, version in versions.items()
    ]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)


@pytest.mark.parametrize("found", [{}, {"jax_cuda12_plugin": jax.__version__}, {"jax_cuda12_pjrt": jax.__version__}])
def test_without_the_plugin_for_cuda(found, monkeypatch):
    installed(monkeypatch, jax=jax.__version__, **found)
    with pytest.raises(UserError, match=f"no GPU and no driver.*jax-cuda12-plugin=={jax.__version__}"):
        topology_devices("h100")


def test_a_plugin_of_another_version_of_jax(monkeypatch):
    installed(monkeypatch, jax_cuda13_plugin=jax.__version__, jax_cuda13_pjrt="0.1.2")
    with pytest.raises(UserError, match=f"h100:8: jax-cuda13-pjrt 0.1.2 does not fit jax {jax.__version__}"):
        topology_devices("h100:8")


@pytest.mark.parametrize("topology, count", [("h100", 1), ("h100:8", 8)])
def test_a_gpu_is_described_to_the_compiler(topology, count, monkeypatch):
    from jax.experimental import topologies as of_jax

    asked = {}

    def described(*arguments, **options):
        asked.update(options, arguments=arguments)
        return types.SimpleNamespace(devices=["a GPU"] * count)

    installed(monkeypatch, jax_cuda12_plugin=jax.__version__, jax_cuda12_pjrt=jax.__version__)
    monkeypatch.setattr(of_jax, "get_topology_desc", described)
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # which it sets
    assert len(topology_devices(topology)) == count
    assert asked["arguments"] == ("h100", "cuda") and asked["topology"] == f"1x1x{count}"
    assert 'device_description_str: "NVIDIA H100 80GB HBM3"' in asked["target_config"]


def test_the_target_is_a_chip_whose_peaks_are_known():
    for target in gpu_targets.TARGETS.values():
        text = gpu_targets.description(target)
        assert chip_of(target.chip.kind) == target.chip
        assert f"memory_bandwidth: {target.chip.memory_bandwidth:.0f}\n" in text
        assert text.count("{") == text.count("}") and "cuda_compute_capability { major: 9 minor: 0 }" in text


def test_products_on_a_gpu_that_is_not_there_are_not_timed():
    gpu, tpu = ([types.SimpleNamespace(platform=platform)] for platform in ("gpu", "tpu"))
    assert compiler_options(tpu) == ({},)
    first, second = compiler_options(gpu)
    assert first == {"xla_gpu_autotune_level": 0}
    assert second == {**first, "xla_gpu_enable_triton_gemm": False}


def test_the_error_of_products_without_a_default_is_known():
    said = "INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot.95 = bf16[12544,384]{1,0} dot(...)"
    assert no_default(RuntimeError(said)) and not no_default(RuntimeError("INTERNAL: something else"))


def test_plugins_are_found_by_name(monkeypatch):
    installed(monkeypatch, jax_cuda12_plugin="1", jax_cuda12_pjrt="2", jax="3")
    assert topologies._cuda_plugins() == {"jax-cuda12-plugin": "1", "jax-cuda12-pjrt": "2"}
