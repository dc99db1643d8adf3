"""The tensors of a weights file by official name, to find out which model they are of."""

import math
import re

from polaformer_jax.errors import WeightsError
from polaformer_jax.weights import rules
from polaformer_jax.weights.files import WeightsFile

Shape = tuple[int, ...]

_DEEPEST = 200  # blocks a stage; the largest official model has 27


class Names:
    """Shapes by official name, for either layout, with errors that say what was looked for."""

    def __init__(self, file: WeightsFile):
        self.path = file.path
        self.shapes: dict[str, Shape] = {name: array.shape for name, array in file.tensors.items()}
        if file.layout == "ours":
            self.shapes = {
                rules.official_name(name, len(shape)): rules.official_shape(name, shape)
                for name, shape in self.shapes.items()
            }

    def shape(self, name: str, axes: int) -> Shape:
        found = self.shapes.get(name)
        if found is None or len(found) != axes or not math.prod(found):
            raise WeightsError(
                f"{self.path} holds no complete model: {name} is {found or 'missing'}, expected {axes} axes"
            )
        return found

    def side(self, name: str, axis: int) -> int:
        """The side of a square position table whose rows are along `axis`."""
        shape = self.shape(name, axis + 2)
        side = math.isqrt(shape[axis])
        if side**2 != shape[axis]:
            raise WeightsError(f"{self.path}: {name} has {shape[axis]} rows, expected a square number")
        return side

    def count(self, pattern: str, stage: str) -> int:
        """How many blocks a stage has: they are numbered from 0, without a gap."""
        found = {int(match[1]) for name in self.shapes if (match := re.match(pattern, name)) and len(match[1]) < 9}
        if not found or found != set(range(len(found))) or len(found) > _DEEPEST:
            numbers = f"{len(found)} blocks, the last being number {max(found)}" if found else "no block"
            raise WeightsError(
                f"{self.path} holds no complete model: {stage} has {numbers}; expected numbers from 0 without a gap, "
                f"and at most {_DEEPEST} blocks"
            )
        return len(found)

    def classes(self) -> int:
        if "head.weight" not in self.shapes:
            return 0
        axes = 4 if len(self.shapes["head.weight"]) == 4 else 2  # PolaFormer++ has a 1x1 convolution
        return self.shape("head.weight", axes)[0]

    def kernel_size(self) -> int:
        return next((shape[-1] for name, shape in self.shapes.items() if name.endswith("attn.dwc.weight") and shape), 5)
