"""Conversion of weights: read, identified, checked, written to a temporary file, run once, and only then renamed."""

import collections
import dataclasses
import os
import sys
import time
import uuid
import zipfile
import zlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import tqdm
from etils import epath
from flax import nnx

from polaformer_jax import weights
from polaformer_jax.errors import UserError, WeightsError
from polaformer_jax.files import paths
from polaformer_jax.models.batch_norm import parameter_count
from polaformer_jax.models.model_config import ModelConfig
from polaformer_jax.models.pola_sequence import PolaSequenceConfig, Sequences
from polaformer_jax.models.segmenter import Scores
from polaformer_jax.models.token_attention import departures
from polaformer_jax.weights import creation
from polaformer_jax.weights.loading import fitted_info
from polaformer_jax.weights.metadata import metadata_of

TOLERANCE = 1e-5  # relative L2 error of float32 logits against a reference; PyTorch's own is at most 2.6e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """The conversion of one file; `table` describes it for people."""

    source: str
    target: str
    model: str  # registered name, or the family's
    config: ModelConfig
    facts: Mapping[str, object]  # of the checkpoint, see `WeightsFile`
    assumed: list[str]  # what the file does not say
    found: int  # tensors in the file
    converted: int  # of these, weights
    parameters: int
    ignored: list[str]
    changes: list[weights.Change]
    seconds: float = 0.0  # of the forward pass, compilation included
    error: float | None = None  # relative L2 error against the reference, if one was given

    def table(self) -> str:
        given = self.config
        facts = [f"{key} {self.facts[key]}" for key in ("epoch", "max_accuracy") if key in self.facts]
        # Buffers by kind; the unused norm by its full name.
        ignored = collections.Counter(
            name if name in weights.UNUSED else name.rsplit(".", 1)[-1] for name in self.ignored
        )
        size = f"{given.max_length} tokens" if isinstance(given, PolaSequenceConfig) else f"{given.img_size} pixels"
        found = departures(given)
        if hasattr(given, "alpha") and given.attention == "polarity":
            found = [f"alpha {given.alpha:g}", *found]
        model = ", ".join([f"{self.model}, {size}, {given.num_classes} classes", *found])
        rows = [
            ("model", model),
            ("found", ", ".join([f"{self.found} tensors", *facts])),
            ("converted", f"{self.converted} tensors, {self.parameters:,} parameters, all finite"),
            ("ignored", ", ".join(f"{n} x {leaf}" if n > 1 else leaf for leaf, n in ignored.items()) or "none"),
            ("resized", "; ".join(weights.summary(self.changes)) or "none"),
            *(("assumed", line) for line in self.assumed),
            ("forward", f"in {self.seconds:.1f} s with compilation, all logits finite"),
        ]
        if self.error is not None:
            rows.append(("compared", f"logits within {self.error:.1e} of the reference (relative L2)"))
        return "\n".join([f"{self.source} -> {self.target}", *(f"  {key:10} {text}" for key, text in rows)])


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    model: str | None = None,
    alpha: float | None = None,
    img_size: int | None = None,
    num_classes: int | None = None,
    ema: bool = False,
    layout: weights.Layout = "ours",
    reference: Mapping[str, np.ndarray] | None = None,
) -> Conversion:
    """Converts a weights file of any kind to `.safetensors` in either layout. `target` is written atomically.

    Tensors keep their dtypes. They are written one by one from the mapped source, and the forward pass reads what was
    written, so that the memory needed is little more than the size of the weights.

    Args:
        model: one of `list_models()`; None: the one that the tensors' shapes identify.
        alpha: of the attention; None: the one that the file's config names, or the official 4.
        img_size, num_classes: values other than the file's: position tables are resized, the classifier starts from
            zeros.
        ema: see `weights.read_file`.
        reference: "images" (B, 3, S, S) or (B, S, S, 3), normalised, and "logits" (B, classes) that the converted model
            must give in float32 within a relative L2 error of 1e-5.

    Raises:
        WeightsError: the file cannot be read, its tensors do not fit the model, they are not finite, or the logits
            differ from those of the reference.
        ValueError: an unknown model, or arguments with which it cannot be built.
    """
    weights.check_suffix(target)
    target = paths.given(target, "out")
    aside = target.parent / f".{target.name}.{uuid.uuid4().hex}.safetensors"
    try:
        written = _write(weights.read_file(source, ema=ema), aside, model, alpha, img_size, num_classes, layout)
        seconds, error = _run(aside, os.fspath(source), reference)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    return dataclasses.replace(written, target=os.fspath(target), seconds=seconds, error=error)


def _write(
    file: weights.WeightsFile,
    target: epath.Path,
    model: str | None,
    alpha: float | None,
    img_size: int | None,
    num_classes: int | None,
    layout: weights.Layout,
) -> Conversion:
    """Writes the tensors. Once this returns, nothing references the mapped source."""
    stored = weights.stored_arguments(file).get("alpha")
    given = {"num_classes": num_classes, "img_size": img_size}
    if alpha is not None or stored is not None:
        given["alpha"] = stored if alpha is None else alpha
    built, assumed = creation.abstract_model(file, model, given)
    if alpha is not None:
        assumed = [line for line in assumed if not line.startswith("alpha")]
        if stored not in (None, alpha):
            assumed.append(f"alpha: {alpha:g} as given, though the file says {stored:g}")
    expected = weights.shapes(nnx.to_pure_dict(nnx.state(built)))
    try:
        fits = creation.allowed_fits(given)
        checked = weights.check(file.tensors, expected, layout=file.layout, fit=fits, release=True)
    except WeightsError as error:
        raise WeightsError(f"{file.path}: {error}") from error

    info = fitted_info(file.info, built.config, checked.changes, fits)
    metadata = {**metadata_of(info), **weights.model_metadata(built)}
    arrays = checked.tensors if layout == "ours" else weights.in_official_layout(checked.tensors, built)
    weights.write_file(target, arrays, layout=layout, metadata=metadata)
    return Conversion(
        source=file.path,
        target=os.fspath(target),
        model=metadata["model"],
        config=built.config,
        facts=file.facts,
        assumed=assumed,
        found=len(file.tensors),
        converted=len(checked.tensors),
        parameters=parameter_count(built),
        ignored=checked.ignored,
        changes=checked.changes,
    )


def _run(path: epath.Path, source: str, reference: Mapping[str, np.ndarray] | None) -> tuple[float, float | None]:
    """One forward pass in float32: its seconds, and the relative error against a reference."""
    model = creation.create_model(weights=path)
    if reference is None:
        inputs = _random_inputs(model.config)
    elif isinstance(model.config, PolaSequenceConfig):
        raise WeightsError(f"{source} holds a sequence model; a reference has images, so that it cannot be compared")
    else:
        inputs = _reference_images(reference, model.config.img_size)
    graphdef, params = nnx.split(model)
    began = time.monotonic()
    result = jax.jit(lambda params, inputs: nnx.merge(graphdef, params)(inputs))(params, inputs)
    logits = np.asarray(result.logits if isinstance(result, Scores) else result)
    seconds = time.monotonic() - began
    if not np.isfinite(logits).all():
        raise WeightsError(f"{source}: the model gives logits that are not finite; its weights are broken")
    if reference is None:
        return seconds, None
    expected = np.asarray(reference["logits"], np.float64)
    if logits.shape != expected.shape:
        raise WeightsError(f"{source} gives logits of shape {logits.shape}, but the reference has {expected.shape}")
    error = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
    if not error <= TOLERANCE:
        raise WeightsError(
            f"{source}: the logits differ from the reference by {error:.2e} (relative L2), at most {TOLERANCE:.0e} was "
            "expected. Another alpha, other images, or not the same weights?"
        )
    return seconds, error


def _random_inputs(config: ModelConfig) -> np.ndarray | Sequences:
    """A batch of one image, or of one example of sequences of the greatest length."""
    rng = np.random.default_rng(0)
    if not isinstance(config, PolaSequenceConfig):
        return rng.standard_normal((1, config.img_size, config.img_size, 3), np.float32)
    shape = (1, config.max_length) if config.texts == 1 else (1, config.texts, config.max_length)
    tokens = rng.integers(config.vocabulary, size=shape, dtype=np.int32)
    return Sequences(tokens, np.full(shape[:-1], config.max_length, np.int32))


def _reference_images(reference: Mapping[str, np.ndarray], size: int) -> np.ndarray:
    images = np.asarray(reference["images"], np.float32)
    if images.ndim == 4 and images.shape[1] == 3 and images.shape[3] != 3:
        images = images.transpose(0, 2, 3, 1)  # PyTorch's layout
    if images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise WeightsError(
            f"the reference's images have shape {reference['images'].shape}, expected (batch, 3, {size}, {size}) or "
            f"(batch, {size}, {size}, 3)"
        )
    return images


def read_reference(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Images and logits of a `.npz` file, see `convert`.

    Raises:
        WeightsError: it is not such a file, one of the two is missing, not floats, or empty.
    """
    path = paths.given(path, "compare")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    # np.load and what it is built on raise all of these on damaged files; what it returns for a .npy has no `with`.
    except (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise WeightsError(f"cannot read {path}, expected an .npz file with images and logits: {error}") from error
    if missing := [key for key in ("images", "logits") if key not in found]:
        raise WeightsError(f"{path} has no {' and no '.join(missing)}; it has {', '.join(found) or 'nothing'}")
    for key in ("images", "logits"):
        if not np.issubdtype(found[key].dtype, np.floating) or not found[key].size:
            raise WeightsError(
                f"{path}: {key} is {found[key].dtype} {found[key].shape}, expected a non-empty array of floats"
            )
    return found


def convert_all(files: Sequence[str], *, out: str | None, out_dir: str | None, overwrite: bool, **options) -> list[str]:
    """Converts files one after the other, printing a table for each; failures are printed to stderr and returned.

    Args:
        files: `[IN, OUT]` if the second of two is the name of a `.safetensors` file that does not exist yet; otherwise
            all are converted, each to its name with that suffix.
        out: where the only file is written.
        out_dir: where all are written; None: next to each, or for files of the Hub in the current folder.
        options: arguments of `convert`.

    Raises:
        UserError: targets that exist, that coincide, or that could be meant as files to convert.
    """
    pairs = _targets(files, out, out_dir)
    if not overwrite and (taken := [target for _, target in pairs if paths.given(target).exists()]):
        raise UserError(f"{', '.join(taken)} exists: give another name or folder, or set overwrite to replace it")
    failed = []
    bar = tqdm.tqdm(pairs, unit="file", disable=len(pairs) == 1 or None, leave=False)
    for source, target in bar:
        bar.set_description(os.path.basename(source))
        try:
            text = convert(source, target, **options).table()
        except (UserError, OSError) as error:  # OSError: a full disk
            tqdm.tqdm.write(f"error: {error}", file=sys.stderr)
            failed.append(source)
        else:
            tqdm.tqdm.write(text)
    return failed


def _targets(files: Sequence[str], out: str | None, out_dir: str | None) -> list[tuple[str, str]]:
    if out is not None:
        if len(files) > 1 or out_dir is not None:
            raise UserError(f"{out} is one file: give a folder (out_dir) for several", argument="out")
        return [(files[0], out)]
    if len(files) == 2 and out_dir is None:
        second = paths.given(files[1])
        if files[1].endswith(".safetensors"):
            if second.exists():  # a glob may have named it as a file to convert
                raise UserError(
                    f"{files[1]} exists: to replace it, give it as out with overwrite; to convert both, give out_dir"
                )
            return [(files[0], files[1])]
        if not second.exists() or second.is_dir():
            way = "give the folder as out_dir" if second.is_dir() else "weights are written as .safetensors"
            raise UserError(f"there is no file {files[1]} to convert; if it is the file to write: {way}")
    folder = None if out_dir is None else paths.given(out_dir, "out_dir")
    pairs = []
    for source in files:
        # What comes from the Hub is written to the current folder: there is none of its own beside it.
        path = weights.hub.Address.parse(source).file if weights.hub.is_address(source) else source
        beside = os.path.dirname(path) if path is source else ""
        name = f"{os.path.splitext(os.path.basename(path))[0]}.safetensors"
        pairs.append((source, os.path.join(beside if folder is None else folder, name)))
    targets = [target for _, target in pairs]
    if twice := {target for target in targets if targets.count(target) > 1}:
        raise UserError(f"several files would be written to {', '.join(sorted(twice))}: convert them one by one")
    return pairs
