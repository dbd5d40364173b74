// The expert form. The user's values live in its widgets and in the draft of the browser, never in what the server sends, so that
// no late response can overwrite a field. The server sends the values of preset and default, reasons and errors: `props.state`.

// The draft with other settings of the dataset that `task` has chosen.
window.withSettings ??= (draft, task, changes) => {
  const chosen = document.getElementById(`${task}-form`)?.querySelector("[data-set]")?.dataset.set;
  const key = draft.set ?? chosen ?? "example", before = draft.settings?.[key] ?? {};
  const settings = { ...before, ...changes, edits: (before.edits ?? 0) + 1 };
  lastEdits[task] = { key, settings };
  return { ...draft, settings: { ...draft.settings, [key]: settings } };
};
// The draft with the user's last edit, if a response that was asked for before it has replaced it; otherwise nothing. What was
// entered while photos were being added is for these photos.
window.withLastEdit ??= (draft, task) => {
  const { key, settings } = lastEdits[task] ?? {};
  if (!settings || (draft.settings?.[key]?.edits ?? 0) >= settings.edits) return undefined;
  const edited = draft.copied_from === key ? draft.set : key;
  lastEdits[task] = { key: edited, settings };
  return { ...draft, version: draft.version + 0.001, settings: { ...draft.settings, [edited]: settings } };
};
window.lastEdits ??= {};
window.trainingOptions ??= {};

const panel = element.querySelector(".expert"), fields = [...panel.querySelectorAll("[data-field]")];
let loaded = null;
const idOf = (field) => field.dataset.field;
const baseOf = (field) => props.state?.base?.[idOf(field)] ?? "";
const boxes = (field) => [...field.querySelectorAll("[type=checkbox]")];
const input = (field) => field.querySelector("input, select, textarea");

// The user's value of a field; null if it has none.
function valueOf(field) {
  const kind = field.dataset.kind;
  if (kind === "choices") {
    const chosen = boxes(field).filter((box) => box.checked).map((box) => box.value);
    return String(chosen) === String(baseOf(field)) ? null : chosen;
  }
  const text = input(field).value.trim();
  if (!text) return null;
  if (kind !== "list" && kind !== "numbers") return text;
  return text.split(kind === "list" ? "\n" : /[\n,]/).map((item) => item.trim()).filter((item) => item);
}

function show(field, value) {
  if (field.dataset.kind === "choices") {
    const chosen = value ?? baseOf(field);
    for (const box of boxes(field)) box.checked = chosen.includes(box.value);
  } else input(field).value = value === undefined || value === null ? "" : Array.isArray(value) ? value.join("\n") : String(value);
}

function options() {
  const values = {};
  for (const field of fields) {
    const value = valueOf(field), [group, name] = idOf(field).split(".");
    if (value !== null && value.length) (values[group] ??= {})[name] = value;
  }
  return values;
}

// Mark and count the changed fields, and hide those that the search or the chosen methods leave out.
function mark() {
  const words = panel.querySelector("[type=search]").value.trim().toLowerCase().split(/\s+/).filter((word) => word);
  const methods = props.state?.methods ?? [];
  const applies = (node) => !node.dataset.methods || node.dataset.methods.split(" ").some((name) => methods.includes(name));
  for (const field of fields) {
    field.classList.toggle("changed", valueOf(field) !== null);
    const text = `${idOf(field).replaceAll("_", " ")} ${idOf(field)} ${field.textContent}`.toLowerCase();
    field.hidden = !applies(field) || !words.every((word) => text.includes(word));
    for (const part of field.querySelectorAll("[data-methods]")) part.hidden = !applies(part);
  }
  for (const part of [panel, ...panel.querySelectorAll(".group")]) {
    const count = part.querySelectorAll(".field.changed:not([hidden])").length;
    part.querySelector(":scope > summary [data-count]").textContent = count ? ` (${count} changed)` : "";
    if (part === panel) continue;
    part.hidden = !part.querySelector(".field:not([hidden])");
    if (words.length) {
      part.dataset.before ??= part.open;
      part.open = !part.hidden;
    } else if (part.dataset.before) {
      part.open = part.dataset.before === "true";
      delete part.dataset.before;
    }
  }
  panel.querySelector("[data-nothing]").hidden = Boolean(panel.querySelector(".field:not([hidden])"));
  panel.querySelector("[data-reset]").disabled = !Object.keys(options()).length;
}

function apply() {
  const state = props.state;
  if (!state) return;
  panel.dataset.set = state.set;
  const isOther = state.key !== loaded;
  loaded = state.key;
  for (const field of fields) {
    const id = idOf(field), [group, name] = id.split("."), base = baseOf(field);
    if (isOther || (field.dataset.kind === "choices" && !field.classList.contains("changed"))) show(field, state.values[group]?.[name]);
    if (field.dataset.kind === "choice") input(field).options[0].text = base ? `${base} (${state.sources[id] ?? "default"})` : "not set";
    else if (field.dataset.kind !== "choices") input(field).placeholder = base || "not set";
    field.querySelector("[data-note]").textContent = state.notes[id] ?? "";
    field.querySelector("[data-problem]").textContent = state.errors[id] ?? "";
  }
  const problem = panel.querySelector(":scope > [data-problem]");
  problem.textContent = state.errors[""] ?? "";
  problem.hidden = !problem.textContent;
  mark();
}

function store() {
  mark();
  window.trainingOptions[panel.dataset.task] = options();
  trigger("input");
}

panel.addEventListener("input", (event) => (event.target.type === "search" ? mark() : store()));
panel.querySelector("[data-reset]").addEventListener("click", () => {
  for (const field of fields) show(field, null);
  store();
});
watch("state", apply);
apply();
mark();
