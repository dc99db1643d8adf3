# %% [markdown]
# # Fine-tuning on a folder of images
#
# You have trained weights, and a folder of your own images, few of them: `own/{train,val}/CLASS/*.png`. This notebook
# starts from the weights in two ways, compares both with training from scratch on the same images, predicts a file, and
# exports the result. It runs on a CPU in a few minutes; `make notebooks` builds it from `fine_tuning.py`.
#
# To be complete it makes both itself, from the handwritten digits that scikit-learn ships: the weights are those of a
# model that learnt the digits 0 to 5, and the new images are digits that it has never seen, 6 to 9, with four training
# images of each.

# %%
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image
from sklearn.datasets import load_digits

import polaformer_jax as pf
from polaformer_jax.training import export, loop, metrics, recipes

logging.getLogger("absl").setLevel(logging.ERROR)  # checkpoints are talkative
folder = Path(tempfile.mkdtemp())
os.chdir(folder)
NAMES = "zero one two three four five six seven eight nine".split()

# %% [markdown]
# ## A folder of images
#
# One folder per split, one folder per class. Any size and any format that Pillow reads; these have 8x8 pixels, and are
# resized to the model's 32x32.

# %%
digits = load_digits()


def write_images(root, labels, train, val):
    for label in labels:
        images = digits.images[digits.target == label]
        for split, part in (("train", images[:train]), ("val", images[train : train + val])):
            place = Path(root, split, NAMES[label])
            place.mkdir(parents=True)
            for number, image in enumerate(part):
                Image.fromarray((image * 255 / 16).astype("uint8")).save(place / f"{number:03}.png")


write_images("others", labels=range(6), train=140, val=30)
write_images("own", labels=range(6, 10), train=4, val=100)
for split in ("train", "val"):
    print(split, {place.name: len(list(place.iterdir())) for place in sorted(Path("own", split).iterdir())})

# %% [markdown]
# ## Trained weights
#
# With official weights this part is not needed: `init.weights` takes the authors' `.pth` files as they are. Here, six
# epochs on the other digits. The settings that differ from the recipe are those of a small model on small images.


# %%
def settings(recipe, data, *, epochs, batch_size=32):
    config = recipes.load(recipe)
    with config.unlocked():
        config.data.source, config.data.name, config.data.data_dir, config.data.eval_split = "folder", data, data, "val"
        config.data.workers = 0
        config.model.num_classes = None  # as many as there are folders
        config.train.epochs, config.train.batch_size = epochs, batch_size
        config.optimizer.lr, config.optimizer.lr_base_batch = 1e-3, batch_size
        config.schedule.warmup = epochs / 10
        config.eval.every, config.eval.batch_size = epochs / 6, 100
        config.log.pictures = False
    return config


result = loop.train(settings("digits:pvt", "others", epochs=6.0), "pretraining")
export.export("pretraining", "others.safetensors")
print(f"{100 * result.evaluation.metrics['accuracy']:.1f} % of {result.evaluation.counted} images of the digits 0 to 5")

# %% [markdown]
# ## Three ways to train
#
# The recipe `finetune` has the official augmentation for photographs, from which digits need less: mirrored and mixed
# digits are none. `layer_decay` lets each layer learn more slowly than the one above it, here by the recipe's factor
# 0.85; `freeze_backbone` trains the classifier alone, which needs a larger learning rate.
#
# On the command line the second way is
#
#     polaformer train --config finetune:pola_pvt_nano --config.init.weights=others.safetensors \
#         --config.data.data_dir=own --workdir fine_tuned
#
# with one `--config.FIELD=VALUE` for each of the settings.


# %%
def own_settings():
    config = settings("finetune:pola_pvt_nano", "own", epochs=60.0, batch_size=16)
    with config.unlocked():
        config.model.dtype = "float32"  # CPUs have no fast bfloat16
        config.eval.resize = 32  # all of the image: digits have no margin to crop
        config.augment.crop_area = (0.6, 1.0)
        config.augment.flip = config.augment.mixup = config.augment.cutmix = config.augment.erase_prob = 0.0
        config.augment.rand_augment = None
    return config


scratch = own_settings()
scratch.optimizer.layer_decay = None

fine_tuned = own_settings()
fine_tuned.init.weights = "others.safetensors"

frozen = own_settings()
frozen.init.weights = "others.safetensors"
frozen.init.freeze_backbone, frozen.optimizer.layer_decay = True, None
frozen.optimizer.lr = 1e-2

results = {}
for name, config in {"from_scratch": scratch, "fine_tuned": fine_tuned, "frozen_backbone": frozen}.items():
    results[name] = loop.train(config, name)

# %% [markdown]
# The log tells what was changed to fit: the classifier of six classes was replaced by one of four, which starts at
# zero.
#
# ## Compare
#
# Scalars are read from the work directories, where TensorBoard finds them too.

# %%
figure, panel = plt.subplots(figsize=(8, 4), layout="constrained")
for name in results:
    steps, accuracy = metrics.read_scalars(name)["eval_accuracy"]
    panel.plot(steps, 100 * accuracy, marker="o", label=name.replace("_", " "))
panel.axhline(25, color="grey", linestyle=":", label="guessing")
panel.set(xlabel="step", ylabel="accuracy on 400 validation images (%)", ylim=(0, 100))
panel.legend()
for name, result in results.items():
    last = metrics.read_scalars(name)["eval_accuracy"][1][-1]
    print(f"{name:16} best checkpoint {100 * result.evaluation.metrics['accuracy']:.1f} %, last {100 * last:.1f} %")

# %% [markdown]
# The three end within two points of each other, less than the chance of 400 images and one seed: trained weights bring
# nothing here. Four images of each class are enough for digits so small and so clean, and the weights learnt from 840
# other digits, not from 1.3 million photographs as the authors' did. So make this comparison for your own data.
#
# The learning rates were chosen once and not tuned. The best checkpoint was chosen on the images that it is reported
# on: for a figure to publish, give the run a `data.test_split`.
#
# ## Export and predict
#
# The exported file knows its model, its classes, and how images are prepared for it. What it gets wrong is red.

# %%
export.export("fine_tuned", "own.safetensors")
files = [f"own/val/{name}/0{number:02}.png" for name in NAMES[6:] for number in (11, 42)]
command = [sys.executable, "-m", "polaformer_jax.cli", "predict", "--weights", "own.safetensors", "--json", *files]
answers = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
figure, panels = plt.subplots(1, len(files), figsize=(12, 2.1), layout="constrained")
for panel, answer in zip(panels, answers, strict=True):
    best = answer["predictions"][0]
    panel.imshow(Image.open(answer["image"]), cmap="gray")
    right = best["name"] == Path(answer["image"]).parent.name
    text = f"{best['name']}\n{100 * best['probability']:.0f} %"
    panel.set_title(text, fontsize=10, color="black" if right else "firebrick")
    panel.axis("off")

# %% [markdown]
# For PyTorch, the same weights in the official layout, which `load_state_dict(strict=True)` of the authors' model
# takes:

# %%
model = pf.create_model(weights="own.safetensors")
pf.save_weights(model, "own_for_torch.safetensors", layout="torch")
print(*sorted(path.name for path in Path().glob("*.safetensors")))
