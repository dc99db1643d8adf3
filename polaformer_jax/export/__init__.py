"""Models that leave Python: repositories on the Hugging Face Hub, and programs that run without this package."""

from polaformer_jax.export.onnx_program import onnx
from polaformer_jax.export.program import Program, program_of
from polaformer_jax.export.repository import push_to_hub
from polaformer_jax.export.stablehlo_file import LoadedProgram, load_stablehlo, stablehlo

__all__ = ["LoadedProgram", "Program", "load_stablehlo", "onnx", "program_of", "push_to_hub", "stablehlo"]
