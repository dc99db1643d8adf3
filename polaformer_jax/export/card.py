"""The model card of a repository on the Hugging Face Hub: what the model is, how to use it, and how good it is."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from polaformer_jax.errors import UserError
from polaformer_jax.inference.images import evaluation_transform
from polaformer_jax.models.backbone import Backbone
from polaformer_jax.models.batch_norm import parameter_count
from polaformer_jax.models.token_attention import departures
from polaformer_jax.weights import hub, imagenet, model_metadata

NAME = "README.md"
PAPER = "https://arxiv.org/abs/2501.15061"
_OF_SEQUENCES = ("text-classification", "feature-extraction")
_SHOWN_CLASSES = 20  # names in the card; config.json has all
_METRICS = {"accuracy": "top-1", "accuracy_top5": "top-5"}
_CITATION = """\
```bibtex
@inproceedings{meng2025polaformer,
  title     = {{PolaFormer}: Polarity-aware Linear Attention for Vision Transformers},
  author    = {Meng, Weikang and Luo, Yadan and Li, Xin and Jiang, Dongmei and Zhang, Zheng},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2025},
  url       = {https://arxiv.org/abs/2501.15061}
}
```"""


def model_card(
    model: nnx.Module,
    repo: str,
    evaluation: Mapping[str, Any] | None,
    license: str | None,
    *,
    revision: str | None,
    official: str | None,
) -> str:
    """The card as Markdown, its metadata in front, for the repository "user/name".

    Args:
        evaluation, revision: see `push_to_hub`.
        official: name of the file that has the official layout; None: there is none.
    """
    facts = model.info.facts
    found = _result(facts if evaluation is None else evaluation, given=evaluation is not None)
    sections = [
        _header(model, repo, found, license),
        f"# {repo.partition('/')[2]}",
        _description(model),
        _use(model, repo if revision is None else f"{repo}@{revision}", official),
        _data(facts, found),
        *([_classes(model.info.class_names)] if model.info.class_names else []),
        f"## Licence\n\n{'Not stated.' if license is None else license}",
        f"## Citation\n\n{_CITATION}",
    ]
    return "\n\n".join(sections) + "\n"


def _result(evaluation: Mapping[str, Any], *, given: bool) -> Mapping[str, Any] | None:
    """The evaluation, if there is one.

    Raises:
        UserError: one was given, and it has no accuracy between 0 and 1, or does not say of which data.
    """
    values = [evaluation[name] for name in _METRICS if name in evaluation]
    if "accuracy" in evaluation and "data" in evaluation:
        if all(isinstance(value, float | int) and 0 <= value <= 1 for value in values):
            return evaluation
    if given:
        raise UserError(
            f"the evaluation has {', '.join(evaluation) or 'nothing'}; expected accuracy between 0 and 1, and data, as"
            " in the eval.json of `polaformer eval`",
            argument="evaluation",
        )
    return None


def _header(model: nnx.Module, repo: str, found: Mapping[str, Any] | None, license: str | None) -> str:
    library = hub.library()
    kinds = ("image-classification", "image-feature-extraction") if isinstance(model, Backbone) else _OF_SEQUENCES
    task = kinds[model.config.num_classes == 0]
    results = [
        library.EvalResult(
            task_type=task,
            dataset_type=str(found["data"]),
            dataset_name=str(found["data"]),
            dataset_split=str(found["split"]) if "split" in found else None,
            metric_type=metric,
            metric_name=name,
            metric_value=found[metric],
        )
        for metric, name in _METRICS.items()
        if found and metric in found
    ]
    linear = [] if "softmax attention" in _attention(model) else ["linear-attention"]
    data = library.ModelCardData(
        license=license,
        library_name="polaformer_jax",
        pipeline_tag=task,
        tags=["jax", "flax", "polaformer", *linear, "arxiv:2501.15061"],
        model_name=repo,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _attention(model: nnx.Module) -> list[str]:
    """What the attention has that the paper's has not."""
    if isinstance(model, Backbone):
        return departures(model.config)
    return [] if model.config.attention == "polarity" else [f"{model.config.attention} attention"]


def _description(model: nnx.Module) -> str:
    config = model.config
    other = f" Its attention is not the paper's: {', '.join(found)}." if (found := _attention(model)) else ""
    size = f"images of {config.img_size} pixels" if isinstance(model, Backbone) else f"{config.max_length} tokens"
    classes = f"{config.num_classes} classes" if config.num_classes else "no classifier"
    return (
        f"`{model_metadata(model)['model']}` of [PolaFormer]({PAPER}) (Polarity-aware Linear Attention for Vision"
        f" Transformers, ICLR 2025) in JAX: {parameter_count(model):,} parameters, {size}, {classes}.{other}"
    )


def _use(model: nnx.Module, repo: str, official: str | None) -> str:
    address = f'pf.create_model("hf://{repo}")'
    lines = ["import polaformer_jax as pf", "", f"model = {address}"]
    text = 'Install `polaformer_jax` with its extra `hub` (`pip install "polaformer_jax[hub]"`).'
    if isinstance(model, Backbone):
        transform = evaluation_transform(model)
        answer = 'pf.predict(model, "photo.jpg")' if model.head else 'model.features(pf.preprocess(model, "photo.jpg"))'
        lines.append(f"print({answer})")
        text += (
            f" Images are resized to {transform.resize} x {transform.resize} pixels (bicubic, the aspect ratio is not"
            f" kept), and their central {transform.crop} x {transform.crop} are normalised by ImageNet's mean and"
            " standard deviation."
        )
    else:
        lines.append("print(model.config)")
    if official is not None:
        text += f" `{official}` has the same weights under the names and in the layouts of the official PyTorch code."
    return "\n".join(["## Use", "", "```python", *lines, "```", "", text])


def _data(facts: Mapping[str, Any], found: Mapping[str, Any] | None) -> str:
    known = {"data": "Data", "step": "Step", "kind": "Weights", "epoch": "Epoch"}
    values = {"raw": "of the last update", "ema": "moving average"}
    rows = [f"- {text}: {values.get(facts[key], facts[key])}" for key, text in known.items() if key in facts]
    lines = ["## Training and results", "", *(rows or ["Not stated."]), ""]
    if found is None:
        return "\n".join([*lines, "Not evaluated."])
    metrics = {text: f"{100 * found[key]:.2f} %" for key, text in _METRICS.items() if key in found}
    columns = {"data": found["data"], "split": found.get("split"), "examples": _examples(found), **metrics}
    columns = {name: value for name, value in columns.items() if value is not None}
    table = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", f"| {' | '.join(map(str, columns.values()))} |"]
    return "\n".join([*lines, *table])


def _examples(found: Mapping[str, Any]) -> int | None:
    return next((found[name] for name in ("images", "sequences") if name in found), None)


def _classes(names: tuple[str, ...]) -> str:
    words = imagenet.in_words(names)[:_SHOWN_CLASSES]
    listed = "; ".join(word.replace("|", "\\|") for word in words)
    more = f"; and {len(names) - len(words)} more, see `config.json`" if len(names) > len(words) else ""
    return f"## Classes\n\n{listed}{more}"
