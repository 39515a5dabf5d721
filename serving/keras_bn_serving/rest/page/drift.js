// How far what was asked is from the data that a model was trained on, at each normalization.

import { element, styled } from "./dom.js";

export const SIGNATURE = "batch_norm_drift";
const FIGURES = ["layer", "channels", "count", "mean_shift", "variance_ratio"];
const MOST_LAYERS = 12;

export const isDrift = (specs) => FIGURES.every((name) => name in specs);

// All rows together, for each layer, with the equations of the client's `drift`: the root mean square of the shift, the
// ratio farthest from 1, and the mean divergence.
export function pooled({ layer, channels, count, mean_shift: shift, variance_ratio: ratio }) {
  let channel = 0;
  return layer[0].map((name, at) => {
    const end = channel + channels[0][at];
    let [square, farthest, divergence] = [0, 1, 0];
    for (const width = channels[0][at]; channel < end; channel++) {
      const over = (term) => count.reduce((sum, row, i) => sum + row[channel] * term(i), 0) / total;
      const total = count.reduce((sum, row) => sum + row[channel], 0);
      const mean = over((i) => shift[i][channel]);
      const spread = over((i) => ratio[i][channel] + (shift[i][channel] - mean) ** 2);
      if (Math.abs(Math.log(spread)) > Math.abs(Math.log(farthest))) farthest = spread;
      square += mean ** 2 / width;
      divergence += (spread + mean ** 2 - 1 - Math.log(spread)) / 2 / width;
    }
    return { layer: name, kl: divergence, shift: Math.sqrt(square), ratio: farthest };
  });
}

// For each layer the least and the largest divergence of single rows.
export function range(answer) {
  const rows = answer.layer.map((_, row) => pooled(Object.fromEntries(FIGURES.map((name) => [name, [answer[name][row]]]))));
  return rows[0].map((_, at) => {
    const all = rows.map((row) => row[at].kl);
    return { least: Math.min(...all), most: Math.max(...all), count: rows.length };
  });
}

// The chart. Args: what `pooled` returns, of how many rows, and what `range` returns for the model's examples, or null.
export function chart(layers, rows, examples) {
  const band = rows === 1 ? examples : null;
  const places = layers.map((each, at) => ({ ...each, ...band?.[at] }));
  const shown = [...places].sort((a, b) => b.kl - a.kl).slice(0, MOST_LAYERS);
  const most = Math.max(...shown.flatMap((each) => [each.kl, each.most ?? 0]).filter(Number.isFinite), 1e-9) * 1.04;
  const percent = (value) => `${Math.min(value / most, 1) * 100}%`;
  const lines = places.filter((each) => shown.includes(each)).map(({ layer, kl, shift, ratio, least, most: top }) => {
    const track = element("div", { className: "track" });
    if (band) track.append(styled(element("div", { className: "band" }), { left: percent(least), width: percent(top - least) }));
    track.append(styled(element("div", { className: band && kl > top ? "dot far" : "dot" }), { left: percent(kl) }));
    const title = `mean shift ${shift.toFixed(3)} standard deviations, variance ratio farthest from 1: ${ratio.toFixed(3)}`;
    return element("div", { className: "bar drift", title }, element("span", { title: layer }, layer), track, element("output", {}, kl < 100 ? kl.toFixed(3) : kl.toPrecision(3)));
  });
  const some = shown.length < layers.length ? `The ${shown.length} farthest of ${layers.length} normalizations. ` : "";
  const legend = band ? ` The band: the ${band[0].count} examples that the model brings, each alone.` : "";
  const pool = rows > 1 ? ` All ${rows} rows together.` : "";
  return [
    element("h4", {}, "Distance from the training data"),
    ...(band ? [verdict(places)] : []),
    element("div", { className: "bars" }, ...lines),
    element("p", { className: "quiet" }, `${some}Kullback-Leibler divergence at each normalization, in nats; 0 is the training population.${legend}${pool}`),
  ];
}

function verdict(places) {
  const far = places.filter((each) => each.kl > each.most);
  const farthest = far.reduce((a, b) => (b.kl / b.most > a.kl / a.most ? b : a), far[0]);
  return far.length
    ? element("p", { className: "verdict far" }, `Unlike the model's examples at ${far.length} of ${places.length} normalizations, most at ${farthest.layer}: ${(farthest.kl / farthest.most).toFixed(1)} times the farthest of them.`)
    : element("p", { className: "verdict" }, "As near as the model's own examples.");
}
