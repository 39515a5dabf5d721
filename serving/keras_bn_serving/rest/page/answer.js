// What a model has answered, the likeliest or the number itself first.

import { element, styled } from "./dom.js";
import { digits, isNumber } from "./exact.js";

const MOST_BARS = 10;
const TOP = 5;

// The outputs by name, however many there are: of a single one the protocol leaves the name out.
export function byName(outputs, specs) {
  const names = Object.keys(specs);
  return names.length === 1 ? { [names[0]]: outputs } : outputs;
}

// How many rows all outputs have, 0 where they are not of rows.
export function rowsOf(values, specs) {
  const lengths = Object.entries(specs).map(([name, spec]) =>
    Array.isArray(values[name]) && (spec.shape === null || spec.shape[0] === -1) ? values[name].length : 0);
  return lengths.every((length) => length === lengths[0]) ? lengths[0] : 0;
}

// One row, or all where there are none: in a few words, and as nodes.
export function view(values, specs, row) {
  const rows = rowsOf(values, specs);
  const left = Object.entries(specs).map(([name]) => [name, rows ? values[name][row] : values[name]]);
  const nodes = [];
  const said = [];
  const named = pair(left);
  if (named) {
    const ranked = named.labels.map((label, at) => [String(label), named.scores[at]]).sort((a, b) => Number(b[1]) - Number(a[1]));
    said.push(`${ranked[0][0]} ${score(ranked[0][1], named.scores)}`);
    nodes.push(headline(ranked[0][0], score(ranked[0][1], named.scores)), bars(ranked.slice(0, MOST_BARS), named.scores));
  }
  const others = left.filter(([name]) => !named?.told.includes(name)).map(([name, value]) => [name, single(value)]);
  // A single value first: it is what was asked for where there are lists beside it.
  others.sort((a, b) => Array.isArray(a[1]) - Array.isArray(b[1]));
  for (const [name, value] of others) {
    if (Array.isArray(value) && value.length && value.every(isNumber)) {
      const probable = isProbable(value);
      const entries = value.map((each, at) => [probable ? `class ${at}` : String(at), each]);
      if (probable) entries.sort((a, b) => b[1] - a[1]);
      const shown = entries.slice(0, probable ? TOP : MOST_BARS);
      if (probable && !said.length) nodes.push(headline(entries[0][0], score(entries[0][1], value)));
      said.push(probable ? `${entries[0][0]} ${score(entries[0][1], value)}` : value.slice(0, 4).map(digits).join(", "));
      nodes.push(element("h4", {}, name), bars(shown, value));
      if (shown.length < value.length) nodes.push(element("p", { className: "quiet" }, `${shown.length} of ${value.length} values; the whole answer has all.`));
    } else {
      const text = inWords(value);
      said.push(text);
      nodes.push(Array.isArray(value) || typeof value === "object"
        ? element("div", {}, element("h4", {}, name), element("p", { className: "value" }, text)) : figure(name, text));
    }
  }
  return { nodes, said: said.slice(0, 2).join("; ") };
}

// A list of one value is that value: so a regression answers.
const single = (value) => (Array.isArray(value) && value.length === 1 && !Array.isArray(value[0]) ? value[0] : value);

// Names and their scores, which stand in two outputs of equal length, and whatever else only repeats these scores.
function pair(entries) {
  const lists = entries.filter(([, value]) => Array.isArray(value) && value.length);
  const names = lists.filter(([, value]) => value.every((each) => typeof each === "string"));
  const numbers = lists.filter(([, value]) => value.every(isNumber));
  for (const [label, labels] of names) {
    const fitting = numbers.filter(([, value]) => value.length === labels.length);
    const [name, scores] = fitting.find(([each]) => each === label.replace(/label|class|name/, "score")) ?? fitting[0] ?? [];
    if (!scores) continue;
    const repeated = numbers.filter(([, value]) => scores.every((each) => value.includes(each))).map(([each]) => each);
    return { labels, scores, told: [label, name, ...repeated] };
  }
  return null;
}

const isProbable = (row) => row.every((each) => each >= 0 && each <= 1) && Math.abs(row.reduce((a, b) => a + b, 0) - 1) < 0.01;
const isShare = (row) => row.every((each) => typeof each === "number" && each >= 0 && each <= 1);
const score = (value, all) => (isShare(all) ? `${(value * 100).toFixed(1)} %` : digits(value));

const headline = (name, value) => element("p", { className: "headline" }, element("strong", {}, name), " ", element("span", {}, value));
const figure = (name, text) => element("p", { className: "figure" }, element("span", {}, name), " ", element("strong", {}, text));

function inWords(value) {
  if (isNumber(value)) return digits(value);
  if (typeof value === "string") return value;
  const text = JSON.stringify(value, (key, each) => (typeof each === "bigint" || Number.isNaN(each) ? String(each) : each));
  return text.length > 400 ? `${text.slice(0, 400)}…` : text;
}

// From zero to the right, what is negative to the left; `all` are the values that the scale is of.
function bars(entries, all) {
  const finite = all.map(Number).filter(Number.isFinite);
  const share = isShare(all);
  const low = share ? 0 : Math.min(0, ...finite);
  const high = share ? 1 : Math.max(0, ...finite);
  const span = high - low || 1;
  const zero = -low / span * 100;
  return element("div", { className: "bars" }, ...entries.map(([name, value]) => {
    const number = Number.isFinite(Number(value)) ? Number(value) : 0;
    const width = Math.abs(number) / span * 100;
    const fill = styled(element("div", { className: number < 0 ? "fill negative" : "fill" }),
      { left: `${number < 0 ? zero - width : zero}%`, width: `${width}%` });
    const track = element("div", { className: "track" }, fill);
    if (low < 0) track.append(styled(element("div", { className: "zero" }), { left: `${zero}%` }));
    return element("div", { className: "bar" }, element("span", { title: name }, name), track, element("output", {}, score(value, all)));
  }));
}
