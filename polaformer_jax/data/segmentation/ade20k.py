"""ADE20K, as used for semantic segmentation (SceneParse150), as a tfds data set.

tfds's own `scene_parse150` holds the masks of another task, of instances.
"""

import io
import zipfile
from pathlib import Path

import tensorflow_datasets as tfds

from polaformer_jax.data.segmentation import layout
from polaformer_jax.data.segmentation.tfds_source import metadata
from polaformer_jax.errors import UserError

NUM_CLASSES = 150

_DESCRIPTION = """\
The scene parsing benchmark of ADE20K: images of scenes, and for each pixel one of 150 classes; 20,210 images to train
on, 2,000 to validate. Images (JPEG) and masks (PNG) are stored as the files are: in the masks, 0 means none of the
classes and 1 to 150 are the classes (reduce_zero_label in the metadata).
"""

_CITATION = """\
@inproceedings{zhou2017scene,
  title = {Scene Parsing through {ADE20K} Dataset},
  author = {Zhou, Bolei and Zhao, Hang and Puig, Xavier and Fidler, Sanja and Barriuso, Adela and Torralba, Antonio},
  booktitle = {Proceedings of the IEEE Conference on Computer Vision and Pattern Recognition},
  year = {2017}
}"""


class Ade20k(tfds.core.GeneratorBasedBuilder):
    """Builder of the data set `ade20k` (image as JPEG, mask (h, w, 1) uint8 as PNG, file_name)."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"""\
{layout.ADE20K}.zip, or the folder {layout.ADE20K} that it holds, from
http://data.csail.mit.edu/places/ADEchallenge/{layout.ADE20K}.zip
"""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "mask"),
            homepage="https://ade20k.csail.mit.edu/",
            citation=_CITATION,
            metadata=tfds.core.MetadataDict(metadata(NUM_CLASSES, class_names=None, reduce_zero_label=True)),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        root = _root(Path(dl_manager.manual_dir))
        classes = layout.read_classes(root)
        if classes is None or len(classes.names) != NUM_CLASSES:
            raise UserError(f"{root}: expected the names of {NUM_CLASSES} classes in objectInfo150.txt")
        self.info.metadata["class_names"] = list(classes.names)
        return {"train": self._examples(root, "training"), "validation": self._examples(root, "validation")}

    def _generate_examples(self):  # the splits' generators are given above
        raise NotImplementedError

    def _examples(self, root: Path, split: str):
        images, masks = root / "images" / split, root / "annotations" / split
        for image, mask in layout.pairs(images, masks):
            yield (
                image,
                {
                    "image": io.BytesIO((images / image).read_bytes()),
                    "mask": io.BytesIO((masks / mask).read_bytes()),
                    "file_name": image,
                },
            )


def _root(directory: Path) -> Path:
    """The folder `ADEChallengeData2016`, unpacked or in its archive; or the given one, if it is that itself."""
    archive = directory / f"{layout.ADE20K}.zip"
    for root in (directory / layout.ADE20K, directory):
        if (root / "images").is_dir() and (root / "annotations").is_dir():
            return root
    if not archive.is_file():
        raise UserError(f"{directory} has neither {archive.name} nor the folder {layout.ADE20K}: put one there")
    return zipfile.Path(archive, f"{layout.ADE20K}/")
