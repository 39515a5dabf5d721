// The fields of a question. Each has a node, what it sends as JSON text (`read`), and how it takes an example (`take`).

import { element } from "./dom.js";
import { isFraction, pictureField, pictureSize, thumbnail } from "./drawing.js";
import { parse } from "./exact.js";

// So many values are written down for a person to change; of larger inputs only the beginning of each axis.
const MOST_VALUES = 20_000;
const SHORT = 8;

export function shapeText(spec) {
  return spec.shape === null ? "of any shape" : `[${spec.shape.map((size) => (size < 0 ? "any" : size)).join(", ")}]`;
}

const isFile = (name, spec) => spec.dtype === "string" && /image|picture|png|jpe?g|bytes/i.test(name);

// Args: the input's name and spec, what the examples have for it, and what to call with a mistake in words.
export function field(name, spec, examples, problem) {
  const size = pictureSize(spec);
  const made = size ? pictureField(name, spec, size, examples, problem)
    : isFile(name, spec) ? fileField(name, problem) : textField(name, spec);
  const legend = element("legend", {}, element("strong", {}, name), ` ${spec.dtype} ${shapeText(spec)}`);
  return { ...made, node: element("fieldset", {}, legend, made.node) };
}

// What is shown of an example to choose it by.
export function glimpse(name, spec, value, examples) {
  const size = pictureSize(spec);
  if (size) return thumbnail(value, spec, size, examples);
  if (isFile(name, spec) && value?.b64) return element("img", { src: dataUrl(value), alt: "" });
  return null;
}

// Browsers look at the bytes for the kind of picture, not at what is said here.
const dataUrl = (value) => `data:image/png;base64,${value.b64}`;

function textField(name, spec) {
  const least = spec.dtype === "string" ? "text" : spec.dtype === "bool" ? true : isFraction(spec) ? 0.5 : 1;
  const sizes = (spec.shape ?? []).map((size) => (size < 0 ? 1 : size));
  const most = sizes.reduce((all, size) => all * size, 1) > MOST_VALUES ? SHORT : Infinity;
  const example = sizes.reduceRight((inner, size) => Array(Math.min(size, most)).fill(inner), least);
  const shown = JSON.stringify(example);
  const area = element("textarea", { id: `input-${name}`, value: shown, spellcheck: false });
  area.setAttribute("aria-label", `${name}, as JSON`);
  return {
    node: area,
    read() {
      try {
        parse(area.value);
      } catch (error) {
        area.focus();
        throw new Error(`What you wrote for “${name}” cannot be read: ${error.message}.\nWrite ${spec.dtype} values of shape ${shapeText(spec)} as a JSON list, for example ${shown.length > 200 ? `${shown.slice(0, 200)}…` : shown}.`);
      }
      return area.value.trim(); // As it is: a number with more digits than a double has would lose them.
    },
    take: (value) => { area.value = JSON.stringify([value]); },
    glance: () => "",
  };
}

function fileField(name, problem) {
  const preview = element("img", { className: "preview", alt: "", hidden: true });
  const drop = element("div", { className: "drop" }, preview, element("span", {}, "Drop a picture here"));
  let sent = null;
  const put = (value) => {
    sent = value;
    preview.src = dataUrl(value);
    preview.hidden = false;
  };
  const take = (file) => {
    const reader = new FileReader();
    reader.onload = () => put({ b64: reader.result.slice(reader.result.indexOf(",") + 1) });
    reader.onerror = () => problem(`“${file.name}” cannot be read.`);
    reader.readAsDataURL(file);
  };
  const input = element("input", { type: "file", accept: "image/*", id: `input-${name}`, onchange: () => input.files.length && take(input.files[0]) });
  input.setAttribute("aria-label", `${name}, a picture file`);
  drop.ondragover = (event) => { event.preventDefault(); drop.classList.add("over"); };
  drop.ondragleave = () => drop.classList.remove("over");
  drop.ondrop = (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  };
  return {
    node: element("div", { className: "picture" }, drop,
      element("div", { className: "tools" }, element("label", { className: "button" }, "Open a picture", input)),
      element("p", { className: "quiet" }, "The file is sent as it is, and the model decodes it.")),
    read() {
      if (sent === null) throw new Error(`Choose a picture for “${name}” first.`);
      return JSON.stringify([sent]);
    },
    take: put,
    glance: () => preview.src,
  };
}
