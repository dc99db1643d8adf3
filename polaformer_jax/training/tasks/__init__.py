"""Tasks: everything that differs between kinds of data and models is behind one interface, `Task`.

Experiment, step, loop and evaluation use this interface only; `task_of` chooses by the config's `task.name`.
"""

from polaformer_jax.training.tasks.task import Batch, Shapes, Task

__all__ = ["Batch", "Shapes", "Task", "task_of"]


def task_of(config) -> Task:
    """The task of a config."""
    # Imported here, so that image tasks do not import the code of sequences, nor the other way round.
    if config.task.name == "image":
        from polaformer_jax.training.tasks.images import ImageClassification

        return ImageClassification(config)
    if config.task.name == "segmentation":
        from polaformer_jax.training.tasks.segmentation import SemanticSegmentation

        return SemanticSegmentation(config)
    from polaformer_jax.training.tasks.sequences import SequenceClassification

    return SequenceClassification(config)
