// Elements without HTML strings: text from a log stays text.

export const at = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// The children of `element` become `children`; nothing happens when they look the same already.
export function fill(element, ...children) {
  const next = make("div", {}, ...children);
  if (element.innerHTML !== next.innerHTML) element.replaceChildren(...next.childNodes);
}

// columns: [title, class]; rows: arrays of cells, text or elements.
export function table(columns, rows, empty) {
  if (!rows.length) return make("p", { class: "note" }, empty);
  const head = columns.map(([title, kind]) => make("th", { scope: "col", class: kind }, title));
  const body = rows.map((cells) =>
    make("tr", {}, ...cells.map((cell, i) => make(i ? "td" : "th", { scope: i ? null : "row", class: columns[i][1] }, cell))));
  return make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body));
}

export const tag = (level, text) => make("span", { class: `tag ${level}` }, text);

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// A select keeps its choice when its options change.
export function options(select, names, label = (name) => name) {
  const wanted = names.join("\n");
  if (select.dataset.names === wanted) return;
  const chosen = select.value;
  select.dataset.names = wanted;
  select.replaceChildren(...names.map((name) => make("option", { value: name }, label(name))));
  if (names.includes(chosen)) select.value = chosen;
}
