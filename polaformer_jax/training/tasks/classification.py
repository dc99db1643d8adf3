"""What the classification of images and that of sequences share: logits and labels, how they are evaluated and told."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from polaformer_jax.data.records import Source
from polaformer_jax.training.metrics import Mean, Sums
from polaformer_jax.training.tasks import classification_pictures
from polaformer_jax.training.tasks.task import Batch, Evaluated, Shapes


class Classification:
    """A task whose examples have one `label` each, and whose models return logits (B, classes). See `Task`.

    A subclass has `inputs(batch)`, what the model takes of a batch that is not augmented, and `metrics`.
    """

    examples: str
    headline = "accuracy"
    draws_with_model = False

    def inputs(self, batch: Batch) -> Any:
        raise NotImplementedError

    def batch_shapes(self) -> Shapes:
        raise NotImplementedError

    def eval_shapes(self, source: Source) -> Shapes:
        return self.batch_shapes()

    def metrics(self, logits: jax.Array, batch: Batch) -> Sums:
        raise NotImplementedError

    def evaluate(self, model: nnx.Module, batch: Batch) -> tuple[Sums, Batch]:
        logits = model(self.inputs(batch), train=False)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        outputs = {
            "prediction": jnp.argmax(logits, -1),
            "probability": jnp.max(jax.nn.softmax(logits), -1),
            "label": batch["label"],
        }
        return self.metrics(logits, batch), outputs

    def result(self, mean: Mean, source: Source) -> tuple[dict[str, float], dict[str, Any]]:
        return mean.result(), {}

    def table(self, outputs: Mapping[str, np.ndarray], source: Source) -> list[list[Any]]:
        """Record, label, prediction, probability of the prediction, correct.

        A record that could not be decoded has empty fields after its label; one that could not be read has no label
        either.
        """

        def name(label: int) -> str | int:
            if label < 0:  # not even the label of the record could be read
                return ""
            return source.class_names[label] if source.class_names else int(label)

        rows = [["record", "label", "prediction", "probability", "correct"]]
        columns = (outputs[column] for column in ("label", "prediction", "probability", "mask"))
        for index, (label, prediction, probability, mask) in enumerate(zip(*columns, strict=True)):
            answer = [name(prediction), f"{probability:.6f}", int(prediction == label)] if mask else ["", "", ""]
            rows.append([source.describe(index), name(label), *answer])
        return rows

    def pictures(
        self, evaluation: Evaluated, source: Source, model: nnx.Module | None
    ) -> Mapping[str, Callable[[], Figure]]:
        names = source.class_names or tuple(str(label) for label in range(source.num_classes))
        drawers = {"confusion.png": lambda: classification_pictures.confusion(evaluation.outputs, names, self.examples)}
        if (image_of := self.image_of(source)) is not None:
            drawers["predictions.png"] = lambda: classification_pictures.predictions(
                evaluation.outputs, names, image_of
            )
        return drawers

    def image_of(self, source: Source) -> Callable[[int], np.ndarray] | None:
        """A function from an example's index to the image (S, S, 3) uint8 that the model saw; None if it sees none."""
        return None
