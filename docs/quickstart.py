# %% [markdown]
# # A quick start
#
# Create a model, train and load weights, predict, look at what it attends to, fine-tune, save, load back. It runs on a
# CPU in a few minutes, on the handwritten digits that scikit-learn ships. `make notebooks` builds it from
# `quickstart.py`.

# %%
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import polaformer_jax as pf
from polaformer_jax.data import sources
from polaformer_jax.data.images import transforms
from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.training import export, loop, recipes

logging.getLogger("absl").setLevel(logging.ERROR)  # checkpoints are talkative
folder = Path(tempfile.mkdtemp())
pf.list_models()

# %% [markdown]
# ## Create
#
# A model has fresh weights, and takes normalised images, channels last.

# %%
model = pf.create_model("pola_pvt_nano", num_classes=10, rngs=nnx.Rngs(0))
images = jnp.zeros((1, 32, 32, 3))
print(model(images).shape, [features.shape for features in model.features(images)])

# %% [markdown]
# ## Train
#
# What `make train` does, cut short: three epochs. The same function runs on ImageNet and on a pod.

# %%
command = [sys.executable, "-m", "polaformer_jax.cli", "prepare", "sklearn_digits", "--data-dir", str(folder / "data")]
subprocess.run(command, check=True, capture_output=True)
config = recipes.load("digits:pvt,epochs=3.0")
config.data.data_dir = str(folder / "data")
config.data.workers = 0
config.log.pictures = False
result = loop.train(config, folder / "run")
print(f"{100 * result.evaluation.metrics['accuracy']:.1f} % of {result.evaluation.counted} test images")

# %% [markdown]
# ## Load
#
# A file of weights knows its model. The authors' checkpoints are read as they are, without PyTorch:
# `pf.create_model(weights="pola_swin_t.pth")`.

# %%
export.export(folder / "run", folder / "digits.safetensors")
model = pf.create_model(weights=folder / "digits.safetensors")
file = pf.weights.read_file(folder / "digits.safetensors")
print(type(model).__name__, "with", len(file.tensors), "tensors;", file.metadata["facts"])

# %% [markdown]
# ## Predict
#
# From the command line: `polaformer predict --weights digits.safetensors IMAGE...`

# %%
source = sources.open_source(config.data, "test")
transform = transforms.EvalImageTransform(resize=32, crop=32, num_classes=10)
pixels = np.stack([transform(source[index])["image"] for index in range(8)])  # (8, 32, 32, 3) uint8
inputs = normalise(jnp.asarray(pixels))
probabilities = jax.nn.softmax(nnx.jit(model)(inputs))
figure, panels = plt.subplots(1, 8, figsize=(12, 2))
for panel, image, row in zip(panels, pixels, probabilities, strict=True):
    panel.imshow(image)
    panel.set_title(f"{row.argmax()}  ({100 * row.max():.0f} %)", fontsize=10)
    panel.axis("off")

# %% [markdown]
# ## Look at attention
#
# A linear block never forms its attention weights, but they exist: `attention_maps` recovers them from the block's own
# queries and keys, for the same-signed and the opposite-signed stream apart. Here: where the token in the middle looks.

# %%
token = (3, 4)  # row and column on the grid of 8x8 tokens
maps = pf.attention_maps(model, inputs[:4], stage=0, token=token)
figure, panels = plt.subplots(3, 4, figsize=(10, 8.5), layout="constrained")
for column in range(4):
    panels[0, column].imshow(pixels[column])
    box = plt.Rectangle((4 * token[1] - 0.5, 4 * token[0] - 0.5), 4, 4, fill=False, color="deepskyblue", linewidth=2)
    panels[0, column].add_patch(box)
    for row, name in enumerate(("same", "opposite"), start=1):
        stream = maps.streams[name]
        panels[row, column].imshow(stream.weights[column].mean(0), cmap="inferno")
        entropy = f"entropy {stream.entropy[column].mean():.2f} of {maps.uniform_entropy:.2f} nats"
        panels[row, column].set_title(f"{name}-signed\n{entropy}", fontsize=9)
for panel in panels.flat:
    panel.axis("off")

# %% [markdown]
# ## Fine-tune
#
# For images of another size the position tables are resized; everything that changes to fit is reported. (For other
# images: [Fine-tuning on a folder of images](fine_tuning.ipynb).)

# %%
larger = pf.create_model(weights=folder / "digits.safetensors", img_size=64)

# %%
config = recipes.load("digits:pvt,epochs=2.0")
with config.unlocked():
    config.data.data_dir, config.data.workers = str(folder / "data"), 0
    config.model.img_size = config.eval.resize = config.eval.crop = 64
    config.init.weights = str(folder / "digits.safetensors")
    config.schedule.warmup, config.log.pictures = 0.5, False
logging.getLogger("polaformer_jax").setLevel(logging.ERROR)  # the same changes again
result = loop.train(config, folder / "fine_tuned")
print(f"{100 * result.evaluation.metrics['accuracy']:.1f} % of {result.evaluation.counted} test images at 64x64")

# %% [markdown]
# ## Save and load back
#
# In our layout, or in the official one, which PyTorch's `load_state_dict(strict=True)` takes.

# %%
export.export(folder / "fine_tuned", folder / "fine_tuned.safetensors")
tuned = pf.create_model(weights=folder / "fine_tuned.safetensors")
pf.save_weights(tuned, folder / "for_torch.safetensors", layout="torch")
back = pf.create_model(weights=folder / "for_torch.safetensors")
same = jax.tree.map(lambda a, b: bool((a == b).all()), nnx.state(tuned), nnx.state(back))
print(len(jax.tree.leaves(same)), "tensors, all equal:", all(jax.tree.leaves(same)))
