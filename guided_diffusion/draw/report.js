// report.html: sorts and filters the table of cases, and draws a case that is opened.
//
// report.py puts this in the page as it is, so that the page's security policy can name its hash, and beside it blocks of
// JSON: #colours (map, outlines and ensemble as [r, g, b] from 0 to 255; line and axis in hex) and, for row i of the
// table, #case<i>: pictures as PNGs in base64 (image; masks: the raters' and then the members', below one another; mean:
// of all members), their height and width, step (of how many pixels one is kept), raters and members (how many), scores
// by name, and calibration (a row each of pixels, predicted and observed, a column a bin).
"use strict";
const $ = query => document.querySelector(query), body = $("#cases tbody"), box = $("dialog"), view = $("#view");
const data = id => JSON.parse(document.getElementById(id).textContent);
const {map, outlines: colours, ensemble, line, axis} = data("colours");
const rows = [...body.rows], heads = [...$("#cases thead tr").cells];
rows.forEach((row, i) => { row.dataset.i = i; row.tabIndex = -1; });
let current = rows[0];

// ---- the table ----
const visible = () => [...body.rows].filter(row => !row.hidden);
function choose(row, focus) {
  current.tabIndex = -1; current = row; row.tabIndex = 0;
  if (focus) { row.focus(); row.scrollIntoView({block: "nearest"}); }
}
choose(current);
const words = new Intl.Collator("en", {numeric: true});
heads.forEach((head, i) => head.firstChild?.addEventListener("click", () => {
  const sign = head.ariaSort === "ascending" ? -1 : 1, numbers = rows.some(row => "v" in row.cells[i].dataset);
  const key = row => numbers ? parseFloat(row.cells[i].dataset.v ?? "NaN") : row.cells[i].textContent;
  const keyed = rows.map(row => [key(row), row]);
  keyed.sort(([a], [b]) => !numbers ? sign * words.compare(a, b)
    : isNaN(a) || isNaN(b) ? isNaN(a) - isNaN(b) : sign * (a - b));
  body.append(...keyed.map(([_, row]) => row));
  heads.forEach(other => { if (other.firstChild) other.ariaSort = "none"; });
  head.ariaSort = sign > 0 ? "ascending" : "descending";
  if (visible().length) choose(visible()[0]);
}));
$("#filter").addEventListener("input", event => {
  const text = event.target.value.toLowerCase();
  for (const row of rows) row.hidden = !row.cells[1].textContent.toLowerCase().includes(text);
  const found = visible();
  $("#found").textContent = `${found.length} of ${rows.length}`;
  if (found.length) choose(found[0]);
});
body.addEventListener("click", event => {
  if (!getSelection().toString()) open(event.target.closest("tr"));
});
body.addEventListener("keydown", event => {
  const list = visible(), at = list.indexOf(current);
  const to = {ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + 10, PageUp: at - 10, Home: 0,
    End: list.length}[event.key];
  if (event.key === "Enter" || event.key === " ") open(current);
  else if (to === undefined) return;
  else choose(list[Math.max(0, Math.min(to, list.length - 1))], true);
  event.preventDefault();
});

// ---- a case ----
function step(by) { const list = visible(), row = list[list.indexOf(current) + by]; if (row) open(row); }
$("#previous").onclick = () => step(-1); $("#next").onclick = () => step(1); $("#close").onclick = () => box.close();
box.addEventListener("keydown", event => {
  const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (by) { step(by); event.preventDefault(); }
});
box.addEventListener("close", () => choose(current, true));
async function levels(png) { // [pixels] of a grey PNG, 0 to 255
  const image = new Image(); image.src = "data:image/png;base64," + png; await image.decode();
  const canvas = new OffscreenCanvas(image.width, image.height), context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const rgba = context.getImageData(0, 0, image.width, image.height).data;
  return Uint8Array.from({length: rgba.length / 4}, (_, i) => rgba[4 * i]);
}
function figure(caption, ...nodes) {
  const element = document.createElement("figure"), text = document.createElement("figcaption");
  text.textContent = caption;
  element.append(...(caption ? [text] : []), ...nodes);
  return element;
}
async function open(row) {
  choose(row);
  const list = visible(), c = data("case" + row.dataset.i);
  $("#previous").disabled = row === list[0]; $("#next").disabled = row === list.at(-1);
  if (!box.open) box.showModal();
  const [scan, sprite, mean] = await Promise.all([c.image, c.masks, c.mean].map(levels));
  if (row !== current) return; // another case was asked for meanwhile
  $("#name").textContent = row.cells[1].textContent;
  $("#position").textContent = `${list.indexOf(row) + 1} of ${list.length}`;
  const w = c.width, h = c.height, n = w * h, zoom = side => Math.ceil(side / Math.max(w, h));
  const masks = Array.from({length: sprite.length / n}, (_, i) => sprite.subarray(i * n, (i + 1) * n));
  const raters = masks.slice(0, c.raters), members = masks.slice(c.raters);
  // colour(i): [r, g, b] of pixel i; most: end of a colour bar
  function tile(caption, scale, colour, {outlines = [], of = colours, most} = {}) {
    const canvas = document.createElement("canvas"), plain = new OffscreenCanvas(w, h), pixels = new ImageData(w, h);
    for (let i = 0; i < n; i++) pixels.data.set([...colour(i), 255], 4 * i);
    plain.getContext("2d").putImageData(pixels, 0, 0);
    canvas.width = w * scale; canvas.height = h * scale; canvas.role = "img"; canvas.ariaLabel = caption;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false; context.drawImage(plain, 0, 0, canvas.width, canvas.height);
    const t = Math.min(scale, 2), far = scale - t; // thickness of a line
    const sides = [[-1, 0, 0, 0, t, scale], [1, 0, far, 0, t, scale], [0, -1, 0, 0, scale, t],
      [0, 1, 0, far, scale, t]]; // a neighbour, and the rectangle of the line towards it
    for (let i = 0; i < n && outlines.length; i++) for (const [dx, dy, left, top, wide, high] of sides) {
      const x = i % w, y = (i - x) / w, inside = x + dx >= 0 && x + dx < w && y + dy >= 0 && y + dy < h;
      const own = outlines.flatMap((mask, k) => mask[i] && !(inside && mask[i + dx + dy * w]) ? [k] : []);
      if (!own.length) continue;
      context.fillStyle = `rgb(${of[own[((x + 2 * y) >> 2) % own.length] % of.length]})`; // where several meet: in turn
      context.fillRect(x * scale + left, y * scale + top, wide, high);
    }
    return most ? figure(caption, canvas, bar(canvas.width, most)) : figure(caption, canvas);
  }
  const grey = i => [scan[i], scan[i], scan[i]], tint = (mask, rgb) => i => mask[i] ? rgb : [0, 0, 0];
  const ramp = share => { // share(i) in [0, 1]
    const last = map.length - 1;
    return i => { const at = Math.min(1, share(i)) * last, low = Math.min(Math.floor(at), last - 1);
      return map[low].map((from, k) => from + (at - low) * (map[low + 1][k] - from)); };
  };
  function bar(wide, most) {
    const template = document.createElement("template"), step = wide / 64, place = `y="21" text-anchor=`;
    template.innerHTML = `<svg class="scale" width="${wide}" height="24" viewBox="0 0 ${wide} 24" font-size="12"
      fill="#111" role="img" aria-label="colours from 0 to ${most}">${Array.from({length: 64}, (_, k) =>
        `<rect x="${k * step}" width="${step + 1}" height="9" fill="rgb(${ramp(() => k / 63)(0).map(Math.round)})"/>`
      ).join("")}<text x="0" ${place}"start">0</text><text x="${wide / 2}" ${place}"middle">${most / 2}</text>
      <text x="${wide}" ${place}"end">${most}</text></svg>`;
    return template.content;
  }
  const large = zoom(160), small = zoom(100);
  const p = i => mean[i] / 255, votes = i => raters.reduce((sum, mask) => sum + (mask[i] > 0), 0) / raters.length;
  const grid = (parts, more = "") => Object.assign(figure("", ...parts), {className: "grid " + more});
  const numbers = document.createElement("table"), s = c.scores;
  numbers.className = "numbers";
  for (const i of heads.keys()) if (i > 1 && row.cells[i].textContent) {
    const entry = numbers.insertRow(), name = document.createElement("th");
    name.textContent = heads[i].textContent;
    entry.append(name);
    entry.insertCell().textContent = row.cells[i].textContent;
  }
  const charts = [];
  if ("GED_unbiased" in s) { // else the masks are no independent draws, which both charts need
    const ged = Array.from({length: c.members}, (_, k) =>
      [k + 1, s.GED_unbiased + s.diversity / (k + 1) + s.rater_diversity / c.raters]);
    const highest = Math.max(0.01, ...ged.map(([_, value]) => value));
    const [count, predicted, observed] = c.calibration;
    const bins = count.map((k, i) => [predicted[i] / k, observed[i] / k]).filter((_, i) => count[i]);
    charts.push(figure("expected GED against masks drawn", chart(ged, c.members, highest)),
      figure("calibration: share of raters against share of masks", chart(bins, 1, 1, true)));
  }
  const notes = [c.members > members.length && `the first ${members.length} of ${c.members} masks`,
    c.step > 1 && `one pixel of every ${c.step} x ${c.step}`].filter(Boolean).join("; ");
  view.replaceChildren(
    grid([tile("scan", large, grey), tile("raters' outlines", large, grey, {outlines: raters}),
      tile("share of raters", large, ramp(votes), {most: 1}),
      tile("outline of half of the masks", large, grey, {outlines: [mean.map(v => v > 127)], of: [ensemble]}),
      tile("probability", large, ramp(p), {most: 1}),
      tile("spread (std)", large, ramp(i => 2 * Math.sqrt(p(i) * (1 - p(i)))), {most: 0.5})], "overview"),
    notes && "Shown: " + notes,
    grid(raters.map((mask, i) => tile(`rater ${i}`, small, tint(mask, colours[i % colours.length])))),
    grid(members.map((mask, i) => tile(`mask ${i}`, small, tint(mask, [255, 255, 255])))),
    grid([figure("scores", numbers), ...charts]));
  box.scrollTop = 0;
}
function chart(points, right, top, diagonal) {
  const x = v => 40 + 240 * (diagonal ? v : (v - 1) / Math.max(1, right - 1));
  const y = v => 180 - 165 * Math.max(0, v) / top;
  const at = points.map(([a, b]) => [x(a), y(b)]), template = document.createElement("template");
  template.innerHTML = `<svg width="300" height="205" font-size="12" fill="#111"><path d="M40 15V180H280" fill="none"
    stroke="${axis}"/>${diagonal ? `<path d="M40 180L280 15" stroke="${axis}" stroke-dasharray="4"/>` : ""}
    <polyline points="${at.join(" ")}" fill="none" stroke="${line}" stroke-width="2"/>
    ${at.map(([a, b]) => `<circle cx="${a}" cy="${b}" r="3" fill="${line}"/>`).join("")}
    <text x="34" y="184" text-anchor="end">0</text><text x="34" y="20" text-anchor="end">${+top.toFixed(2)}</text>
    <text x="40" y="198" text-anchor="middle">${diagonal ? 0 : 1}</text>
    <text x="280" y="198" text-anchor="middle">${right}</text></svg>`;
  return template.content;
}
$("#place").textContent = ` This page: ${decodeURI(location.pathname)}`; // last: throws if that is no UTF-8
