// The last requests of this page, with what they took.

import { byId, element, show, styled } from "./dom.js";
import { milliseconds } from "./exact.js";

const MOST = 8;
let requests = [];

// Args: of a request its model, version, signature, what was said, a picture of what was asked or "", whether it went
// well, and the milliseconds that it took.
export function note(request) {
  requests = [request, ...requests].slice(0, MOST);
  const slowest = Math.max(...requests.map((each) => each.took));
  byId("requests").replaceChildren(...requests.map((each) => {
    const { model, version, signature, said, picture, fine, took } = each;
    const fill = styled(element("div", { className: fine ? "fill" : "fill failed" }), { left: "0", width: `${100 * took / slowest}%` });
    return element("li", {},
      picture ? element("img", { src: picture, alt: "" }) : element("span", { className: "blank" }),
      element("div", { className: "what" }, element("strong", {}, said), element("small", {}, `${model}, version ${version}, ${signature}`)),
      element("div", { className: "track" }, fill),
      element("output", {}, milliseconds(took)));
  }));
  const sorted = requests.map((each) => each.took).sort((a, b) => a - b);
  byId("pace").textContent = requests.length > 1 ? `Median of the last ${requests.length}: ${milliseconds(sorted[Math.floor(sorted.length / 2)])}, as seen from this browser.` : "As seen from this browser.";
  show("history", true);
}
