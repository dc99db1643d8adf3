"""Writes a model to a file: its weights, or its program for other runtimes. The training may still be running.

    polaformer export --workdir runs/digits mine.safetensors --checkpoint best     # or latest, or a step
    polaformer export --workdir runs/digits average.safetensors --weights ema      # the moving average
    polaformer export --workdir runs/digits mine.stablehlo --preprocess            # for JAX, on CPUs, GPUs and TPUs
    polaformer export --source pola_swin_t.pth pola_swin_t.onnx                    # for ONNX Runtime
    polaformer export --source hf://user/name mine.safetensors

The suffix of OUT is the format: .safetensors (weights), .stablehlo or .onnx (programs). With --preprocess a program
takes pixels (uint8, already resized and cropped) and returns probabilities; otherwise images are normalised, and logits
come out. ONNX needs packages of an environment of its own: pip install "polaformer_jax[onnx]".
"""

import os
from collections.abc import Sequence

from polaformer_jax.cli import command, source
from polaformer_jax.errors import UserError

FORMATS = {"weights": ".safetensors", "stablehlo": ".stablehlo", "onnx": ".onnx"}
# Options and the formats that take them.
OPTIONS = {
    "layout": ("weights",),
    "preprocess": ("stablehlo", "onnx"),
    "batch_size": ("stablehlo",),
    "platforms": ("stablehlo",),
    "store_weights": ("stablehlo",),
    "dtype": ("stablehlo", "onnx"),
    "maps": ("onnx",),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("export", __doc__)
    parser.add_argument("out", metavar="OUT", help="file to write: .safetensors, .stablehlo or .onnx")
    source.add_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--format", choices=tuple(FORMATS), help="of OUT [that of its suffix]")
    parser.add_argument("--layout", choices=("ours", "torch"), help="of weights; torch: official names [ours]")
    parser.add_argument("--preprocess", action="store_true", default=None, help="pixels in, probabilities out")
    parser.add_argument("--batch-size", type=command.positive_integer, help="the only one the program takes [any]")
    parser.add_argument("--platforms", nargs="+", metavar="NAME", help="of cpu, cuda, rocm, tpu [cpu cuda tpu]")
    parser.add_argument(
        "--store-weights", choices=("inside", "beside"), help="in the program, or in OUT's name with .npz [inside]"
    )
    parser.add_argument("--dtype", metavar="TYPE", help="of activations and products [float32]")
    parser.add_argument("--maps", metavar="STAGE,BLOCK", help="also return the attention maps of this linear block")
    args = parser.parse_intermixed_args(argv)
    return command.run(lambda: _export(args), options={"out": "OUT", "path": "OUT"})


def _export(args) -> None:
    source.check(args)
    kind = _format(args)
    maps = _maps(args)
    import jax

    from polaformer_jax.files import paths
    from polaformer_jax.training import progress

    progress.set_up_logging()
    # Files only: a running training may hold the accelerator, and one host of a TPU pod would wait for the others.
    jax.config.update("jax_platforms", "cpu")
    written = [paths.given(args.out, "out")]
    if args.store_weights == "beside":
        from polaformer_jax.export.stablehlo_file import beside

        written.append(beside(written[0]))
    if not args.overwrite and (taken := [path for path in written if path.exists()]):
        raise UserError(f"{', '.join(map(os.fspath, taken))} exists: give another name, or --overwrite")
    if kind == "weights":
        _weights(args)
    else:
        _program(args, kind, maps)


def _weights(args) -> None:
    from polaformer_jax import save_weights
    from polaformer_jax.files import atomic
    from polaformer_jax.training import export

    layout = args.layout or "ours"
    if args.workdir is not None:
        step = export.export(args.workdir, args.out, checkpoint=args.checkpoint, kind=args.weights, layout=layout)
        print(f"{args.out}: the weights of step {step}")
    else:
        atomic.check_target(args.out, "weights", argument="out")
        save_weights(source.load(args), args.out, layout=layout)
        print(f"{args.out}: the weights of {args.source}")


def _program(args, kind: str, maps: tuple[int, int] | None) -> None:
    from polaformer_jax import export

    model = source.load(args)
    options = {"preprocess": bool(args.preprocess), **({"dtype": args.dtype} if args.dtype is not None else {})}
    if kind == "stablehlo":
        given = {"platforms": args.platforms, "batch_size": args.batch_size, "weights": args.store_weights}
        given = {name: value for name, value in given.items() if value is not None}
        export.stablehlo(model, args.out, **options, **given)
    else:
        export.onnx(model, args.out, maps=maps, **options)
    of = f"step {model.info.facts['step']}" if args.workdir is not None else args.source
    print(f"{args.out}: the program of {of}")


def _format(args) -> str:
    """The format to write, which the options must fit."""
    by_suffix = {suffix: name for name, suffix in FORMATS.items()}
    suffix = f".{args.out.rpartition('.')[2]}"
    found = args.format or by_suffix.get(suffix)
    if found is None or FORMATS[found] != suffix:
        expected = FORMATS[found] if found else ", ".join(by_suffix)
        raise UserError(f"{args.out!r}: expected a name that ends in {expected}", argument="out")
    for option, formats in OPTIONS.items():
        if getattr(args, option) is not None and found not in formats:
            flag = option.replace("_", "-")
            raise UserError(f"--{flag} is an option of the formats {', '.join(formats)}, and {args.out} is of {found}")
    return found


def _maps(args) -> tuple[int, int] | None:
    if args.maps is None:
        return None
    try:
        stage, block = (int(number) for number in args.maps.split(","))
    except ValueError:
        raise UserError(f"{args.maps!r}: expected STAGE,BLOCK, two integers", argument="maps") from None
    return stage, block
