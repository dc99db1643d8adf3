"""Classifies image files, and shows where the model looks; or classifies each of their pixels.

    polaformer predict --weights pola_swin_t.safetensors photo.jpg
    polaformer predict --weights pola_swin_t.pth --json *.jpg
    polaformer predict --weights digits.safetensors --data sklearn_digits --data-dir data 7.png
    polaformer predict --weights pola_swin_t.pth --picture maps.png --stage 1 --token 14,10 photo.jpg
    polaformer predict --task segmentation --weights scenes.safetensors --out masks *.jpg

A segmentation writes for each image NAME_labels.png, whose grey pixels are class numbers, NAME_colours.png and
NAME_overlay.png, the colours over the image.

To be classified, images are resized and cropped as the weights file says, or else by the official rule for the model's
image size.
"""

import json
from collections.abc import Sequence

from polaformer_jax.cli import command
from polaformer_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("predict", __doc__)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="anything that Pillow opens")
    parser.add_argument("--weights", required=True, help="our .safetensors, an official .pth, or hf://...")
    parser.add_argument(
        "--task", choices=("classification", "segmentation"), help="what the model does [as the weights say]"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for the masks of a segmentation")
    parser.add_argument("--flip", action="store_true", help="in a segmentation, average over the mirrored image too")
    parser.add_argument("--scale", metavar="LONG,SHORT", help="box that images to be segmented are resized into")
    parser.add_argument("--model", help="name of the model, where the weights do not tell")
    parser.add_argument("--top", type=command.positive_integer, default=5, help="classes to name for each image [5]")
    parser.add_argument("--classes", metavar="FILE", help="text file with the names of the classes, one on each line")
    parser.add_argument("--data", metavar="NAME", help="prepared tfds data set that names the classes")
    parser.add_argument("--data-dir", metavar="DIR", help="directory of that data set")
    parser.add_argument("--batch-size", type=command.positive_integer, help="images at a time, to be classified [8]")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--picture", metavar="OUT.png", help="draw the images beside maps of where the model looks")
    parser.add_argument(
        "--stage", type=int, help="of the block that the maps show, from 0 [that of the last linear block]"
    )
    parser.add_argument("--block", type=int, help="that block, from 0 in its stage [the stage's last]")
    parser.add_argument(
        "--token",
        metavar="ROW,COLUMN",
        help="the query token whose weights are shown, as --token=-1,-1 for the last [the average over all]",
    )
    args = parser.parse_intermixed_args(argv)
    return command.run(lambda: _predict(args))


def _predict(args) -> None:
    # Imported here: JAX takes a second, which a wrong flag need not wait for.
    from polaformer_jax import Segmenter, create_model
    from polaformer_jax.files import figures
    from polaformer_jax.inference import pictures, prediction
    from polaformer_jax.training import progress

    progress.set_up_logging()
    if args.task == "segmentation" and args.out is None:
        raise UserError("--task segmentation writes masks: give --out DIR")
    of_masks = args.out is not None or args.flip or args.scale is not None
    if args.task != "segmentation" and of_masks and args.picture is not None:
        raise UserError("--out, --scale and --flip are of a segmentation, --picture of a classification")
    if args.picture is not None:
        pictures.check_request(args.picture, images=len(args.images))
    elif any(value is not None for value in (args.stage, args.block, args.token)):
        raise UserError("--stage, --block and --token say what --picture shows: give --picture OUT.png")
    model = create_model(args.model, weights=args.weights)
    is_segmenter = isinstance(model, Segmenter)
    if args.task is not None and is_segmenter != (args.task == "segmentation"):
        raise UserError(f"--task {args.task}: the weights are of a {model.config.family}")
    if is_segmenter:
        return _segment(model, args)
    if of_masks:
        raise UserError(f"--out, --scale and --flip are of a segmentation: the weights are of a {model.config.family}")
    num_classes = prediction.num_classes_of(model)
    names = prediction.read_class_names(num_classes, file=args.classes, data=args.data, data_dir=args.data_dir)
    token = None if args.token is None else args.token.split(",")
    where = pictures.choose(model, stage=args.stage, block=args.block, token=token)
    results = prediction.predict(model, args.images, class_names=names, top=args.top, batch_size=args.batch_size or 8)
    print(json.dumps(results, indent=2) if args.json else prediction.table(results))
    if args.picture is not None:
        figures.save(pictures.draw(model, args.images, results, where=where), args.picture)


def _segment(model, args) -> None:
    from polaformer_jax.inference import prediction, segmentation

    if args.out is None:
        raise UserError("the weights are of a segmenter, which writes masks: give --out DIR")
    if args.batch_size is not None:
        raise UserError("--batch-size: images are segmented one after the other, at their sizes")
    scale = None if args.scale is None else args.scale.split(",")
    if scale is not None and (len(scale) != 2 or not all(side.isdecimal() and int(side) for side in scale)):
        raise UserError(f"--scale {args.scale}: expected two sides in pixels, such as 2048,512")
    scale = None if scale is None else tuple(map(int, scale))
    if args.picture is not None:
        raise UserError("--picture shows where a classifier looks: a segmenter writes masks into --out DIR")
    classes = model.config.num_classes
    names = prediction.read_class_names(classes, file=args.classes, data=args.data, data_dir=args.data_dir)
    output = segmentation.Output(args.out, args.images)
    results = []
    options = {"class_names": names, "scale": scale, "flip": args.flip or None}
    for number, result in enumerate(segmentation.segment(model, args.images, **options)):
        files = [str(path) for path in output.write(number, result)]
        results.append({"image": result.name, "classes": result.shares(), "files": files})
    if args.json:
        print(json.dumps(results, indent=2))
        return
    print(segmentation.table([(found["image"], found["classes"]) for found in results], classes, args.top))
    print(f"{len(results)} images in {args.out}: *_labels.png, *_colours.png, *_overlay.png")
