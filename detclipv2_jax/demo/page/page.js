"use strict";
// The page's state is `page`; the server knows photos and the model, and keeps nothing of who asks what.

const $ = (id) => document.getElementById(id);
const DRAG_COLOR = "#d55e00";
const PLACE_IOU = 0.5; // boxes that overlap more are one place
const DELAY_MS = 400; // after the last key
const QUICK_S = 1.0; // a model that answers within it is asked while words are typed
const NUM_WEAK = 3; // boxes named where none has the score asked for
const page = { photos: [], photo: null, image: null, rows: [], examples: [], phrases: [], phrase: null, seconds: 0, asked: 0,
  looks: Object.create(null), labels: [] }; // looks: of names, the server's, those of its pictures

async function ask(path, body, headers = { "Content-Type": "application/json" }) {
  const options = body === undefined ? {} : { method: "POST", body, headers };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer; is it still running?");
  }
  if (!answer.ok) {
    let message = `the server says ${answer.status}`;
    try { message = (await answer.json()).error; } catch { /* no JSON: the status is all there is */ }
    throw new Error(message);
  }
  return answer;
}

// Runs what a click or key asked for; what goes wrong is shown, not lost.
async function attempt(task) {
  $("error").hidden = true;
  try {
    await task();
  } catch (error) {
    $("error").textContent = error.message;
    $("error").hidden = false;
    $("status").textContent = "";
  }
}

function request() {
  if (!page.photo) throw new Error("choose a photo first");
  const examples = page.examples.map(({ name, photo, box }) => ({ name, photo, box }));
  return { photo: page.photo.id, words: $("words").value, vocabulary: $("vocabulary").value, examples };
}

const hasQuery = () => Boolean($("words").value.trim() || $("vocabulary").value || page.examples.length);

async function find() {
  const body = request();
  const asked = ++page.asked;
  $("status").textContent = "looking…";
  const answer = await (await ask("api/find", JSON.stringify(body))).json();
  if (asked !== page.asked) return; // a newer question is under way
  Object.assign(page.looks, answer.looks);
  Object.assign(page, { rows: answer.rows, seconds: answer.seconds, numNames: answer.num_names, phrase: null, body });
  draw();
}

// Shows the photo alone: nothing is asked of it.
function forget() {
  Object.assign(page, { rows: [], body: null, asked: page.asked + 1 });
  $("status").textContent = "";
  draw();
}

function overlap(a, b) {
  const width = Math.min(a[0] + a[2], b[0] + b[2]) - Math.max(a[0], b[0]);
  const height = Math.min(a[1] + a[3], b[1] + b[3]) - Math.max(a[1], b[1]);
  if (width <= 0 || height <= 0) return 0;
  return (width * height) / (a[2] * a[3] + b[2] * b[3] - width * height);
}

// The rows that are drawn, best first.
function shownRows(rows) {
  const threshold = Number($("threshold").value);
  const kept = [];
  for (const row of rows) {
    if (row.score < threshold) break;
    if (!$("one-name").checked || kept.every((better) => overlap(better.bbox, row.bbox) <= PLACE_IOU)) kept.push(row);
  }
  return kept;
}

function labelOf(row) {
  return `${legible(row.name, page.looks[row.name].plain)} ${row.score.toFixed(2)}`;
}

const boxOf = (row, label) => ({ bbox: row.bbox, look: page.looks[row.name], label });

function draw() {
  const canvas = $("canvas"), context = canvas.getContext("2d");
  if (!page.image) return;
  const factor = Math.min(900 / page.photo.width, 640 / page.photo.height);
  canvas.width = Math.round(page.photo.width * factor);
  canvas.height = Math.round(page.photo.height * factor);
  const phrase = page.phrase;
  context.drawImage(phrase ? phrase.image : page.image, 0, 0, canvas.width, canvas.height);
  $("scale").hidden = !phrase;
  const rows = phrase ? [] : shownRows(page.rows);
  page.labels = drawBoxes(context, factor, rows.map((row) => boxOf(row, labelOf(row))));
  if (phrase) {
    const [x1, y1, x2, y2] = phrase.box, bbox = [x1, y1, x2 - x1, y2 - y1];
    page.labels = drawBoxes(context, factor, [{ bbox, look: phrase.look, label: phrase.shown }]);
    $("low").textContent = phrase.low.toFixed(2);
    $("high").textContent = phrase.high.toFixed(2);
    $("status").textContent = `“${phrase.shown}”: similarity ${phrase.score.toFixed(2)} at its best region`;
  }
  if (page.drag) drawBoxes(context, factor, [{ bbox: page.drag, look: { color: DRAG_COLOR } }]);
  canvas.dataset.boxes = rows.length;
  if (!phrase) list(rows);
  for (const [i, button] of [...$("phrases").children].entries()) button.setAttribute("aria-pressed", page.phrases[i] === phrase);
}

function list(rows) {
  $("found").replaceChildren(...rows.map((row) => {
    const item = document.createElement("li"), swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = page.looks[row.name].color;
    item.append(swatch, labelOf(row));
    return item;
  }));
  if (!page.body) return;
  const least = Number($("threshold").value).toFixed(2);
  const best = page.rows.slice(0, NUM_WEAK).map(labelOf).join(", ");
  const said = rows.length ? `${rows.length} found` : best ? `nothing scores ${least}; the best: ${best}` : "nothing found";
  $("status").textContent = `${said}, of ${page.numNames} names, in ${page.seconds.toFixed(2)} s`;
}

function loaded(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("a picture could not be loaded"));
    image.src = url;
  });
}

async function choose(photo) {
  const image = await loaded(`photo/${photo.id}`);
  Object.assign(page, { photo, image, rows: [], phrases: [], phrase: null, body: null });
  $("phrases").replaceChildren();
  $("found").replaceChildren();
  for (const button of $("photos").children) button.setAttribute("aria-pressed", button.dataset.id === photo.id);
  $("status").textContent = `${photo.name}, ${photo.width} × ${photo.height} px`;
  draw();
  if (hasQuery()) await find();
}

function addPhoto(photo, { first = false } = {}) {
  page.photos.push(photo);
  const button = document.createElement("button"), image = document.createElement("img");
  button.type = "button";
  button.dataset.id = photo.id;
  button.title = photo.name;
  image.src = `thumb/${photo.id}`;
  image.alt = photo.name;
  button.append(image);
  button.addEventListener("click", () => attempt(() => choose(photo)));
  if (first) $("photos").prepend(button);
  else $("photos").append(button);
}

async function upload(file) {
  if (file.size > page.maxBytes) throw new Error(`${file.name} has more than ${page.maxBytes / 1e6} MB; choose a smaller one`);
  $("status").textContent = "uploading…";
  const headers = { "Content-Type": "application/octet-stream", "X-Name": encodeURIComponent(file.name) };
  const photo = await (await ask("api/upload", file, headers)).json();
  addPhoto(photo, { first: true });
  await choose(photo);
}

// --- a caption

async function align() {
  const body = request(), field = $("caption");
  const marked = field.value.slice(field.selectionStart, field.selectionEnd).trim();
  $("status").textContent = "comparing…";
  const answer = await (await ask("api/align", JSON.stringify({ photo: body.photo, caption: field.value, phrase: marked }))).json();
  for (const phrase of answer.phrases) {
    phrase.image = await loaded(phrase.map);
    phrase.shown = legible(phrase.text, phrase.look.plain);
  }
  page.phrases = answer.phrases;
  $("phrases").replaceChildren(...answer.phrases.map((phrase) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = phrase.shown;
    button.addEventListener("click", () => {
      page.phrase = page.phrase === phrase ? null : phrase; // a second click shows the boxes again
      draw();
    });
    return button;
  }));
  page.phrase = answer.phrases[0];
  draw();
}

// --- examples

function point(event) {
  const canvas = $("canvas"), area = canvas.getBoundingClientRect();
  const at = (value, low, size, most) => Math.max(0, Math.min(most, ((value - low) / size) * most));
  return [at(event.clientX, area.left, area.width, page.photo.width), at(event.clientY, area.top, area.height, page.photo.height)];
}

function drawing(on) {
  $("draw-example").setAttribute("aria-pressed", on);
  $("canvas").classList.toggle("drawing", on);
}

const isDrawing = () => $("draw-example").getAttribute("aria-pressed") === "true";

function dragged(event) {
  const [x, y] = point(event), [left, top] = page.from;
  page.drag = [Math.min(x, left), Math.min(y, top), Math.abs(x - left), Math.abs(y - top)];
  draw();
}

async function dropped(event) {
  dragged(event);
  const [x, y, width, height] = page.drag;
  page.from = page.drag = null;
  draw();
  if (width < 1 || height < 1) throw new Error("the box has no area: press in one corner, pull to the other, let go");
  const name = $("example-name").value.trim();
  if (!name) throw new Error("give the example a name");
  page.examples.push({ name, photo: page.photo.id, box: [x, y, x + width, y + height], image: page.image, width: page.photo.width });
  drawing(false);
  listExamples();
  await find();
}

function listExamples() {
  $("examples").replaceChildren(...page.examples.map((example, i) => {
    const item = document.createElement("li"), canvas = document.createElement("canvas"), remove = document.createElement("button");
    const factor = example.image.naturalWidth / example.width, [x1, y1, x2, y2] = example.box.map((side) => side * factor);
    canvas.width = 80;
    canvas.height = Math.max(1, Math.round((80 * (y2 - y1)) / (x2 - x1)));
    canvas.getContext("2d").drawImage(example.image, x1, y1, x2 - x1, y2 - y1, 0, 0, canvas.width, canvas.height);
    remove.type = "button";
    remove.textContent = "remove";
    remove.addEventListener("click", () => attempt(async () => {
      page.examples.splice(i, 1);
      listExamples();
      if (hasQuery()) await find();
      else forget();
    }));
    item.append(canvas, `${example.name} `, remove);
    return item;
  }));
}

async function findEverywhere() {
  const body = request();
  $("everywhere").replaceChildren();
  for (const [i, photo] of page.photos.entries()) {
    $("status").textContent = `photo ${i + 1} of ${page.photos.length}…`;
    const answer = await (await ask("api/find", JSON.stringify({ ...body, photo: photo.id }))).json();
    Object.assign(page.looks, answer.looks);
    const rows = shownRows(answer.rows);
    if (!rows.length) continue;
    const button = document.createElement("button"), canvas = document.createElement("canvas"), caption = document.createElement("span");
    const image = await loaded(`photo/${photo.id}`), factor = 320 / photo.width;
    canvas.width = 320;
    canvas.height = Math.round(photo.height * factor);
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    drawBoxes(canvas.getContext("2d"), factor, rows.map((row) => boxOf(row, "")));
    caption.textContent = labelOf(rows[0]) + (rows.length > 1 ? ` and ${rows.length - 1} more` : "");
    button.type = "button";
    button.title = photo.name;
    button.dataset.score = rows[0].score;
    button.append(canvas, caption);
    button.addEventListener("click", () => attempt(() => choose(photo)));
    const after = [...$("everywhere").children].find((other) => Number(other.dataset.score) < rows[0].score);
    $("everywhere").insertBefore(button, after ?? null); // best first
  }
  $("status").textContent = `on ${$("everywhere").children.length} of ${page.photos.length} photos`;
}

// --- results as files

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function result() {
  if (!page.body) throw new Error("nothing was looked for yet");
  return page.rows.filter((row) => row.score >= Number($("threshold").value));
}

async function savePicture() {
  result();
  const body = JSON.stringify({ ...page.body, threshold: Number($("threshold").value) });
  save(await (await ask("api/picture", body)).blob(), "found.png");
}

// --- what starts all that

function listen() {
  const submits = { ask: find, tell: align };
  for (const [id, task] of Object.entries(submits)) {
    $(id).addEventListener("submit", (event) => { event.preventDefault(); attempt(task); });
  }
  $("show").addEventListener("submit", (event) => event.preventDefault());
  let timer = 0;
  $("words").addEventListener("input", () => {
    clearTimeout(timer);
    if (!hasQuery()) forget();
    else if (page.photo && page.seconds < QUICK_S) timer = setTimeout(() => attempt(find), DELAY_MS);
  });
  $("words").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); clearTimeout(timer); attempt(find); }
  });
  $("vocabulary").addEventListener("change", () => { if (page.photo && hasQuery()) attempt(find); });
  $("threshold").addEventListener("input", () => {
    $("threshold-value").textContent = Number($("threshold").value).toFixed(2);
    draw();
  });
  $("one-name").addEventListener("change", draw);
  $("upload").addEventListener("change", () => {
    const [file] = $("upload").files;
    if (file) attempt(() => upload(file));
    $("upload").value = "";
  });
  $("draw-example").addEventListener("click", () => drawing(!isDrawing()));
  $("find-everywhere").addEventListener("click", () => attempt(findEverywhere));
  $("json").addEventListener("click", () => attempt(async () => {
    save(new Blob([JSON.stringify(result(), null, 1)], { type: "application/json" }), "found.json");
  }));
  $("picture").addEventListener("click", () => attempt(savePicture));
  const canvas = $("canvas");
  canvas.addEventListener("pointerdown", (event) => {
    if (!isDrawing() || !page.photo) return;
    page.phrase = null;
    page.from = point(event);
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => { if (page.from) dragged(event); });
  canvas.addEventListener("pointerup", (event) => { if (page.from) attempt(() => dropped(event)); });
}

attempt(async () => {
  listen();
  const start = await (await ask("api/start")).json();
  page.maxBytes = start.max_bytes;
  $("model").textContent = start.model;
  for (const name of start.vocabularies) $("vocabulary").append(new Option(name, name));
  for (const photo of start.photos) addPhoto(photo);
  if (page.photos.length) await choose(page.photos[0]);
  else $("status").textContent = "Upload a photo.";
  document.body.dataset.ready = "true";
});
