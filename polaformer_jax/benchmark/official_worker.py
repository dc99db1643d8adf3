"""A process that times the official PyTorch code: started by `official.py`, with any Python that has PyTorch.

    python official_worker.py CHECKOUT

Imports nothing of this package. Reads lines of JSON from standard input and answers each with a line: first what to
build; then names of modes, each of which is run once and timed. Ends when its input does.
"""

import functools
import importlib
import json
import os
import sys
import time

CLASSES = {
    "PolaPVT": ("pola_pvt", "PyramidVisionTransformer"),
    "PolaSwin": ("pola_swin", "PolaSwinTransformer"),
    "PolaPP": ("pola", "POLA"),
}

# Arguments of our models that the official ones, which always have polarity, gate and convolution, do not take.
OURS_ALONE = ("attention", "convolution", "gate")


def build(given):
    """The official class with our model's arguments, whose names are the same, and additional ones that it needs."""
    import torch

    module, name = CLASSES[given["family"]]
    arguments = {name: value for name, value in given["arguments"].items() if name not in OURS_ALONE}
    if given["family"] == "PolaPVT":
        arguments["patch_size"] = 4
        arguments["norm_layer"] = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    elif given["family"] == "PolaPP":
        arguments.pop("img_size")
        arguments["flagss"] = [list(word) for word in arguments.pop("flags")]
    else:
        arguments.pop("softmax_window_size")  # which the official class takes from the window
        arguments.pop("padded_windows")
    return getattr(importlib.import_module("models." + module), name)(**arguments)


def make_runs(given):
    """The timed functions, by mode."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(given["threads"])
    torch.set_float32_matmul_precision("high")  # on CUDA as JAX multiplies there; on CPUs it changes nothing
    device, size, batch = given["device"], given["arguments"]["img_size"], given["batch"]
    model = build(given).to(device)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(0, given["arguments"]["num_classes"], (batch,), device=device)
    run = torch.compile(model) if given["compiled"] else model
    autocast = functools.partial(
        torch.autocast, device_type=device, dtype=torch.bfloat16, enabled=given["dtype"] == "bfloat16"
    )

    def forward():
        model.eval()
        with torch.no_grad(), autocast():
            run(images)

    def gradient():
        model.train()
        model.zero_grad(set_to_none=True)
        with autocast():
            loss = torch.nn.functional.cross_entropy(run(images), labels)
        loss.backward()

    return {"forward": forward, "gradient": gradient}


def timed(run, device):
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def prepare(given):
    """Builds the model and calls everything twice. The first call counts as compiling, if anything is compiled."""
    import torch

    runs = make_runs(given)
    first, memory = {}, {}
    for mode in given["modes"]:
        cuda = given["device"] == "cuda"
        first[mode] = timed(runs[mode], given["device"])
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        timed(runs[mode], given["device"])
        memory[mode] = torch.cuda.max_memory_allocated() if cuda else None
    compile_s = first if given["compiled"] else dict.fromkeys(first)
    return runs, {"compile_s": compile_s, "memory": memory, "version": torch.__version__}


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imported code prints is not an answer
    sys.path[0] = sys.argv[1]  # in place of this folder
    given = json.loads(sys.stdin.readline())
    try:
        runs, answer = prepare(given)
        print(json.dumps(answer), file=answers, flush=True)
        for line in sys.stdin:
            seconds = timed(runs[json.loads(line)], given["device"])
            print(json.dumps({"seconds": seconds}), file=answers, flush=True)
    except Exception as error:  # whatever the official code, PyTorch and timm raise is reported
        message = f"{type(error).__name__}: {error}"
        print(json.dumps({"error": message}), file=answers, flush=True)


if __name__ == "__main__":
    main()
