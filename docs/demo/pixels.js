// From a picked file to the model's pixels: for opaque images the same, bit for bit, as `pf.preprocess` computes in Python.
// (A canvas does not keep the colours of transparent pixels exactly.)
//
// The model was evaluated on images that Pillow resized. A browser's own resizing gives other pixels, so this is
// Pillow's bicubic resampling, as polaformer_jax/data/images/resampling.py has it: antialiased, with weights of 22 bits,
// first along rows, then along columns, rounded to 8 bits after each pass.

const BITS = 22;
const HALF = 2 ** (BITS - 1);
const SHARPNESS = -0.5; // the parameter a of the cubic kernel

/** For each of `after` pixels of a line of `before`: where its window begins, and its weights. */
function windows(before, after) {
  const scale = before / after;
  const stretch = Math.max(scale, 1);
  const support = 2 * stretch;
  return Array.from({ length: after }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - support + 0.5), 0);
    const count = Math.min(Math.trunc(centre + support + 0.5), before) - first;
    const kernel = Array.from({ length: count }, (_, k) => cubic(Math.abs((k + first - centre + 0.5) * (1 / stretch))));
    const total = kernel.reduce((sum, value) => sum + value, 0);
    const weights = kernel.map((value) => {
      const weight = (value / total) * 2 ** BITS;
      return Math.trunc(weight < 0 ? weight - 0.5 : weight + 0.5);
    });
    return { first, weights };
  });
}

function cubic(x) {
  if (x < 1) return ((SHARPNESS + 2) * x - (SHARPNESS + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * SHARPNESS;
  return 0;
}

/** Resizes each row: `rows` x `before` pixels of 3 bytes become `rows` x `after`. */
function resizeRows(pixels, rows, before, after) {
  if (before === after) return pixels;
  const out = new Uint8Array(rows * after * 3);
  windows(before, after).forEach(({ first, weights }, i) => {
    for (let row = 0; row < rows; row++) {
      for (let channel = 0; channel < 3; channel++) {
        let total = HALF;
        let at = (row * before + first) * 3 + channel;
        for (const weight of weights) {
          total += pixels[at] * weight;
          at += 3;
        }
        out[(row * after + i) * 3 + channel] = Math.min(Math.max(Math.floor(total / 2 ** BITS), 0), 255);
      }
    }
  });
  return out;
}

function transposed(pixels, height, width) {
  const out = new Uint8Array(pixels.length);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      for (let channel = 0; channel < 3; channel++) {
        out[(x * height + y) * 3 + channel] = pixels[(y * width + x) * 3 + channel];
      }
    }
  }
  return out;
}

/** RGB bytes (height, width, 3) -> (size, size, 3), bicubic; the aspect ratio is not kept. */
export function resize(pixels, height, width, size) {
  const columns = transposed(resizeRows(pixels, height, width, size), height, size);
  return transposed(resizeRows(columns, size, height, size), size, size);
}

/** The central (crop, crop, 3) of (size, size, 3); halves are rounded to even numbers, as Python does. */
export function centerCrop(pixels, size, crop) {
  const half = (size - crop) / 2;
  const start = half % 1 === 0.5 ? 2 * Math.round(half / 2) : Math.round(half);
  const out = new Uint8Array(crop * crop * 3);
  for (let y = 0; y < crop; y++) {
    const from = ((y + start) * size + start) * 3;
    out.set(pixels.subarray(from, from + crop * 3), y * crop * 3);
  }
  return out;
}

/** The bytes of a JPEG file without its segments of Exif (APP1), which may ask to turn the image; others as they are. */
function withoutExif(bytes) {
  if (bytes[0] !== 0xff || bytes[1] !== 0xd8) return bytes;
  const kept = [bytes.subarray(0, 2)];
  let at = 2;
  while (at + 4 <= bytes.length && bytes[at] === 0xff && bytes[at + 1] !== 0xda) {
    const next = at + 2 + 256 * bytes[at + 2] + bytes[at + 3];
    if (bytes[at + 1] !== 0xe1) kept.push(bytes.subarray(at, next));
    at = next;
  }
  const out = new Uint8Array([...kept, bytes.subarray(at)].reduce((sum, part) => sum + part.length, 0));
  let end = 0;
  for (const part of [...kept, bytes.subarray(at)]) {
    out.set(part, end);
    end += part.length;
  }
  return out;
}

/** A file, or any other blob with an image -> what the model takes. Throws if the browser cannot decode it. */
export async function prepared(blob, { resize: size, crop }) {
  // As stored: neither turned by what a camera noted, nor converted to the screen's colours.
  const stored = new Blob([withoutExif(new Uint8Array(await blob.arrayBuffer()))], { type: blob.type });
  const bitmap = await createImageBitmap(stored, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const rgba = context.getImageData(0, 0, width, height).data;
  const rgb = new Uint8Array(width * height * 3);
  for (let i = 0; i < width * height; i++) {
    for (let channel = 0; channel < 3; channel++) rgb[3 * i + channel] = rgba[4 * i + channel];
  }
  return centerCrop(resize(rgb, height, width, size), size, crop);
}
