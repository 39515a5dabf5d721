// JSON with every digit: integers that a double cannot hold become BigInt, and NaN and Infinity stand bare, as the
// protocol writes them.

const UNUSUAL = /NaN|Infinity|\d{16}/;
const TOKEN = /"(?:[^"\\]|\\.)*"|-?(?:\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|Infinity)|NaN/g;
const INTEGER = /^-?\d+$/;
const KINDS = { n: Number, i: BigInt, s: String };

export function parse(text) {
  if (!UNUSUAL.test(text)) return JSON.parse(text);
  return JSON.parse(text.replace(TOKEN, marked), (key, value) =>
    typeof value === "string" && value.startsWith("\0") ? KINDS[value[1]](value.slice(2)) : value);
}

// What JSON has no word for goes through it as a string with a mark, strings that begin like the mark with one, too.
function marked(token) {
  if (token.startsWith('"')) return token.startsWith('"\\u0000') ? `"\\u0000s${token.slice(1)}` : token;
  if (/N|I/.test(token)) return `"\\u0000n${token}"`;
  return INTEGER.test(token) && !Number.isSafeInteger(Number(token)) ? `"\\u0000i${token}"` : token;
}

export const isNumber = (value) => typeof value === "number" || typeof value === "bigint";

export function digits(value) {
  if (typeof value === "bigint" || Number.isInteger(value) || !Number.isFinite(value)) return String(value);
  return String(Number(value.toPrecision(6)));
}

export const milliseconds = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
