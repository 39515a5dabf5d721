// The page: lists the models and follows them, builds a form from a signature, asks, and shows the answer.

import { rowsOf, view } from "./answer.js";
import { AWAY, answerTo, asCurl, question } from "./asking.js";
import { byId, copy, element, show } from "./dom.js";
import * as drift from "./drift.js";
import { milliseconds } from "./exact.js";
import { field, glimpse } from "./fields.js";
import { note } from "./history.js";
import { listItem, newest, usable } from "./models.js";

const LOOK_MILLISECONDS = 3000;
const LONGEST_COMMAND = 2000;
const EMPTY = "The answer appears here.";
let listed = ""; // The list of the models as it came last.
let models = [];
let model = null;
let fields = {}; // Of the form, by input name.
let asked = 0; // The question whose answer is waited for or shown; a number of its own for each.
const abouts = new Map(); // What is shown of a version beside its signatures, by model and version.
const ranges = new Map(); // The drift of a version's examples.

const version = () => model.versions.find((each) => each.version === byId("version").value);
const signature = () => version()?.signatures[byId("signature").value];

async function follow() {
  setTimeout(follow, LOOK_MILLISECONDS);
  if (document.hidden && listed) return;
  let text;
  try {
    const response = await fetch("/page/models", { cache: "no-store" });
    text = await response.text();
    if (!response.ok) throw new Error(text);
  } catch (error) {
    byId("summary").textContent = AWAY;
    document.body.classList.add("away");
    return;
  }
  take(text);
}

function take(text) {
  document.body.classList.remove("away");
  const last = models;
  models = JSON.parse(text).models;
  const count = models.length === 1 ? "1 model" : `${models.length || "No"} models`;
  byId("summary").textContent = `${count} at ${location.host}`;
  if (text === listed) return;
  listed = text;
  abouts.clear();
  ranges.clear();
  show("nothing", !models.length);
  show("nav", models.length);
  document.body.classList.toggle("single", models.length < 2);
  const looked = document.activeElement?.dataset.model;
  byId("models").replaceChildren(...models.map((each) => listItem(each, choose)));
  for (const button of document.querySelectorAll("nav button")) if (button.dataset.model === looked) button.focus();
  const still = models.find((each) => each.name === model?.name);
  if (still) update(still, newest(last.find((each) => each.name === model.name)));
  else if (models.length) choose(models[0]);
  else { model = null; show("work", false); }
}

function choose(chosen) {
  model = chosen;
  show("work", true);
  show("notice", false);
  byId("model-title").textContent = model.name;
  showModel();
  byId("version").replaceChildren(...usable(model).map((each) => new Option(each.version)));
  chooseVersion();
}

// The chosen model as it is now. Who looks at the newest version goes on to look at the newest.
function update(now, newestBefore) {
  const chosen = byId("version").value;
  const form = JSON.stringify(signature());
  model = now;
  showModel();
  const versions = usable(model).map((each) => each.version);
  const next = versions.includes(chosen) && chosen !== newestBefore ? chosen : versions[0];
  byId("version").replaceChildren(...versions.map((each) => new Option(each)));
  if (next !== undefined) byId("version").value = next;
  if (next !== chosen && next !== undefined && chosen) {
    byId("notice").textContent = `Version ${next} has taken over from ${chosen}.`;
    show("notice", true);
  }
  listSignatures();
  // What has been drawn stays where the form does.
  if (form !== JSON.stringify(signature())) chooseVersion();
  else showAbout().then((about) => version()?.version === next && showExamples(about));
}

function showModel() {
  for (const button of document.querySelectorAll("nav button")) {
    button.setAttribute("aria-current", String(button.dataset.model === model.name));
  }
  const failed = model.versions.filter((each) => each.error_message);
  const waits = usable(model).length || failed.length ? [] : [element("p", {}, "No version can answer yet.")];
  byId("failures").replaceChildren(...waits, ...failed.map((each) => element("details", { className: "failure", open: !usable(model).length },
    element("summary", {}, `Version ${each.version} cannot be served`), element("p", {}, each.error_message))));
  show("columns", usable(model).length);
}

function chooseVersion() {
  listSignatures();
  chooseSignature();
}

function listSignatures() {
  const chosen = byId("signature").value;
  const names = Object.keys(version()?.signatures ?? {});
  names.sort((a, b) => (b === "serving_default") - (a === "serving_default") || a.localeCompare(b));
  byId("signature").replaceChildren(...names.map((name) => new Option(name)));
  if (names.includes(chosen)) byId("signature").value = chosen;
}

async function chooseSignature() {
  leave();
  const inputs = signature()?.inputs ?? {};
  fields = {};
  byId("inputs").replaceChildren();
  for (const id of ["ask", "examples"]) show(id, false);
  const number = asked;
  const about = await showAbout();
  if (number !== asked) return; // Something else has been chosen since.
  const examples = about.examples[byId("signature").value] ?? [];
  fields = Object.fromEntries(Object.entries(inputs).map(([name, spec]) =>
    [name, field(name, spec, examples.map((each) => each[name]), problem)]));
  byId("inputs").replaceChildren(...Object.values(fields).map((each) => each.node));
  show("ask", Object.keys(inputs).length);
  showExamples(about);
}

function showExamples(about) {
  const inputs = signature()?.inputs ?? {};
  const examples = about.examples[byId("signature").value] ?? [];
  show("examples", examples.length);
  if (byId("hint").textContent === EMPTY && examples.length) byId("hint").textContent = `${EMPTY} One click on an example asks with it.`;
  byId("examples").replaceChildren(...examples.map((example, at) => {
    const pictures = Object.entries(inputs).map(([name, spec]) => glimpse(name, spec, example[name], examples.map((each) => each[name])));
    const button = element("button", { type: "button", className: "example", onclick: () => askWith(example) }, ...pictures.filter(Boolean));
    if (!button.children.length) button.textContent = `Example ${at + 1}`;
    button.setAttribute("aria-label", `Ask with example ${at + 1}`);
    return button;
  }));
}

// What the server tells of a version beside its signatures.
function aboutOf(name, number) {
  const path = `/page/models/${encodeURIComponent(name)}/versions/${number}`;
  if (!abouts.has(path)) {
    abouts.set(path, fetch(path).then((response) => response.json()).catch(() => ({ error: AWAY }))
      .then((told) => ({ card: {}, examples: {}, ...told })));
  }
  return abouts.get(path);
}

async function showAbout() {
  const [name, number] = [model.name, byId("version").value];
  const about = number ? await aboutOf(name, number) : { card: {}, examples: {} };
  if (model?.name !== name || byId("version").value !== number) return about;
  const { parameters, accuracy, created } = about.card;
  const facts = [about.error && `Its examples cannot be shown: ${about.error}`,
    parameters && `${parameters.toLocaleString("en")} parameters`, accuracy && `${(100 * accuracy).toFixed(1)} % accuracy`,
    created && `exported ${new Date(created).toLocaleDateString("en-GB", { day: "numeric", month: "long", year: "numeric" })}`];
  byId("about").textContent = facts.filter(Boolean).join(" · ");
  return about;
}

function askWith(example) {
  for (const [name, value] of Object.entries(example)) fields[name].take(value);
  ask();
}

async function ask() {
  leave();
  const about = { model: model.name, version: version().version, signature: byId("signature").value };
  const { outputs } = signature();
  let inputs;
  try {
    inputs = `{${Object.entries(fields).map(([name, each]) => `${JSON.stringify(name)}: ${each.read()}`).join(", ")}}`;
  } catch (error) {
    problem(error.message);
    return;
  }
  const number = asked;
  const picture = Object.values(fields).map((each) => each.glance()).find(Boolean) ?? "";
  const sent = question(about.model, about.version, about.signature, inputs);
  const measure = driftOf(about, inputs);
  wait(`Waiting for ${about.model}…`);
  const got = await answerTo(sent, outputs);
  const said = got.said ?? (drift.isDrift(outputs) ? "Drift" : view(got.values, outputs, 0).said);
  note({ ...about, said, picture, fine: !got.problem, took: got.took });
  if (number !== asked) return; // Another model, signature or question is looked at by now.
  wait("");
  if (got.problem) { problem(got.problem); return; }
  showAnswer(got, outputs, about, sent);
  const nodes = measure && await measure();
  if (nodes && number === asked) {
    byId("drift").replaceChildren(...nodes);
    show("drift", true);
  }
}

function showAnswer({ values, text, took }, outputs, about, sent) {
  const rows = rowsOf(values, outputs);
  const by = element("p", { className: "by" }, `${about.model}, version ${about.version} · `, element("span", { id: "latency" }, milliseconds(took)));
  const body = element("div");
  const showRow = (row) => body.replaceChildren(...(drift.isDrift(outputs) ? drift.chart(drift.pooled(values), rows, null) : view(values, outputs, row).nodes));
  byId("view").replaceChildren(by, body);
  if (rows > 1 && !drift.isDrift(outputs)) {
    const picker = element("select", { id: "row", onchange: () => showRow(picker.selectedIndex) }, ...Array.from({ length: Math.min(rows, 1000) }, (_, at) => new Option(at + 1)));
    by.append(" · ", element("label", {}, "Row ", picker, ` of ${rows}`));
  }
  if (rows !== 0 || Object.keys(outputs).length) showRow(0);
  byId("raw").textContent = text.length > 1e5 ? `${text.slice(0, 1e5)}…` : text;
  const command = asCurl(sent);
  byId("curl").textContent = command.length > LONGEST_COMMAND ? `${command.slice(0, LONGEST_COMMAND)}…` : command;
  byId("copy").onclick = async () => {
    byId("copied").textContent = await copy(command) ? "Copied" : "This browser lets no page copy: mark the text yourself.";
  };
  show("answer", true);
  // On a phone the answer is below the form.
  if (byId("result").getBoundingClientRect().top > window.innerHeight * 0.6) byId("result").scrollIntoView();
}

// What makes the chart of a question's drift, where the version can tell it of the same inputs.
function driftOf(about, inputs) {
  const spec = version().signatures[drift.SIGNATURE];
  if (about.signature === drift.SIGNATURE || !spec || !drift.isDrift(spec.outputs)) return null;
  if (JSON.stringify(spec.inputs) !== JSON.stringify(signature().inputs)) return null;
  const told = async (text) => {
    const got = await answerTo(question(about.model, about.version, drift.SIGNATURE, text), spec.outputs);
    if (got.problem) throw new Error(got.problem);
    return got.values;
  };
  const key = `${about.model}/${about.version}`;
  return async () => {
    try {
      const values = await told(inputs);
      if (!ranges.has(key)) ranges.set(key, rangeOf(told, about, Object.keys(spec.inputs)));
      return drift.chart(drift.pooled(values), values.layer.length, await ranges.get(key));
    } catch (error) {
      ranges.delete(key);
      return [element("h4", {}, "Distance from the training data"), element("p", { className: "quiet" }, `It could not be measured. ${error.message}`)];
    }
  };
}

async function rangeOf(told, about, names) {
  const examples = (await aboutOf(about.model, about.version)).examples[drift.SIGNATURE] ?? [];
  if (examples.length < 2) return null;
  return drift.range(await told(JSON.stringify(Object.fromEntries(names.map((name) => [name, examples.map((each) => each[name])])))));
}

function problem(text) {
  byId("problem").textContent = text;
  show("problem", true);
  show("hint", false);
}

function wait(text) {
  byId("hint").textContent = text || EMPTY;
  byId("hint").classList.toggle("waiting", Boolean(text));
  show("hint", text);
  byId("result").setAttribute("aria-busy", String(Boolean(text)));
  byId("ask").textContent = text ? "Asking…" : "Ask the model";
  byId("ask").setAttribute("aria-disabled", String(Boolean(text)));
}

// Whatever is waited for or shown belongs to what has been looked at until now.
function leave() {
  asked++;
  wait("");
  for (const id of ["answer", "problem", "drift"]) show(id, false);
  show("hint", true);
  byId("copied").textContent = "";
}

byId("version").onchange = chooseVersion;
byId("signature").onchange = chooseSignature;
byId("form").onsubmit = (event) => {
  event.preventDefault();
  if (byId("ask").getAttribute("aria-disabled") !== "true") ask();
};
follow();
