"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const one = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function drawn(name, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const figures = (value, digits = 3) => (value === null ? "–" : value.toFixed(digits));

/* The table: one row a class, sorted, filtered, with the gain of one system over another. */

const body = document.querySelector("#table tbody");
const rows = data.classes.map((found, index) => {
  const button = element("button", { type: "button", title: found.name }, found.name);
  button.addEventListener("click", () => choose(index));
  const gain = one("run") ? [element("td")] : [];
  const cells = [element("td", {}, found.clips.toLocaleString("en")), ...found.ap.map((ap) => element("td", {}, figures(ap)))];
  const node = element("tr", {}, element("th", { scope: "row" }, button), ...cells, ...gain);
  return { found, node, button, gain: gain[0], difference: null };
});
let order = { key: "clips", falls: true };

function valueOf(row, key) {
  if (key === "name") return row.found.name.toLowerCase();
  if (key === "clips") return row.found.clips;
  return key === "gain" ? row.difference : row.found.ap[Number(key.slice(2))];
}

function sort() {
  const direction = order.falls ? -1 : 1;
  rows.sort((left, right) => {
    const [a, b] = [valueOf(left, order.key), valueOf(right, order.key)];
    if (a === null || b === null) return (a === null) - (b === null);
    return a < b ? -direction : a > b ? direction : 0;
  });
  body.append(...rows.map((row) => row.node));
  for (const head of document.querySelectorAll("#table thead th")) {
    const own = head.firstElementChild.dataset.key === order.key;
    head.setAttribute("aria-sort", own ? (order.falls ? "descending" : "ascending") : "none");
  }
}

function filter() {
  const wanted = one("filter").value.trim().toLowerCase(), least = Number(one("least").value) || 0;
  let shown = 0;
  for (const row of rows) {
    const named = row.found.name.toLowerCase().includes(wanted) || row.found.id.toLowerCase() === wanted;
    row.node.hidden = !named || row.found.clips < least;
    shown += !row.node.hidden;
  }
  const visible = rows.filter((row) => !row.node.hidden && row.difference !== null);
  const count = (test) => visible.filter((row) => test(row.difference)).length;
  const mean = visible.reduce((sum, row) => sum + row.difference, 0) / visible.length;
  const gains = visible.length && one("run")
    ? `; ${count((gain) => gain > 0)} gain, ${count((gain) => gain < 0)} lose, ${mean < 0 ? "−" : "+"}${Math.abs(mean).toFixed(4)} in the mean` : "";
  one("shown").textContent = `${shown} of ${rows.length} classes${gains}`;
}

function gainBar(gain, widest) {
  const width = widest ? (Math.abs(gain) / widest) * 29 : 0;
  const bar = drawn("rect", { class: gain < 0 ? "down" : "up", x: gain < 0 ? 30 - width : 30, y: 2, width, height: 8 });
  return drawn("svg", { class: "bar", viewBox: "0 0 60 12", "aria-hidden": "true" }, bar, drawn("path", { class: "axis", d: "M30 0V12" }));
}

function compare() {
  if (!one("run")) return;
  const [run, against] = [Number(one("run").value), Number(one("against").value)];
  for (const row of rows) {
    const [own, other] = [row.found.ap[run], row.found.ap[against]];
    row.difference = own === null || other === null ? null : own - other;
  }
  const widest = Math.max(...rows.map((row) => Math.abs(row.difference ?? 0)));
  for (const row of rows) {
    if (row.difference === null) { row.gain.replaceChildren("–"); continue; }
    const text = `${row.difference < 0 ? "−" : "+"}${Math.abs(row.difference).toFixed(3)}`;
    const kind = row.difference < 0 ? "down" : "up";
    row.gain.replaceChildren(element("span", { class: kind }, text), gainBar(row.difference, widest));
  }
  if (order.key === "gain") sort();
  filter();
}

for (const button of document.querySelectorAll("#table thead button")) {
  button.addEventListener("click", () => {
    const key = button.dataset.key;
    order = { key, falls: order.key === key ? !order.falls : key !== "name" };
    sort();
  });
}
for (const id of ["filter", "least"]) one(id).addEventListener("input", filter);
for (const id of ["run", "against"]) one(id)?.addEventListener("change", compare);
one("controls").addEventListener("submit", (event) => event.preventDefault());
body.addEventListener("keydown", (event) => {
  const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
  if (!step) return;
  let row = event.target.closest("tr")[step];
  while (row && row.hidden) row = row[step];
  if (row) { event.preventDefault(); row.querySelector("button").focus(); row.querySelector("button").click(); }
});

/* Precision and recall of one class. */

function choose(index) {
  const found = data.classes[index];
  for (const row of rows) {
    row.node.classList.toggle("chosen", row.found === found);
    row.button.toggleAttribute("aria-current", row.found === found);
  }
  one("chosen").textContent = found.name;
  one("hint").textContent = `${found.id} · ${found.clips} of ${data.clips} clips carry it`;
  const left = 40, top = 8, size = 300, at = (recall, precision) => `${left + recall * size},${top + (1 - precision) * size}`;
  const plot = drawn("svg", { viewBox: "0 0 352 350", role: "img", "aria-label": `Precision against recall of ${found.name}` });
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    plot.append(
      drawn("path", { class: "grid", d: `M${at(0, share)}L${at(1, share)}M${at(share, 0)}L${at(share, 1)}` }),
      drawn("text", { x: left - 6, y: top + (1 - share) * size + 4, "text-anchor": "end" }, String(share)),
      drawn("text", { x: left + share * size, y: top + size + 17, "text-anchor": "middle" }, String(share)));
  }
  plot.append(drawn("text", { x: left + size / 2, y: top + size + 36, "text-anchor": "middle" }, "recall"),
    drawn("text", { x: 0, y: 0, transform: `translate(11 ${top + size / 2}) rotate(-90)`, "text-anchor": "middle" }, "precision"));
  found.curves.forEach((curve, place) => {
    let path = "", before = 0;
    for (let point = 0; point < curve.length; point += 2) {
      const [recall, precision] = [curve[point] / 1000, curve[point + 1] / 1000];
      path += `${path ? "L" : "M"}${at(before, precision)}L${at(recall, precision)}`;
      before = recall;
    }
    plot.append(drawn("g", { class: `s${place % 6}` }, drawn("path", { class: "line", d: path })));
  });
  one("plot").replaceChildren(plot);
  const lines = data.systems.map((name, place) => {
    const swatch = drawn("svg", { class: `swatch s${place % 6}`, viewBox: "0 0 28 8", "aria-hidden": "true" }, drawn("path", { class: "line", d: "M0 4H28" }));
    return element("tr", {}, element("th", { scope: "row" }, swatch, ` ${name}`), element("td", {}, figures(found.ap[place])), element("td", {}, figures(found.auc[place])));
  });
  const heads = ["", "AP", "ROC AUC"].map((text) => element("th", { scope: "col" }, text));
  one("legend").replaceChildren(element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...lines)));
}

/* Sounds: a line over the spectrogram shows where the player is; a click there moves it. */

for (const card of document.querySelectorAll(".card")) {
  const player = card.querySelector("audio"), sound = card.querySelector(".sound");
  if (!player || !sound) continue;
  const show = () => {
    sound.classList.add("playing");
    sound.querySelector(".head").style.left = `${(100 * player.currentTime) / (player.duration || 1)}%`;
    if (!player.paused) requestAnimationFrame(show);
  };
  for (const kind of ["play", "seeked"]) player.addEventListener(kind, show);
  player.addEventListener("play", () => {
    for (const other of document.querySelectorAll("audio")) if (other !== player) other.pause();
  });
  sound.addEventListener("click", (event) => {
    const box = sound.getBoundingClientRect(), share = (event.clientX - box.left) / box.width;
    const move = () => { player.currentTime = share * player.duration; };
    if (player.readyState) move(); else player.addEventListener("loadedmetadata", move, { once: true });
    player.play();
  });
}

compare();
sort();
filter();
if (rows.length) choose(data.classes.indexOf(rows[0].found));
