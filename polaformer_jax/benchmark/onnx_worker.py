"""A process that exports a model and times it in ONNX Runtime: started by `onnx.py`, with a Python of the extra `onnx`.

Reads lines of JSON from standard input and answers each with a line, as `workers.Worker` expects it.
"""

import json
import os
import sys
import tempfile
import time


def prepare(given):
    """Writes the model to a file, loads it and runs it twice."""
    import jax.numpy as jnp
    import numpy as np
    import onnxruntime
    from flax import nnx

    import polaformer_jax as pf
    from polaformer_jax.export import onnx_file

    model = pf.create_model(given["model"], **given["arguments"], rngs=nnx.Rngs(0))
    size = given["arguments"]["img_size"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = given["threads"]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        inputs = {"images": (("batch", size, size, 3), jnp.float32)}
        weights = pf.weights.flatten(nnx.to_pure_dict(nnx.state(model)))
        onnx_file.write(lambda images: model(images), inputs, path, outputs=["logits"], weights=weights, metadata={})
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).standard_normal((given["batch"], size, size, 3), np.float32)

    def run():
        session.run(None, {"images": images})

    run()
    run()
    return run, {"compile_s": {"forward": None}, "memory": {"forward": None}, "version": onnxruntime.__version__}


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imported code prints is not an answer
    sys.path.pop(0)  # this folder, whose `onnx.py` would be taken for the package
    given = json.loads(sys.stdin.readline())
    try:
        run, answer = prepare(given)
        print(json.dumps(answer), file=answers, flush=True)
        for _ in sys.stdin:
            began = time.perf_counter()
            run()
            print(json.dumps({"seconds": time.perf_counter() - began}), file=answers, flush=True)
    except Exception as error:  # whatever is raised is reported
        message = f"{type(error).__name__}: {error}"
        print(json.dumps({"error": message}), file=answers, flush=True)


if __name__ == "__main__":
    main()
