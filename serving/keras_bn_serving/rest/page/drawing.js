// A picture that is drawn, chosen from a file, dropped, or one of the model's examples.

import { element, styled } from "./dom.js";

// Height, width and channels of an input that is a picture of fixed size, else null.
export function pictureSize(spec) {
  const [, height, width, channels = 1] = spec.shape ?? [];
  const rank = spec.shape?.length;
  const isPicture = (rank === 4 || rank === 3) && height > 1 && width > 1 && (rank === 3 || channels === 1 || channels === 3);
  return isPicture && spec.dtype !== "string" ? { height, width, channels, rank } : null;
}

export const isFraction = (spec) => /float|double|half/.test(spec.dtype);

// What black and white are sent as: of whole numbers a byte, of others what the examples look like.
function levels(spec, examples) {
  if (!isFraction(spec)) return spec.dtype === "int8" ? { black: -128, white: 127, step: 1 } : { black: 0, white: 255, step: 1 };
  const values = examples.flat(Infinity);
  const most = values.reduce((a, b) => Math.max(a, b), 1);
  const least = values.reduce((a, b) => Math.min(a, b), 0);
  return { black: least < 0 ? -1 : 0, white: most > 2 ? 255 : 1, step: 1e-4 };
}

export function pictureField(name, spec, size, examples, problem) {
  const { width, height } = size;
  const scale = levels(spec, examples);
  const canvas = element("canvas", { width, height, tabIndex: 0, id: `input-${name}` });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${name}: draw with the mouse, a finger, or the keys`);
  canvas.setAttribute("aria-describedby", `keys-${name}`);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  let isEmpty = true;
  let exact = null; // An example as it is, until it is drawn on.
  const changed = () => { isEmpty = false; exact = null; };
  const clear = () => {
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    isEmpty = true;
    exact = null;
  };
  clear();

  const brush = Math.max(1, width / 10);
  let last = null;
  const stroke = (x, y) => {
    Object.assign(context, { strokeStyle: "#fff", lineCap: "round", lineJoin: "round", lineWidth: brush });
    context.beginPath();
    context.moveTo(...(last ?? [x, y]));
    context.lineTo(x + 0.01, y);
    context.stroke();
    last = [x, y];
    changed();
  };
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * width / box.width, (event.clientY - box.top) * height / box.height];
  };
  canvas.onpointerdown = (event) => {
    canvas.classList.remove("keys");
    canvas.setPointerCapture(event.pointerId);
    last = null;
    stroke(...place(event));
  };
  canvas.onpointermove = (event) => { if (event.buttons) stroke(...place(event)); };

  const pen = styled(element("div", { className: "pen" }), { width: `${100 * brush / width}%`, height: `${100 * brush / height}%` });
  const where = element("output", { className: "where" });
  const pace = Math.max(1, Math.round(width / 28));
  let at = [Math.floor(width / 2), Math.floor(height / 2)];
  const point = () => {
    styled(pen, { left: `${100 * (at[0] + 0.5) / width}%`, top: `${100 * (at[1] + 0.5) / height}%` });
    where.value = `column ${at[0] + 1}, row ${at[1] + 1}`;
  };
  point();
  canvas.onkeydown = (event) => {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] };
    if (!(event.key in steps)) return;
    event.preventDefault();
    canvas.classList.add("keys");
    const draws = event.key === " " || event.shiftKey;
    last = draws && event.key !== " " ? [at[0] + 0.5, at[1] + 0.5] : null;
    const [right, down] = steps[event.key];
    at = [Math.min(Math.max(at[0] + right * pace, 0), width - 1), Math.min(Math.max(at[1] + down * pace, 0), height - 1)];
    point();
    if (draws) stroke(at[0] + 0.5, at[1] + 0.5);
  };

  const take = async (file) => {
    try {
      context.drawImage(await createImageBitmap(file), 0, 0, width, height);
      changed();
    } catch (error) {
      problem(`“${file.name}” is not a picture that this browser can read.`);
    }
  };
  canvas.ondragover = (event) => { event.preventDefault(); canvas.classList.add("over"); };
  canvas.ondragleave = () => canvas.classList.remove("over");
  canvas.ondrop = (event) => {
    event.preventDefault();
    canvas.classList.remove("over");
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  };
  const invert = () => {
    const image = context.getImageData(0, 0, width, height);
    for (let byte = 0; byte < image.data.length; byte++) if (byte % 4 !== 3) image.data[byte] = 255 - image.data[byte];
    context.putImageData(image, 0, 0);
    changed();
  };
  const file = element("input", { type: "file", accept: "image/*", onchange: () => file.files.length && take(file.files[0]) });
  file.setAttribute("aria-label", `${name}: choose a picture file`);
  const node = element("div", { className: "picture" },
    element("div", { className: "board" }, canvas, pen),
    element("div", { className: "tools" },
      element("label", { className: "button" }, "Open a picture", file),
      element("button", { type: "button", onclick: clear }, "Clear"),
      element("button", { type: "button", onclick: invert }, "Invert")),
    element("p", { className: "quiet" }, `Draw, or drop a picture: it is scaled to ${width} × ${height} and sent as numbers from ${scale.black} to ${scale.white}.`),
    element("p", { className: "quiet help", id: `keys-${name}` }, "Arrow keys move the pen, with Shift they draw, Space makes a dot. ", where));
  return {
    node,
    read() {
      if (isEmpty) throw new Error(`“${name}” is empty: draw something, or choose a picture, first.`);
      return JSON.stringify([exact ?? pixels(context, size, scale)]);
    },
    take(value) {
      context.putImageData(image(value, size, scale), 0, 0);
      isEmpty = false;
      exact = value;
    },
    glance: () => canvas.toDataURL(),
  };
}

// What an example looks like.
export function thumbnail(value, spec, size, examples) {
  const canvas = element("canvas", { width: size.width, height: size.height });
  canvas.getContext("2d").putImageData(image(value, size, levels(spec, examples)), 0, 0);
  return element("img", { src: canvas.toDataURL(), alt: "" });
}

function image(value, { width, height }, { black, white }) {
  const made = new ImageData(width, height);
  const flat = value.flat(Infinity);
  const channels = flat.length / (width * height);
  for (let pixel = 0; pixel < width * height; pixel++) {
    for (let channel = 0; channel < 3; channel++) {
      const level = flat[pixel * channels + (channels === 3 ? channel : 0)];
      made.data[4 * pixel + channel] = 255 * (level - black) / (white - black);
    }
    made.data[4 * pixel + 3] = 255;
  }
  return made;
}

function pixels(context, { width, height, channels, rank }, { black, white, step }) {
  const { data } = context.getImageData(0, 0, width, height);
  const level = (byte) => Number((Math.round((black + byte / 255 * (white - black)) / step) * step).toFixed(4));
  return Array.from({ length: height }, (_, y) => Array.from({ length: width }, (_, x) => {
    const [red, green, blue] = data.subarray((y * width + x) * 4);
    const grey = 0.299 * red + 0.587 * green + 0.114 * blue;
    return channels === 3 ? [red, green, blue].map(level) : rank === 4 ? [level(grey)] : level(grey);
  }));
}
