"""Why the loss of the Long Range Arena's Text stays at log 2 at first: what byte n-grams tell, and what models see.

    python -m tests.campaigns.text_plateau --data-dir data [WORKDIR ...]

First: accuracy and loss on the test split of logistic regression on the frequencies of n bytes in a row, each over its
standard deviation. Then for the initial model, and the last checkpoint of each training: the mean over tokens that
its head classifies, on training texts of up to 1,024 bytes. How large is what all texts have in common, how far apart
are texts, how far apart are the two classes, and what does logistic regression on the standardised means reach?
"""

import argparse
from collections.abc import Iterator

import jax
import numpy as np
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from polaformer_jax.analysis.sequence_entropy import spread
from polaformer_jax.models.pola_sequence import Sequences
from polaformer_jax.training import checkpoints, recipes
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.workdir import read_config

HASHED = 1 << 16  # columns for more than two bytes
BATCH, LENGTH, TEXTS = 64, 1024, 1536


def ngrams(texts: list[np.ndarray], n: int) -> csr_matrix:
    """(texts, columns): how often each n bytes in a row occur, divided by the length of the text."""
    columns = HASHED if n > 2 else 512**n
    counts, where, starts = [], [], [0]
    for text in texts:
        code = np.zeros(len(text) - n + 1, np.uint64)
        for i in range(n):
            code = code * np.uint64(512) + text[i : len(text) - n + 1 + i].astype(np.uint64)
        if n > 2:
            code = code * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(48)  # Fibonacci hashing to 16 bits
        found, times = np.unique(code, return_counts=True)
        counts.append(times / len(text))
        where.append(found.astype(np.int64))
        starts.append(starts[-1] + len(found))
    return csr_matrix((np.concatenate(counts), np.concatenate(where), starts), shape=(len(texts), columns))


def examples(experiment: Experiment, split: str, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    source = experiment.inputs.source(split)
    found = [source[int(index)] for index in spread(len(source), count)]
    return [np.asarray(one["tokens"]) for one in found], np.array([one["label"] for one in found])


def baselines(experiment: Experiment) -> Iterator[str]:
    train, test = (examples(experiment, split, 1 << 30) for split in ("train", "test"))
    for n, strength in ((1, 1e-2), (2, 1e-4), (3, 1e-4), (5, 1e-4)):
        model = make_pipeline(StandardScaler(with_mean=False), LogisticRegression(C=strength, max_iter=1000))
        model.fit(ngrams(train[0], n), train[1])
        shares = model.predict_proba(ngrams(test[0], n))
        accuracy = accuracy_score(test[1], shares.argmax(1))
        yield f"{n} bytes: accuracy {100 * accuracy:.2f} %, loss {log_loss(test[1], shares):.4f}"


def pooled(experiment: Experiment, params, texts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The inputs of the head (texts, C), and the differences of the two logits."""
    model = experiment.model(params)

    @jax.jit
    def run(tokens, lengths):
        sequences = Sequences(tokens, lengths)
        return model.pooled(sequences)[:, 0], model(sequences)

    features, logits = [], []
    for start in range(0, len(texts) - BATCH + 1, BATCH):
        batch = texts[start : start + BATCH]
        tokens = np.stack([np.pad(text, (0, LENGTH - len(text))) for text in batch])
        found = run(tokens, np.array([len(text) for text in batch], np.int32))
        features.append(found[0])
        logits.append(found[1])
    features, logits = np.concatenate(features), np.concatenate(logits)
    return features, logits[:, 1] - logits[:, 0]


def described(features: np.ndarray, difference: np.ndarray, labels: np.ndarray) -> str:
    def rms(x):
        return np.sqrt(np.mean(x**2))

    classes = rms(features[labels == 1].mean(0) - features[labels == 0].mean(0))
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.02, max_iter=1000))
    shares = cross_val_predict(probe, features, labels, cv=5, method="predict_proba")
    return (
        f"common {rms(features.mean(0)):.4f}, between texts {np.sqrt(features.var(0).mean()):.4f}, "
        f"between classes {classes:.4f}; logits differ by {difference.mean():.3f} ± {difference.std():.3f}; "
        f"regression: accuracy {100 * accuracy_score(labels, shares.argmax(1)):.1f} %, "
        f"loss {log_loss(labels, shares):.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("runs", nargs="*", metavar="WORKDIR")
    args = parser.parse_args()
    config = recipes.load("lra:text")
    config.data.data_dir = args.data_dir
    experiment = Experiment(config)
    for line in baselines(experiment):
        print(line, flush=True)
    texts, labels = examples(experiment, "train", TEXTS)
    short = [i for i, text in enumerate(texts) if len(text) <= LENGTH]
    short = short[: len(short) // BATCH * BATCH]
    texts, labels = [texts[i] for i in short], labels[short]
    print(f"{len(texts)} texts: {described(*pooled(experiment, experiment.params.initial(), texts), labels)}")
    for run in args.runs:
        config = read_config(run)
        config.data.data_dir = args.data_dir
        experiment = Experiment(config)
        params, step = checkpoints.read_params(run, experiment.params.abstract, "latest", best_metric="accuracy")
        print(f"{run}, step {step}: {described(*pooled(experiment, params, texts), labels)}", flush=True)


if __name__ == "__main__":
    main()
