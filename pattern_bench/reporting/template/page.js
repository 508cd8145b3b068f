"use strict";

// The theme: the system's, until the button says otherwise.
const theme = document.getElementById("theme");
const dark = () => document.documentElement.dataset.theme === "dark" ||
  (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
const tell = () => theme.setAttribute("aria-pressed", String(dark()));
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  tell();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", tell);
tell();

// Tables: numbers by their value, everything else as text; what has no value comes last either way.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.querySelectorAll("thead th")];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    const numeric = head.classList.contains("number");
    const value = (row) => {
      const field = row.cells[column];
      const given = field.dataset.value ?? (numeric ? "" : field.textContent.trim());
      return given !== "" && !isNaN(given) ? Number(given) : given;
    };
    const order = (one, other) => {
      if (one === "" || other === "") return (one === "") - (other === "");
      const sign = down ? -1 : 1;
      if (typeof one === "number" && typeof other === "number") return sign * (one - other);
      return sign * String(one).localeCompare(String(other), "en", { numeric: true });
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort((a, b) => order(value(a), value(b))));
    heads.forEach((each) => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
  }));
}

// Figures: a cursor that the pointer, a finger or the arrow keys move from point to point; series can be hidden.
for (const figure of document.querySelectorAll("figure:has(.plot)")) {
  const plot = figure.querySelector(".plot"), svg = plot.querySelector("svg");
  const reading = figure.querySelector(".reading"), cursor = svg.querySelector(".cursor");
  const series = JSON.parse(plot.querySelector("script").textContent);
  const hidden = new Set();
  let at = null;  // [series, point]

  const visible = () => series.map((_, i) => i).filter((i) => !hidden.has(i) && series[i].length);
  const show = (place) => {
    at = place;
    cursor.setAttribute("visibility", place ? "visible" : "hidden");
    if (!place) return;
    const [x, y, text] = series[place[0]][place[1]];
    cursor.setAttribute("cx", x);
    cursor.setAttribute("cy", y);
    reading.textContent = text;
  };
  const nearest = (points, distance) =>
    points.reduce((best, point, i) => distance(point) < distance(points[best]) ? i : best, 0);
  const under = (event) => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    let best = null, least = Infinity;
    for (const i of visible()) {
      const distance = ([px, py]) => (px - x) ** 2 + (py - y) ** 2;
      const point = nearest(series[i], distance), far = distance(series[i][point]);
      if (far < least) [best, least] = [[i, point], far];
    }
    if (best) show(best);
  };
  svg.addEventListener("pointermove", under);
  svg.addEventListener("pointerdown", under);

  const move = (key) => {
    const shown = visible();
    if (!shown.length) return false;
    if (!at || hidden.has(at[0])) { show([shown[0], 0]); return true; }
    const [one, point] = at, last = series[one].length - 1;
    const along = { ArrowLeft: Math.max(0, point - 1), ArrowRight: Math.min(last, point + 1), Home: 0, End: last };
    if (key in along) { show([one, along[key]]); return true; }
    const step = { ArrowUp: -1, ArrowDown: 1 }[key];
    if (!step) return false;
    const next = shown[(shown.indexOf(one) + step + shown.length) % shown.length], x = series[one][point][0];
    show([next, nearest(series[next], ([px]) => Math.abs(px - x))]);
    return true;
  };
  plot.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key) && move(event.key)) {
      event.preventDefault();
      const x = Number(cursor.getAttribute("cx")), room = plot.clientWidth;
      if (x < plot.scrollLeft + 40 || x > plot.scrollLeft + room - 40) plot.scrollLeft = x - room / 2;
    }
  });

  for (const button of figure.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const one = Number(button.dataset.series), was = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!was));
      if (was) hidden.add(one); else hidden.delete(one);
      svg.querySelector(`g[data-series="${one}"]`).setAttribute("visibility", was ? "hidden" : "visible");
      if (was && at && at[0] === one) show(null);
    });
  }
}
