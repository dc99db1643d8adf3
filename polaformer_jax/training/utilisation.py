"""How much of the devices a training uses: of their arithmetic and of their memory."""

from collections.abc import Mapping
from typing import Any

from polaformer_jax.hardware.chips import chip_of
from polaformer_jax.training.compiled import shapes
from polaformer_jax.training.experiment import Experiment

GIB = 2**30


class Utilisation:
    """Counts the operations of the steps since the last report.

    The model FLOPs utilisation (Chowdhery et al., "PaLM", 2022, appendix B) is the share that the model's matrix
    products and convolutions, without recomputation, have of what the devices could do in that time at their published
    peak for bfloat16, whatever `model.dtype` is. Devices without a published peak have none.
    """

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        self._devices = experiment.mesh.size
        self._chip = chip_of(experiment.mesh.devices.flat[0].device_kind)
        self._of_shapes: dict[tuple, float] = {}
        self._done = 0.0

    def step(self, batch: Mapping[str, Any]) -> None:
        """Counts a step on this batch."""
        if self._chip is None:
            return
        key = shapes(batch)
        if key not in self._of_shapes:
            self._of_shapes[key] = self._experiment.step_flops(batch)
        self._done += self._of_shapes[key]

    def close(self, seconds: float) -> dict[str, float]:
        """Metrics of the steps since the last call, which took so many seconds; those that can be known."""
        metrics = {}
        if self._chip is not None:
            metrics["mfu"] = self._done / (seconds * self._devices * self._chip.flops)
        self._done = 0.0
        return metrics | self._memory()

    def _memory(self) -> dict[str, float]:
        """Of the fullest device of this process: the most that it ever held, alone and as a share of its limit."""
        stats = [device.memory_stats() for device in self._experiment.mesh.local_devices]
        if not all(stats):  # CPUs keep no account
            return {}
        peak, limit = max((each["peak_bytes_in_use"], each["bytes_limit"]) for each in stats)
        return {"device_memory_gib": peak / GIB, "device_memory_share": peak / limit}
