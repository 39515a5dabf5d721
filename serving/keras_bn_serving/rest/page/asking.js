// Questions to the server: sent, waited for, and what became of them in words.

import { byName } from "./answer.js";
import { parse } from "./exact.js";

export const AWAY = "The server does not answer. Is it still running?";
const REASONS = {
  400: "The model cannot use what you sent: its shape or type is not the one the form asks for.",
  404: "This model or version is no longer there.",
  413: "What you sent is more than the server takes.",
  429: "The server is busy. Try again in a moment.",
  503: "The server is busy. Try again in a moment.",
  504: "The model took too long to answer.",
};

// `inputs` is JSON text, so that no digit of it is lost.
export function question(model, version, signature, inputs) {
  return {
    path: `/v1/models/${encodeURIComponent(model)}/versions/${version}:predict`,
    body: `{"signature_name": ${JSON.stringify(signature)}, "inputs": ${inputs}}`,
  };
}

// Returns the values by output name, the text and the milliseconds that it took, or the problem in words.
export async function answerTo({ path, body }, outputs) {
  const began = performance.now();
  const took = () => performance.now() - began;
  let response, text;
  try {
    response = await fetch(path, { method: "POST", body });
    text = await response.text();
  } catch (error) {
    return { problem: AWAY, said: "No answer", took: took() };
  }
  const end = took();
  let answer;
  try {
    answer = parse(text);
  } catch (error) {
    answer = { error: text };
    if (response.ok) return { problem: `The answer cannot be read: ${error.message}.`, said: "Not readable", took: end };
  }
  if (!response.ok) {
    const problem = `${REASONS[response.status] ?? "Something went wrong on the server."}\nThe server says: ${answer.error ?? text}`;
    return { problem, said: `Refused with ${response.status}`, took: end };
  }
  return { values: byName(answer.outputs, outputs), text, took: end };
}

// The same for a shell. Of long arguments the system takes none.
export function asCurl({ path, body }) {
  const url = `${location.origin}${path}`;
  return body.length > 100_000 ? `curl ${url} --data @- <<'END'\n${body}\nEND` : `curl ${url} -d '${body.replaceAll("'", "'\\''")}'`;
}
