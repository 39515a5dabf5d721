// The models in the list, with their versions.

import { element } from "./dom.js";

const MOST_VERSIONS = 4;
const WORDS = { START: "new", LOADING: "loading", AVAILABLE: "available", UNLOADING: "leaving", END: "failed" };

export const usable = (model) => model?.versions.filter((each) => each.state === "AVAILABLE") ?? [];
export const newest = (model) => usable(model)[0]?.version;

export function listItem(model, choose) {
  // What has been unloaded without a fault is of no use to anybody.
  const versions = model.versions.filter((each) => each.state !== "END" || each.error_message);
  const lines = versions.slice(0, MOST_VERSIONS).map((each) => element("small", {}, `version ${each.version} `,
    element("span", { className: `state ${each.state}` }, WORDS[each.state])));
  if (versions.length > MOST_VERSIONS) lines.push(element("small", {}, `and ${versions.length - MOST_VERSIONS} more`));
  const labels = Object.entries(model.labels).map(([label, version]) => `${label} → ${version}`).join(", ");
  if (labels) lines.push(element("small", {}, `labels: ${labels}`));
  const button = element("button", { type: "button", title: model.name, onclick: () => choose(model) },
    element("strong", {}, model.name), element("span", { className: "versions" }, ...lines));
  button.dataset.model = model.name;
  return element("li", {}, button);
}
