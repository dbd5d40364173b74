// The cards: one listener for all of them. Selection, focus and unsent captions survive an update of the cards.
const chosen = new Set(), unsent = new Map();
let focused = null;
const all = selector => [...element.querySelectorAll(selector)];
const boxes = () => all('[data-action=choose]');
const key = node => node && node.dataset && node.dataset.action ? [node.dataset.action, node.dataset.file] : null;

function showChosen() {
  const there = boxes();
  for (const file of [...chosen]) if (!there.some(box => box.dataset.file === file)) chosen.delete(file);
  for (const box of there) box.checked = chosen.has(box.dataset.file);
  const button = element.querySelector('[data-action=remove-chosen]'), every = element.querySelector('[data-action=choose-all]');
  if (!button) return;
  button.disabled = !chosen.size;
  button.textContent = chosen.size ? `Remove selected (${chosen.size})` : 'Remove selected';
  every.checked = chosen.size === there.length;
}

element.addEventListener('change', event => {
  const {action, file} = event.target.dataset;
  if (action === 'choose') event.target.checked ? chosen.add(file) : chosen.delete(file);
  if (action === 'choose-all') for (const box of boxes()) event.target.checked ? chosen.add(box.dataset.file) : chosen.delete(box.dataset.file);
  if (action === 'caption') {
    unsent.delete(file);
    trigger('click', {action, files: [file], text: event.target.value});
  }
  showChosen();
});
element.addEventListener('input', event => {
  if (event.target.dataset.action === 'caption') unsent.set(event.target.dataset.file, event.target.value);
});
element.addEventListener('focusin', event => { focused = key(event.target); });
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-action]');
  if (!button || button.disabled) return;
  const {action, file, text} = button.dataset;
  focused = key(button);
  if (action === 'propose') trigger('click', {action: 'caption', files: [file], text});
  else if (action === 'remove-chosen') trigger('click', {action: 'remove', files: [...chosen], text: ''});
  else if (action === 'remove-all') {
    if (confirm('Remove all photos?')) trigger('click', {action: 'remove', files: boxes().map(box => box.dataset.file), text: ''});
  } else trigger('click', {action, files: [file], text: ''});
});
watch('value', () => {
  // Nodes are reused for other photos, with the text that was typed into them.
  for (const area of all('textarea')) area.value = unsent.get(area.dataset.file) ?? area.defaultValue;
  showChosen();
  const active = document.activeElement;
  if (!focused || (active && active !== document.body && !element.contains(active))) return;
  const of = action => all(`[data-action=${action}]`).find(node => node.dataset.file === focused[1] && !node.disabled);
  const next = of(focused[0]) || of('later') || of('earlier') || element.querySelector('button:not(:disabled)');
  if (next) next.focus({preventScroll: true});
});
// An image in the clipboard is uploaded like a dropped one.
document.addEventListener('paste', event => {
  const input = document.querySelector('#photos-upload input[type=file]');
  const images = [...event.clipboardData.files].filter(file => file.type.startsWith('image/'));
  if (!input || !input.closest('#photos-upload').offsetParent || !images.length) return;
  const pasted = new DataTransfer();
  images.forEach((file, index) => pasted.items.add(new File([file], `pasted ${index + 1}.${file.type.slice(6)}`, {type: file.type})));
  input.files = pasted.files;
  input.dispatchEvent(new Event('change', {bubbles: true}));
  event.preventDefault();
});
