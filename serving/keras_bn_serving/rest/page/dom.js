// Elements found and made.

export const byId = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function show(id, whether) {
  byId(id).hidden = !whether;
}

// The content security policy takes styles from scripts, and none from attributes.
export function styled(made, style) {
  Object.assign(made.style, style);
  return made;
}

// Returns whether a text could be put on the clipboard.
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch (error) { // Without encryption a browser has no clipboard for pages of other machines.
    const area = element("textarea", { value: text });
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}
