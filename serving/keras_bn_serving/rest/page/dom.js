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
