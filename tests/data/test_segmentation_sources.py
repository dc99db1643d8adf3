"""Images with masks from folders and prepared data sets: pairs, classes, sizes, and every refusal."""

import hashlib
import io
import pickle
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from polaformer_jax.cli import prepare as prepare_command
from polaformer_jax.data.segmentation import digit_scenes
from polaformer_jax.data.segmentation.folder_source import MaskFolderSource
from polaformer_jax.data.segmentation.labels import decode_mask
from polaformer_jax.data.segmentation.source import SegmentationSource, open_source
from polaformer_jax.data.segmentation.tfds_source import MaskTfdsSource
from polaformer_jax.errors import UserError
from tests.support import mask_folders
from tests.support.mask_folders import CLASSES, SIZES

INFO = "Idx\tRatio\tTrain\tVal\tName\n" + "".join(f"{n} \t0.1\t1\t1\tthing {n}, object {n} \n" for n in range(1, 151))


def config(root, **changes):
    fields = {"source": "masks", "name": "views", "data_dir": str(root), "image_dir": None, "mask_dir": None}
    return SimpleNamespace(**fields | changes)


@pytest.fixture
def folder(tmp_path):
    return mask_folders.write(tmp_path / "views")


# --- folders


def test_a_folder_is_read(folder):
    source = open_source(config(folder), "validation")
    assert isinstance(source, SegmentationSource)
    assert (source.name, len(source), source.num_classes) == ("views/validation", 6, 3)
    assert (source.class_names, source.reduce_zero_label) == (CLASSES, False)
    for index, size in enumerate(SIZES):
        record = source[index]
        assert source.describe(index) == str(folder / f"images/validation/{index:02}.jpg")
        assert record["image"] == mask_folders.image(size, index)
        np.testing.assert_array_equal(decode_mask(record["mask"]), mask_folders.labels(size, index))
    for index in (-1, 6):
        with pytest.raises(IndexError, match="no record"):
            source[index]


def test_sizes_are_those_in_the_headers_and_a_broken_image_has_none(folder):
    cut = folder / "images/training/03.jpg"
    cut.write_bytes(cut.read_bytes()[:-300])  # the header is whole
    (folder / "images/training/01.jpg").write_bytes(b"no image")
    sizes = open_source(config(folder), "training").sizes
    assert sizes.dtype == np.int32
    assert sizes.tolist() == [list(size) if number != 1 else [0, 0] for number, size in enumerate(SIZES)]


def test_a_source_travels_by_pickle_without_its_sizes(folder):
    source = open_source(config(folder), "training")
    bare = len(pickle.dumps(source))
    assert len(source.sizes) == 6 and len(pickle.dumps(source)) == bare
    again = pickle.loads(pickle.dumps(source))
    assert again[3] == source[3] and again.digest == source.digest and again.sizes.tolist() == source.sizes.tolist()


def test_the_digest_is_of_names_and_classes_and_not_of_the_place(folder, tmp_path):
    digest = open_source(config(folder), "training").digest
    assert open_source(config(mask_folders.write(tmp_path / "other")), "training").digest == digest
    for change in (
        lambda: (folder / "classes.txt").write_text("sky\nsea\nearth\n"),
        lambda: [(path, path.rename(path.with_stem("zz"))) for path in folder.rglob("training/05.*")],
    ):
        change()
        found = open_source(config(folder), "training").digest
        assert found != digest
        digest = found


@pytest.mark.parametrize("split", ["train", "training"])
def test_splits_are_known_by_both_of_their_names(folder, split):
    assert len(open_source(config(folder), split)) == 6


def test_folders_may_have_other_names_and_images_other_suffixes(tmp_path):
    for path, content in {
        "pictures/a.PNG": mask_folders.image((4, 5), fmt="png"),
        "pictures/b.jpeg": mask_folders.image((6, 7)),
        "pictures/.hidden.jpg": b"",
        "pictures/notes.txt": b"",
        "truth/test/a.png": mask_folders.png(mask_folders.labels((4, 5))),
        "truth/test/b.PNG": mask_folders.png(mask_folders.labels((6, 7))),
        "truth/test/._a.png": b"",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    source = MaskFolderSource(tmp_path, "test", image_dir="pictures", mask_dir="truth/{split}", num_classes=3)
    assert source.sizes.tolist() == [[4, 5], [6, 7]] and source.class_names is None


def test_ade20k_is_read_where_it_was_unpacked(tmp_path):
    root = mask_folders.write(tmp_path / "ADEChallengeData2016", classes=None)
    (root / "objectInfo150.txt").write_text(INFO)
    source = open_source(config(tmp_path), "validation")
    assert (source.num_classes, source.class_names[-1], source.reduce_zero_label) == (150, "thing 150", True)
    assert not open_source(config(root, reduce_zero_label=False), "validation").reduce_zero_label


def test_classes_without_names_need_their_number(folder):
    (folder / "classes.txt").unlink()
    assert open_source(config(folder), "training", 7).num_classes == 7
    with pytest.raises(UserError, match="number of classes is not known.*classes.txt.*give num_classes"):
        open_source(config(folder), "training")


@pytest.mark.parametrize(
    ("number", "names", "message"),
    [
        (4, "sky\nearth\nsea\n", "num_classes is 4, but .* names 3 classes"),
        (None, "sky\n\nsea\n", "line 2 is empty"),
        (None, "\n", "it is empty"),
        (None, "x\n" * 256, "256 classes in .*expected 1 to 255"),
        (0, None, "0 classes in .*expected 1 to 255"),
    ],
)
def test_classes_are_checked(folder, number, names, message):
    (folder / "classes.txt").unlink() if names is None else (folder / "classes.txt").write_text(names)
    with pytest.raises(UserError, match=message):
        open_source(config(folder), "training", number)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"wall\nbuilding\n", "expected a table separated by tabs"),
        (INFO.replace("\n2 ", "\n3 ", 1).encode(), "class 2 is '3 0.1 1 1 thing 2, object 2'"),
        (b"Idx\tName\n1\t\xff\n", "cannot be read as text"),
    ],
)
def test_a_list_of_ade20k_of_another_form_is_refused(tmp_path, content, message):
    root = mask_folders.write(tmp_path, classes=None)
    (root / "objectInfo150.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(config(root), "training")


def remove(pattern):
    return lambda root: [path.unlink() for path in root.glob(pattern)]


def twice(root):
    (root / "images/training/02.png").write_bytes(b"")


def rename(one, other):
    return lambda root: (root / one).rename(root / other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("annotations/training/0[0-5].png"), "6 images without a mask in .*: 00.jpg, .*04.jpg, and 1 more"),
        (remove("images/training/03.jpg"), "1 masks without an image in .*images/training: 03.png"),
        (
            rename("annotations/training/03.png", "annotations/training/3.png"),
            "1 images without a mask .*: 03.jpg; 1 masks without an image .*: 3.png",
        ),
        (remove("*/training/*"), "has no images"),
        (twice, "several files of one name, up to the suffix: 02.jpg, 02.png"),
        (rename("images/training", "images/learn"), "no folder images/training .*found learn, validation in .*images;"),
        (rename("annotations", "masks"), "no folder annotations/training .*found images, masks in .*data.mask_dir"),
    ],
)
def test_what_does_not_match_is_told(folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=message):
        open_source(config(folder), "training")


@pytest.mark.parametrize("split", ["", "..", "training[:90%]", "../views/training"])
def test_a_split_is_one_name(folder, split):
    with pytest.raises(UserError, match="has no folder"):
        open_source(config(folder), split)


@pytest.mark.parametrize(
    ("root", "message"), [("gs://bucket/views", "must be local"), ("/no/such/folder", "does not exist")]
)
def test_a_folder_that_is_not_there_is_told(root, message):
    with pytest.raises(UserError, match=message):
        open_source(config(root), "training")


def test_an_unknown_source_is_told(folder):
    with pytest.raises(UserError, match="data.source is 'folder', expected one of: masks, tfds"):
        open_source(config(folder, source="folder"), "training")


# --- prepared data sets


class Views(tfds.core.GeneratorBasedBuilder):
    """Images with masks, without a word on the classes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, size in enumerate(SIZES):
            record = mask_folders.record(size, seed=number, fmt="png")
            yield number, {name: io.BytesIO(content) for name, content in record.items()}


class NoMasks(Views):
    """Its mask is a number."""

    def _info(self):
        features = {"image": tfds.features.Image(), "mask": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))


def prepare(name, data_dir, *options):
    return prepare_command.main([name, "--data-dir", str(data_dir), *options])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A directory with `views`, and with some of the `digit_scenes`."""
    directory = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_scenes, "SCENES", {"train": 9, "test": 4})
        assert prepare("digit_scenes", directory) == prepare("views", directory) == 0
    return directory


def test_digit_scenes_are_prepared_with_their_classes(prepared):
    source = open_source(config(prepared, source="tfds", name="digit_scenes"), "train[:90%]")
    assert isinstance(source, SegmentationSource)
    assert (len(source), source.num_classes, source.reduce_zero_label) == (8, 11, False)
    assert source.class_names == ("background", *"0123456789")
    again = pickle.loads(pickle.dumps(source))
    assert again[3] == source[3] and again.digest == source.digest
    assert source.describe(3) == "digit_scenes/train[:90%][3]"
    digits, numbers = digit_scenes.split_digits("train")
    expected = {digit_scenes.scene(digits, numbers, (0, number))[1].tobytes() for number in range(9)}
    for index in range(8):
        record, size = source[index], source.sizes[index].tolist()
        mask = decode_mask(record["mask"])
        assert Image.open(io.BytesIO(record["image"])).size == (size[1], size[0])
        assert list(mask.shape) == size and mask.tobytes() in expected


def test_of_other_data_sets_the_number_of_classes_is_given(prepared):
    source = MaskTfdsSource("views", data_dir=prepared, split="train", num_classes=3, reduce_zero_label=True)
    assert (source.num_classes, source.class_names, source.reduce_zero_label) == (3, None, True)
    again = pickle.loads(pickle.dumps(source))
    assert (again.num_classes, again.reduce_zero_label) == (3, True)
    assert sorted(source.sizes.tolist()) == sorted(map(list, SIZES))
    with pytest.raises(UserError, match="'views/train' does not tell its number of classes: give num_classes"):
        MaskTfdsSource("views", data_dir=prepared, split="train")


@pytest.mark.parametrize("options", [{"num_classes": 10}, {"reduce_zero_label": True}])
def test_what_the_data_set_says_cannot_be_contradicted(prepared, options):
    with pytest.raises(UserError, match=f"{[*options][0]}: .*, but the data set 'digit_scenes/test' has"):
        MaskTfdsSource("digit_scenes", data_dir=prepared, split="test", **options)


def test_other_features_are_listed(prepared, tmp_path, digits_dir, capsys):
    with pytest.raises(UserError, match=r"not for semantic segmentation: .* found image \(Image\), label"):
        MaskTfdsSource("sklearn_digits", data_dir=digits_dir, split="test")
    assert prepare("no_masks", tmp_path) == 1
    assert "found image (Image), mask (ClassLabel)" in capsys.readouterr().err


# --- the builders


def test_digit_scenes_are_the_same_everywhere():
    digits, numbers = digit_scenes.split_digits("train")
    first = [digit_scenes.scene(digits, numbers, (0, number)) for number in range(20)]
    content = b"".join(array.tobytes() for pair in first for array in pair)
    assert hashlib.sha256(content).hexdigest()[:16] == "98842adea7c05c86"
    assert {mask.shape for _, mask in first} == set(digit_scenes.SIZES)
    for image, mask in first:
        assert image.dtype == mask.dtype == np.uint8 and image.shape == (*mask.shape, 3)
        assert 0.02 < (mask > 0).mean() < 0.6 and mask.max() <= 10


def test_scenes_of_test_have_digits_of_their_own():
    (train, _), (test, _) = (digit_scenes.split_digits(split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert not {digit.tobytes() for digit in train} & {digit.tobytes() for digit in test}


@pytest.fixture
def ade20k(tmp_path):
    root = mask_folders.write(tmp_path / "archives/ADEChallengeData2016", sizes=SIZES[:2], classes=None)
    (root / "objectInfo150.txt").write_text(INFO)
    return root


@pytest.mark.parametrize("packed", [True, False])
def test_ade20k_is_prepared_from_its_archive_or_folder(ade20k, tmp_path, packed):
    expected = {path.name: path.read_bytes() for path in ade20k.rglob("training/*")}
    manual = ade20k.parent
    if packed:
        manual = tmp_path / "packed"
        manual.mkdir()
        with zipfile.ZipFile(manual / "ADEChallengeData2016.zip", "w") as archive:
            for path in ade20k.rglob("*"):
                archive.write(path, path.relative_to(ade20k.parent))
    assert prepare("ade20k", tmp_path / "data", "--manual-dir", str(manual)) == 0
    source = open_source(config(tmp_path / "data", source="tfds", name="ade20k"), "train")
    assert (source.num_classes, source.reduce_zero_label) == (150, True)
    assert source.class_names[:2] == ("thing 1", "thing 2")
    stored = sorted(content for index in range(len(source)) for content in source[index].values())
    assert stored == sorted(expected.values())  # the bytes themselves


def test_what_ade20k_lacks_is_told(ade20k, tmp_path, capsys):
    assert prepare("ade20k", tmp_path / "data") == 1
    assert "ADEChallengeData2016.zip" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").touch()
    (ade20k / "annotations/validation/00.png").unlink()
    for manual, message in ((tmp_path / "empty", "has neither"), (ade20k, "1 images without a mask")):
        assert prepare("ade20k", tmp_path / "data", "--manual-dir", str(manual)) == 1
        assert message in capsys.readouterr().err
