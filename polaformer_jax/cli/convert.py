"""Converts official PyTorch checkpoints of PolaFormer to .safetensors, without PyTorch.

    polaformer convert pola_swin_t.pth                          # writes pola_swin_t.safetensors beside it
    polaformer convert pola_swin_t.pth weights/swin_t.safetensors
    polaformer convert *.pth --out-dir weights                  # or gs://...
    polaformer convert pola_swin_b.pth b_384.safetensors --model pola_swin_b_384 --img-size 384
    polaformer convert mine.safetensors for_torch.safetensors --layout torch     # the way back

The model that a file holds is recognised from its tensors. The written file names its model, so that
`pf.create_model(weights="pola_swin_t.safetensors")` needs nothing else.
"""

from collections.abc import Sequence

from polaformer_jax.cli import command


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("convert", __doc__)
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="IN [OUT], or several to convert: .pth or .safetensors"
    )
    parser.add_argument("--out", metavar="OUT", help="file to write, .safetensors; the same as a second FILE")
    parser.add_argument("--out-dir", metavar="DIR", help="folder for the converted files [beside each IN]")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--model", help="name of the model, where shapes leave it open or to check it")
    parser.add_argument("--alpha", type=float, help="alpha of the attention [that of the stored config, or 4]")
    parser.add_argument("--img-size", type=int, help="resize position tables for this image size")
    parser.add_argument("--num-classes", type=int, help="a new classifier for this many classes, of zeros")
    parser.add_argument("--ema", action="store_true", help="take the moving average (state_dict_ema) of a checkpoint")
    parser.add_argument("--layout", choices=("ours", "torch"), default="ours", help="of the written file [ours]")
    parser.add_argument("--compare", metavar="NPZ", help="images and logits that the converted model must reproduce")
    args = parser.parse_intermixed_args(argv)
    return command.run(lambda: _convert(args))


def _convert(args) -> int:
    from polaformer_jax.weights.conversion import convert_all, read_reference

    failed = convert_all(
        args.files,
        out=args.out,
        out_dir=args.out_dir,
        overwrite=args.overwrite,
        model=args.model,
        alpha=args.alpha,
        img_size=args.img_size,
        num_classes=args.num_classes,
        ema=args.ema,
        layout=args.layout,
        reference=None if args.compare is None else read_reference(args.compare),
    )
    return 2 if failed else 0
