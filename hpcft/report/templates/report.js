"use strict";
(() => {
  const tip = document.getElementById("tip");
  // What browsers show of a title comes late, and not on touch.
  for (const title of document.querySelectorAll("svg title")) {
    const owner = title.parentNode;
    const text = title.textContent;
    title.remove();
    if (!text) continue;
    owner.dataset.tip = text;
    owner.setAttribute("role", "img");
    owner.setAttribute("aria-label", text);
  }
  const show = (text, event) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const x = Math.min(event.clientX + 14, innerWidth - box.width - 8);
    const below = event.clientY + 18;
    const y = below + box.height > innerHeight ? event.clientY - box.height - 12 : below;
    tip.style.left = `${Math.max(4, x)}px`;
    tip.style.top = `${Math.max(4, y)}px`;
  };
  const cross = (figure, point) => {
    const [line, dot] = figure.querySelectorAll(".cross");
    const [x, y] = point || [-9, -9];
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
    dot.setAttribute("cx", x);
    dot.setAttribute("cy", y);
  };
  const points = new WeakMap();
  const nearest = (figure, event) => {
    if (!points.has(figure)) points.set(figure, JSON.parse(figure.dataset.points));
    const picture = figure.querySelector("svg.picture").getBoundingClientRect();
    const scale = picture.width / 1100;
    const x = (event.clientX - picture.left) / scale;
    const y = (event.clientY - picture.top) / scale;
    // Of several at the same step the one that is pointed at.
    const far = (point) => Math.abs(point[0] - x) + 0.05 * Math.abs(point[1] - y);
    return points.get(figure).reduce((best, point) => (far(point) < far(best) ? point : best));
  };
  let crossed = null;
  const look = (event) => {
    const target = event.target instanceof Element ? event.target : null;
    const marked = target && target.closest("[data-tip]");
    const figure = target && target.closest("figure.curve");
    const over = figure && !marked && target.closest("svg.picture");
    if (crossed && crossed !== figure) cross(crossed, null);
    crossed = over ? figure : null;
    if (marked) show(marked.dataset.tip, event);
    else if (over) {
      const point = nearest(figure, event);
      cross(figure, point);
      show(`step ${point[2]}\n${figure.dataset.name} ${point[3]}`, event);
    } else tip.hidden = true;
  };
  addEventListener("pointermove", look);
  addEventListener("pointerdown", look);
  document.addEventListener("pointerleave", () => { tip.hidden = true; });

  const choice = document.getElementById("metric");
  if (choice) {
    const choose = () => {
      for (const figure of document.querySelectorAll("figure.curve")) {
        figure.hidden = figure.dataset.curve !== choice.value;
      }
    };
    choice.addEventListener("change", choose);
    choose();
  }
})();
