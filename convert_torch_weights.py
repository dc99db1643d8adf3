"""Converts official PyTorch checkpoints of PolaFormer to .safetensors, without PyTorch.

    python convert_torch_weights.py pola_swin_t.pth                          # writes pola_swin_t.safetensors beside it
    python convert_torch_weights.py pola_swin_t.pth weights/swin_t.safetensors
    python convert_torch_weights.py *.pth --out-dir weights                  # or gs://...
    python convert_torch_weights.py pola_swin_b.pth b_384.safetensors --model pola_swin_b_384 --img-size 384
    python convert_torch_weights.py mine.safetensors for_torch.safetensors --layout torch     # the way back

Which model a file holds is read off its tensors. What is written names its model, so that
`pf.create_model(weights="pola_swin_t.safetensors")` is all that it takes.
"""

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    description, _, epilog = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="IN [OUT], or several to convert: .pth or .safetensors"
    )
    parser.add_argument("--out", metavar="OUT", help="file to write, .safetensors; the same as a second FILE")
    parser.add_argument("--out-dir", metavar="DIR", help="folder for the converted files [beside each IN]")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--model", help="name of the model, where shapes leave it open or to check it")
    parser.add_argument("--alpha", type=float, help="alpha of the attention [that of the stored config, or 4]")
    parser.add_argument("--img-size", type=int, help="resize position tables for this image size")
    parser.add_argument("--num-classes", type=int, help="a new classifier for so many classes, of zeros")
    parser.add_argument("--layout", choices=("ours", "torch"), default="ours", help="of the written file [ours]")
    parser.add_argument("--compare", metavar="NPZ", help="images and logits that the converted model must reproduce")
    args = parser.parse_intermixed_args(argv)

    from polaformer_jax.errors import UserError
    from polaformer_jax.weights.conversion import convert_all, read_reference

    try:
        failed = convert_all(
            args.files,
            out=args.out,
            out_dir=args.out_dir,
            overwrite=args.overwrite,
            model=args.model,
            alpha=args.alpha,
            img_size=args.img_size,
            num_classes=args.num_classes,
            layout=args.layout,
            reference=read_reference(args.compare) if args.compare else None,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
