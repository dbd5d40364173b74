// A square on an image: x and y are the place of its corner, side its size, as shares of the shorter side of the image.
let x = 0, y = 0, side = 0.8, held = null;
const find = selector => element.querySelector(selector);
const extent = () => { const ratio = Number(find('.crop').dataset.ratio); return ratio > 1 ? [ratio, 1] : [1, 1 / ratio]; };

function place(newX, newY, newSide) {
  const [width, height] = extent();
  side = Math.min(1, Math.max(0.2, newSide));
  [x, y] = [Math.min(width - side, Math.max(0, newX)), Math.min(height - side, Math.max(0, newY))];
  const style = find('.crop-box').style;
  [style.left, style.top, style.width] = [`${100 * x / width}%`, `${100 * y / height}%`, `${100 * side / width}%`];
  find('input').value = side;
}
const resize = newSide => place(x + (side - newSide) / 2, y + (side - newSide) / 2, newSide);

element.addEventListener('pointerdown', event => {
  if (!event.target.matches('.crop-box')) return;
  held = [event.clientX, event.clientY, x, y, find('img').clientWidth / extent()[0]];
  event.target.setPointerCapture(event.pointerId);
});
element.addEventListener('pointermove', event => {
  if (held) place(held[2] + (event.clientX - held[0]) / held[4], held[3] + (event.clientY - held[1]) / held[4], side);
});
for (const ended of ['pointerup', 'pointercancel']) element.addEventListener(ended, () => { held = null; });
element.addEventListener('input', event => { if (event.target.type === 'range') resize(Number(event.target.value)); });
element.addEventListener('keydown', event => {
  const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
  if (!event.target.matches('.crop-box')) return;
  if (step) place(x + 0.02 * step[0], y + 0.02 * step[1], side);
  else if ('+-'.includes(event.key)) resize(side + (event.key === '+' ? 0.04 : -0.04));
  else return;
  event.preventDefault();
});
element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (button) trigger('click', {action: button.dataset.action, files: [find('.crop').dataset.file], x, y, side});
});
watch('value', () => {
  if (!find('.crop')) return;
  const [width, height] = extent();
  place((width - 0.8) / 2, (height - 0.8) / 2, 0.8);
  find('.crop').scrollIntoView({block: 'center'});
  find('.crop-box').focus({preventScroll: true});
});
