// SPDX-License-Identifier: Apache-2.0
// Making and changing elements without markup from data: text is always set as text.

// element("p", { class: "quiet" }, "text", child, ...)
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Touches the page only where it differs: a reader's selection and a screen reader's place survive an update.
export function setText(node, text) {
  if (node.textContent !== String(text)) node.textContent = text;
}

// Of a POST; `key` is the field for an API key, which may be empty.
export function jsonHeaders(key) {
  return { "Content-Type": "application/json", ...(key.value ? { Authorization: `Bearer ${key.value}` } : {}) };
}

// A bar beside a figure that says the same, hence hidden from who cannot see it. Its width is set by the object model,
// which a strict content policy allows and a style attribute does not.
export function bar() {
  const fill = element("span");
  return {
    node: element("dd", { class: "bar", "aria-hidden": "true" }, fill),
    set(share) {
      fill.style.width = `${Math.round(100 * Math.min(1, Math.max(0, share)))}%`;
    },
  };
}

export function humanBytes(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit + 1 < units.length) {
    bytes /= 1024;
    ++unit;
  }
  return `${bytes.toFixed(unit > 0 && bytes < 100 ? 1 : 0)} ${units[unit]}`;
}

export function humanCount(count) {
  if (count >= 1e6) return `${(count / 1e6).toFixed(1)} M`;
  return Math.round(count).toLocaleString("en");
}

export function humanPass(us) {
  if (us < 1000) return `${us} µs`;
  return us < 1e6 ? `${(us / 1000).toFixed(1)} ms` : `${(us / 1e6).toFixed(2)} s`;
}

export function humanDuration(ms) {
  const seconds = Math.floor(ms / 1000);
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor(seconds / 60) % 60} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor(seconds / 3600) % 24} h`;
}
