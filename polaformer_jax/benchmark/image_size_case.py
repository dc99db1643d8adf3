"""What `benchmark image-size` measures: a segmenter at one size of images; and what it finds."""

from collections.abc import Sequence
from typing import NamedTuple

from polaformer_jax.benchmark.programs import GIB
from polaformer_jax.benchmark.timing import Timing
from polaformer_jax.files import tables
from polaformer_jax.models import registry
from polaformer_jax.models.segmenter import SegmenterConfig

# Fields of the backbone. Without a spatial reduction softmax attention sees all tokens, as polarity attention does;
# 8, 4, 2, 1 are the reductions of keys and values in the stages of PVT (Wang et al., ICCV 2021).
ATTENTIONS: dict[str, dict[str, object]] = {
    "polarity": {"attn_type": "LLLL", "la_sr_ratios": "1111"},
    "softmax": {"attn_type": "SSSS", "sr_ratios": (1, 1, 1, 1)},
    "softmax_reduced": {"attn_type": "SSSS", "sr_ratios": (8, 4, 2, 1)},
}
MODES = ("forward", "gradient")
CELLS = ("ms", "(least - greatest)", "GiB", "peak")  # the head of `Row.cells`


class Case(NamedTuple):
    """A segmenter, and what is computed of one image.

    Attributes:
        model: name of the backbone, a Pola-PVT.
        head: that of `SegmenterConfig`.
        dtype: of the computation; parameters are float32.
        img_size: pixels, square; also those for which the model is made, so that no table is interpolated.
        mode: one of `MODES`.
        attention: one of `ATTENTIONS`, in all blocks.
    """

    model: str
    head: str
    dtype: str
    img_size: int
    mode: str
    attention: str

    def __str__(self) -> str:
        return f"{self.model} {self.img_size:,} x {self.img_size:,}, {self.attention}, {self.mode}"

    @property
    def tokens(self) -> int:
        """Tokens in the first stage."""
        return (self.img_size // 4) ** 2

    def config(self) -> SegmenterConfig:
        """Raises a UserError if there is no such model."""
        fields = ATTENTIONS[self.attention]
        return registry.segmenter_config(self.model, head=self.head, img_size=self.img_size, **fields)


class Program(NamedTuple):
    """What is known of a case without running it.

    Attributes:
        memory: bytes that it needs while it runs, as reported by the compiler; None if it refused to compile it.
        limit: bytes that it may need.
        seconds: of tracing and compiling; None as for the memory.
        flops: operations of its matrix products and convolutions; None as for the memory.
        device: what JAX calls it.
        jax: version.
    """

    memory: int | None
    limit: float
    seconds: float | None
    flops: float | None
    device: str
    jax: str

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory <= self.limit


class Row(NamedTuple):
    """A measured case.

    Attributes:
        timing: seconds per call; None if it was not run, since it needs too much memory.
        peak: the least of the most bytes that each of its processes held; None if it was not run or is not known.
        peak_by: whose they are, "device", or "process" with its interpreter and libraries.
    """

    case: Case
    program: Program
    timing: Timing | None
    peak: int | None
    peak_by: str | None

    def record(self) -> dict[str, object]:
        """Columns of a CSV file; None for what was not measured."""
        case, program, timing = self.case, self.program, self.timing
        return {
            "attention": case.attention,
            "mode": case.mode,
            "img_size": case.img_size,
            "tokens": case.tokens,
            "ms": timing and f"{1e3 * timing.median:.4f}",
            "ms_least": timing and f"{1e3 * timing.least:.4f}",
            "ms_greatest": timing and f"{1e3 * timing.greatest:.4f}",
            "calls": timing and timing.calls,
            "compile_s": program.seconds and f"{program.seconds:.2f}",
            "compiler_memory_gib": program.memory and f"{program.memory / GIB:.4f}",
            "peak_gib": self.peak and f"{self.peak / GIB:.4f}",
            "peak_by": self.peak_by,
            "limit_gib": f"{program.limit / GIB:.4f}",
            "gflops": program.flops and f"{program.flops / 1e9:.5g}",
            "model": case.model,
            "head": case.head,
            "batch": 1,
            "dtype": case.dtype,
            "device": program.device,
            "jax": program.jax,
        }

    def cells(self) -> tuple[str, ...]:
        """Milliseconds, their range, memory and peak in GiB, for people; dashes for what was not measured."""
        timing = self.timing
        return (
            tables.number(timing and 1e3 * timing.median, ",.1f"),
            f"({1e3 * timing.least:,.1f} - {1e3 * timing.greatest:,.1f})" if timing else "",
            tables.number(self.program.memory and self.program.memory / GIB, ",.2f"),
            tables.number(self.peak and self.peak / GIB, ".2f"),
        )


def measured(rows: Sequence[Row], mode: str, attention: str) -> list[Row]:
    """The rows of this mode and attention, the smallest image first."""
    found = [row for row in rows if (row.case.mode, row.case.attention) == (mode, attention)]
    return sorted(found, key=lambda row: row.case.img_size)
