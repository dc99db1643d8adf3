// Classifies a picked image in the browser, and shows where one block of the model looks.

import * as ort from "./ort/ort.wasm.min.mjs";
import { prepared } from "./pixels.js";

const SHOWN = 5; // classes
const RAMP = [[0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21], [250, 193, 39], [252, 255, 164]];

ort.env.wasm.numThreads = 1; // more would need headers that static servers do not send
ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;

const $ = (id) => document.getElementById(id);
const loaded = load();

async function load() {
  const [description, session] = await Promise.all([
    fetch("model.json").then((response) => (response.ok ? response.json() : Promise.reject(missing("model.json", response)))),
    fetch("model.onnx")
      .then((response) => (response.ok ? response.arrayBuffer() : Promise.reject(missing("model.onnx", response))))
      .then((content) => ort.InferenceSession.create(content, { executionProviders: ["wasm"] })),
  ]);
  const size = description.preprocess.crop;
  $("model").textContent = `${description.model}, ${size} x ${size} pixels, ${description.classes?.length ?? "unnamed"} classes`;
  return { description, session };
}

function missing(name, response) {
  return new Error(`${name} cannot be loaded (${response.status}): build the page's files as docs/deployment.md says`);
}

/** Classifies an image and shows the answer. */
async function classify(blob) {
  state("busy", "Computing ...");
  try {
    const { description, session } = await loaded;
    const size = description.preprocess.crop;
    const pixels = await prepared(blob, description.preprocess);
    const began = performance.now();
    const results = await session.run({ images: new ort.Tensor("uint8", pixels, [1, size, size, 3]) });
    const seconds = (performance.now() - began) / 1000;
    showImage($("seen"), pixels, size);
    showClasses(results.probabilities.data, description.classes);
    const maps = ["same", "opposite"].map((name) => results[name]);
    const values = maps.flatMap((map) => Array.from(map.data));
    const [low, high] = [Math.min(...values), Math.max(...values)];
    for (const [i, name] of ["same", "opposite"].entries()) showMap($(name), pixels, size, maps[i], low, high);
    $("scale").textContent = `weights from ${low.toFixed(2)} (dark) to ${high.toFixed(2)} (bright), 1 is uniform`;
    $("answer").hidden = false;
    window.answer = {
      pixels: Array.from(pixels),
      probabilities: Array.from(results.probabilities.data),
      maps: maps.map((map) => Array.from(map.data)),
    };
    state("done", `${seconds.toFixed(2)} s on this machine; the image did not leave it.`);
  } catch (error) {
    $("answer").hidden = true;
    const undecoded = error.name === "InvalidStateError";
    state("failed", undecoded ? "This file is no image that the browser can decode." : `It failed: ${error.message}`);
  }
}

function state(name, text) {
  document.body.dataset.state = name;
  $("state").textContent = text;
}

function showImage(canvas, pixels, size) {
  canvas.width = canvas.height = size;
  const data = new ImageData(size, size);
  for (let i = 0; i < size * size; i++) {
    data.data.set([pixels[3 * i], pixels[3 * i + 1], pixels[3 * i + 2], 255], 4 * i);
  }
  canvas.getContext("2d").putImageData(data, 0, 0);
}

/** The grey image under the colours of a map; each weight is one flat square. */
function showMap(canvas, pixels, size, map, low, high) {
  canvas.width = canvas.height = size;
  const side = map.dims[1];
  const data = new ImageData(size, size);
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      const i = y * size + x;
      const grey = 64 + (pixels[3 * i] + pixels[3 * i + 1] + pixels[3 * i + 2]) / 6;
      const value = map.data[Math.floor((y * side) / size) * side + Math.floor((x * side) / size)];
      const rgb = colour((value - low) / Math.max(high - low, 0.02)).map((c) => 0.75 * c + 0.25 * grey);
      data.data.set([...rgb, 255], 4 * i);
    }
  }
  canvas.getContext("2d").putImageData(data, 0, 0);
}

function colour(share) {
  const position = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
  const below = Math.min(Math.floor(position), RAMP.length - 2);
  return RAMP[below].map((c, i) => c + (RAMP[below + 1][i] - c) * (position - below));
}

function showClasses(probabilities, names) {
  const order = Array.from(probabilities.keys()).sort((a, b) => probabilities[b] - probabilities[a]);
  $("classes").replaceChildren(
    ...order.slice(0, SHOWN).map((label) => {
      const row = document.createElement("tr");
      const percent = 100 * probabilities[label];
      const cells = [names?.[label] ?? `class ${label}`, `${percent.toFixed(1)} %`].map((text) => {
        const cell = document.createElement("td");
        cell.textContent = text; // never as HTML: names come with the model
        return cell;
      });
      const bar = document.createElement("td");
      bar.className = "bar";
      bar.style.setProperty("--share", `${percent}%`);
      row.append(...cells, bar);
      return row;
    }),
  );
}

$("file").addEventListener("change", (event) => event.target.files[0] && classify(event.target.files[0]));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files[0]) classify(event.dataTransfer.files[0]);
});
loaded.then(
  () => state("ready", "Pick an image, or drop one here."),
  (error) => state("failed", error.message),
);
