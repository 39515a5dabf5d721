// The page: lists the models, builds a form from a signature, asks, and shows the answer.
"use strict";

const byId = (id) => document.getElementById(id);
const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

let models = [];
let model = null;
let readers = {}; // For each input of the form, a function that returns what to send.

async function start() {
  try {
    models = (await (await fetch("/page/models")).json()).models;
  } catch (error) {
    byId("summary").textContent = "The server does not answer. Is it still running?";
    return;
  }
  const count = models.length === 1 ? "1 model" : `${models.length} models`;
  byId("summary").textContent = `${count} at ${location.host}`;
  byId("models").replaceChildren(...models.map(listItem));
  if (model === null && models.length) choose(models[0]);
}

function listItem(one) {
  const labels = Object.entries(one.labels).map(([label, version]) => `${label} → ${version}`).join(", ");
  const lines = one.versions.map((each) => element("small", { title: each.error_message },
    `version ${each.version} `, element("span", { className: `state ${each.state}` }, each.state),
    each.error_message ? ` ${each.error_message}` : ""));
  const button = element("button", { type: "button", onclick: () => choose(one) }, element("strong", {}, one.name), ...lines);
  if (labels) button.append(element("small", {}, `labels: ${labels}`));
  button.dataset.model = one.name;
  return element("li", {}, button);
}

function choose(one) {
  model = one;
  for (const button of document.querySelectorAll("nav button")) {
    button.setAttribute("aria-current", String(button.dataset.model === one.name));
  }
  byId("work").hidden = false;
  byId("model-title").textContent = one.name;
  const usable = one.versions.filter((each) => each.state === "AVAILABLE");
  byId("version").replaceChildren(...usable.map((each) => new Option(each.version)));
  chooseVersion();
}

function chooseVersion() {
  const chosen = byId("signature").value;
  const names = Object.keys(version()?.signatures ?? {});
  names.sort((a, b) => (b === "serving_default") - (a === "serving_default") || a.localeCompare(b));
  byId("signature").replaceChildren(...names.map((name) => new Option(name)));
  if (names.includes(chosen)) byId("signature").value = chosen;
  chooseSignature();
}

function chooseSignature() {
  readers = {};
  clearAnswer();
  const inputs = signature()?.inputs ?? {};
  byId("inputs").replaceChildren(...Object.entries(inputs).map(([name, spec]) => field(name, spec)));
  byId("ask").disabled = !Object.keys(inputs).length;
}

const version = () => model.versions.find((each) => each.version === byId("version").value);
const signature = () => version()?.signatures[byId("signature").value];

function shapeText(spec) {
  return spec.shape === null ? "any shape" : `[${spec.shape.map((size) => (size < 0 ? "any" : size)).join(", ")}]`;
}

function pictureSize(spec) {
  const [, height, width, channels = 1] = spec.shape ?? [];
  const rank = spec.shape?.length;
  const isPicture = (rank === 4 || rank === 3) && height > 1 && width > 1 && (rank === 3 || channels === 1 || channels === 3);
  return isPicture && spec.dtype !== "string" ? { height, width, channels, rank } : null;
}

function field(name, spec) {
  const size = pictureSize(spec);
  const box = element("fieldset", {}, element("legend", {}, `${name}: ${spec.dtype} ${shapeText(spec)}`));
  if (size) box.append(pictureField(name, spec, size));
  else if (spec.dtype === "string" && /image|picture|png|jpe?g|bytes/i.test(name)) box.append(fileField(name));
  else box.append(textField(name, spec));
  return box;
}

function textField(name, spec) {
  const example = (spec.shape ?? []).reduceRight((inner, size) => Array(Math.min(size < 0 ? 1 : size, 8)).fill(inner),
    spec.dtype === "string" ? "text" : spec.dtype === "bool" ? true : spec.dtype === "float" || spec.dtype === "double" ? 0.5 : 1);
  const area = element("textarea", { id: `input-${name}`, value: JSON.stringify(example), spellcheck: false });
  area.setAttribute("aria-label", `${name}, as JSON`);
  readers[name] = () => {
    try {
      return JSON.parse(area.value);
    } catch (error) {
      area.focus();
      throw new Error(`What you wrote for “${name}” cannot be read: ${error.message}.\nWrite ${spec.dtype} values of shape ${shapeText(spec)} as a JSON list, for example ${JSON.stringify(example)}.`);
    }
  };
  return area;
}

function fileField(name) {
  const input = element("input", { type: "file", accept: "image/*", id: `input-${name}` });
  input.setAttribute("aria-label", `${name}, a picture file`);
  readers[name] = async () => {
    if (!input.files.length) throw new Error(`Choose a picture for “${name}” first.`);
    const bytes = new Uint8Array(await input.files[0].arrayBuffer());
    return [{ b64: btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join("")) }];
  };
  return input;
}

function pictureField(name, spec, size) {
  const canvas = element("canvas", { width: size.width, height: size.height, tabIndex: 0, id: `input-${name}` });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${name}: draw with the mouse, a finger, or the arrow keys and the space bar`);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  let drawn = false;
  const clear = () => { context.fillStyle = "#000"; context.fillRect(0, 0, size.width, size.height); drawn = false; };
  clear();
  context.strokeStyle = context.fillStyle = "#fff";
  context.lineCap = context.lineJoin = "round";
  const brush = () => Math.max(1, size.width / 10);
  let last = null;
  const stroke = (x, y) => {
    context.lineWidth = brush();
    context.beginPath();
    context.moveTo(...(last ?? [x, y]));
    context.lineTo(x + 0.01, y);
    context.stroke();
    last = [x, y];
    drawn = true;
  };
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * size.width / box.width, (event.clientY - box.top) * size.height / box.height];
  };
  canvas.onpointerdown = (event) => { canvas.setPointerCapture(event.pointerId); last = null; stroke(...place(event)); };
  canvas.onpointermove = (event) => { if (event.buttons) stroke(...place(event)); };
  let cursor = [size.width / 2, size.height / 2];
  canvas.onkeydown = (event) => {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] };
    if (!(event.key in steps)) return;
    event.preventDefault();
    cursor = cursor.map((at, axis) => Math.min(Math.max(at + steps[event.key][axis], 0), [size.width, size.height][axis] - 1));
    last = null;
    if (event.key === " " || event.shiftKey) stroke(...cursor);
  };
  const show = async (file) => {
    try {
      const picture = await createImageBitmap(file);
      context.drawImage(picture, 0, 0, size.width, size.height);
      drawn = true;
    } catch (error) {
      problem(`“${file.name}” is not a picture that this browser can read.`);
    }
  };
  canvas.ondragover = (event) => { event.preventDefault(); canvas.classList.add("over"); };
  canvas.ondragleave = () => canvas.classList.remove("over");
  canvas.ondrop = (event) => {
    event.preventDefault();
    canvas.classList.remove("over");
    if (event.dataTransfer.files.length) show(event.dataTransfer.files[0]);
  };
  const invert = () => {
    const image = context.getImageData(0, 0, size.width, size.height);
    for (let at = 0; at < image.data.length; at++) if (at % 4 !== 3) image.data[at] = 255 - image.data[at];
    context.putImageData(image, 0, 0);
  };
  readers[name] = () => {
    if (!drawn) throw new Error(`“${name}” is empty: draw something, or drop a picture on it, first.`);
    return [pixels(context, spec, size)];
  };
  const file = element("input", { type: "file", accept: "image/*", onchange: (event) => event.target.files.length && show(event.target.files[0]) });
  file.setAttribute("aria-label", `${name}: choose a picture file`);
  return element("div", { className: "picture" }, canvas, element("div", {},
    element("p", {}, `Draw here, or drop a picture; it is scaled to ${size.width} × ${size.height} and sent as numbers from 0 to ${spec.dtype === "float" || spec.dtype === "double" ? "1" : "255"}.`),
    file, element("p", {},
      element("button", { type: "button", onclick: clear }, "Clear"), " ",
      element("button", { type: "button", onclick: invert }, "Invert"))));
}

function pixels(context, spec, size) {
  const { data } = context.getImageData(0, 0, size.width, size.height);
  const value = (byte) => (spec.dtype === "float" || spec.dtype === "double" ? Math.round(byte / 255 * 1e4) / 1e4 : Math.round(byte));
  const rows = [];
  for (let y = 0; y < size.height; y++) {
    const row = [];
    for (let x = 0; x < size.width; x++) {
      const [red, green, blue] = data.slice((y * size.width + x) * 4);
      const grey = 0.299 * red + 0.587 * green + 0.114 * blue;
      row.push(size.channels === 3 ? [red, green, blue].map(value) : size.rank === 4 ? [value(grey)] : value(grey));
    }
    rows.push(row);
  }
  return rows;
}

async function ask(event) {
  event.preventDefault();
  clearAnswer();
  const outputs = signature().outputs;
  const path = `/v1/models/${encodeURIComponent(model.name)}/versions/${version().version}:predict`;
  let body;
  try {
    const inputs = {};
    for (const [name, read] of Object.entries(readers)) inputs[name] = await read();
    body = JSON.stringify({ signature_name: byId("signature").value, inputs });
  } catch (error) {
    problem(error.message);
    return;
  }
  const began = performance.now();
  let response, text;
  try {
    response = await fetch(path, { method: "POST", body });
    text = await response.text();
  } catch (error) {
    problem("The server does not answer. Is it still running?");
    return;
  }
  const elapsed = performance.now() - began;
  // The protocol writes NaN and Infinity bare, which JSON does not know.
  const answer = JSON.parse(text.replace(/(?<=[\s[:,])(-?Infinity|NaN)(?=[\s,\]}])/g, '"$1"') || "{}");
  if (!response.ok) {
    problem(inWords(response.status, answer.error ?? ""));
    return;
  }
  show(answer.outputs, outputs, elapsed, text, path, body);
}

function inWords(status, message) {
  const reasons = {
    400: "The model cannot use what you sent: its shape or type is not the one the form asks for.",
    404: "This model or version is no longer there. Reload the page to see what is.",
    429: "The server is busy. Try again in a moment.",
    503: "The server is busy. Try again in a moment.",
    504: "The model took too long to answer.",
  };
  return `${reasons[status] ?? "Something went wrong on the server."}\nThe server says: ${message}`;
}

function show(outputs, specs, elapsed, text, path, body) {
  const names = Object.keys(specs);
  const values = names.length === 1 ? { [names[0]]: outputs } : outputs;
  const firstRow = (name) => (Array.isArray(values[name]) ? values[name][0] : values[name]);
  const labels = names.filter((name) => specs[name].dtype === "string").map(firstRow);
  byId("bars").replaceChildren();
  const isDrift = ["layer", "channels", "count", "mean_shift", "variance_ratio"].every((name) => names.includes(name));
  if (isDrift) {
    const layers = pooledDrift(values);
    byId("bars").append(element("h4", {}, "KL divergence from the training data, in nats"),
      ...bars(layers.map((each) => each.kl), layers.map((each) => each.layer), false));
  }
  for (const name of isDrift ? [] : names) {
    const row = firstRow(name);
    if (specs[name].dtype === "string" || !Array.isArray(row) || !row.every((each) => typeof each === "number")) continue;
    byId("bars").append(element("h4", {}, name), ...bars(row, labels.find((each) => Array.isArray(each) && each.length === row.length)));
  }
  byId("latency").textContent = `in ${elapsed.toFixed(1)} ms`;
  byId("raw").textContent = text;
  const shown = body.length > 2000 ? `${body.slice(0, 2000)}…` : body;
  byId("curl").textContent = `curl ${location.origin}${path} -d '${shown.replaceAll("'", "'\\''")}'`;
  byId("copy").onclick = () => navigator.clipboard.writeText(byId("curl").textContent.replace(shown, body));
  byId("answer").hidden = false;
}

// All rows together, for each layer, with the equations of the client's `drift`.
function pooledDrift({ layer, channels, count, mean_shift: shift, variance_ratio: ratio }) {
  let channel = 0;
  return layer[0].map((name, at) => {
    let kl = 0;
    const end = channel + channels[0][at];
    for (; channel < end; channel++) {
      const total = count.reduce((sum, row) => sum + row[channel], 0);
      const mean = count.reduce((sum, row, i) => sum + row[channel] * shift[i][channel], 0) / total;
      const spread = count.reduce((sum, row, i) => sum + row[channel] * (ratio[i][channel] + (shift[i][channel] - mean) ** 2), 0) / total;
      kl += (spread + mean ** 2 - 1 - Math.log(spread)) / 2 / channels[0][at];
    }
    return { layer: name, kl };
  });
}

function bars(row, labels, probabilities = row.every((each) => each >= 0 && each <= 1)) {
  const most = probabilities ? 1 : Math.max(...row.map(Math.abs), 1e-30);
  const ranked = row.map((value, at) => ({ value, name: labels ? String(labels[at]) : `class ${at}` }));
  ranked.sort((a, b) => b.value - a.value);
  return ranked.slice(0, 10).map(({ value, name }) => element("div", { className: "bar" },
    element("span", {}, name), element("meter", { max: most, value: Math.max(value, 0), title: String(value) }),
    element("output", {}, probabilities ? `${(value * 100).toFixed(1)} %` : value.toPrecision(4))));
}

function problem(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = false;
}

function clearAnswer() {
  byId("answer").hidden = byId("problem").hidden = true;
}

byId("version").onchange = chooseVersion;
byId("signature").onchange = chooseSignature;
byId("form").onsubmit = ask;
start();
