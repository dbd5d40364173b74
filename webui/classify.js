// For the templates of Classify. A click on a button with an action sends its data attributes, the ticked images and the values of
// the named fields: as a click if the action is to show something, else as a select, which changes something.
const all = (selector) => [...element.querySelectorAll(selector)];
const ticked = () => all("input[type=checkbox]:checked").map((box) => box.value);
const images = (count) => (count === 1 ? "1 image" : `${count} images`);

// Buttons with a label act on the ticked images.
function showTicked() {
  const count = ticked().length;
  for (const button of all("button[data-label]")) {
    button.disabled = !count;
    button.textContent = count ? `${button.dataset.label} ${images(count)}` : button.dataset.label;
  }
}

element.addEventListener("change", showTicked);
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-action]");
  if (!button || ("confirm" in button.dataset && !confirm(button.dataset.confirm || `${button.textContent}?`))) return;
  const fields = Object.fromEntries(all("[name]").map((field) => [field.name, field.value]));
  trigger(button.dataset.action === "show" ? "click" : "select", {...button.dataset, fields, files: ticked()});
});
element.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.matches("input[type=text]")) event.target.closest("div").querySelector("button").click();
});
watch("value", () => {
  // Nodes are reused for other classes, with what was ticked, typed and chosen in them.
  for (const box of all("input[type=checkbox]")) box.checked = false;
  for (const field of all("input[name]")) field.value = field.defaultValue;
  for (const field of all("select")) field.value = [...field.options].find((option) => option.defaultSelected)?.value ?? field.options[0]?.value;
  showTicked();
});
