"use strict";
// Boxes and their labels on a canvas: no label over another, each in letters that this browser can show.

const FONT = "14px system-ui, sans-serif", LABEL_HEIGHT = 20; // px
const NUM_LABELS = 40; // of boxes; the list names them all
const NO_LETTER = "\u{10fffd}"; // what no font has
const clamp = (value, low, high) => Math.max(low, Math.min(value, high));
const drawable = new Map(); // letter -> whether a font of this browser has it

function pictureOf(letter) {
  const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
  canvas.width = canvas.height = 24;
  context.font = FONT;
  context.fillText(letter, 4, 18);
  return canvas.toDataURL();
}

function hasLetters(text) {
  for (const letter of text) {
    if (!drawable.has(letter)) drawable.set(letter, pictureOf(letter) !== pictureOf(NO_LETTER));
  }
  return [...text].every((letter) => drawable.get(letter));
}

// A text as this browser can show it: `plain`, the server's spelling, where a letter has no font.
const legible = (text, plain) => (hasLetters(text) ? text : plain);

function shortened(context, text, width) {
  const letters = [...text];
  if (context.measureText(text).width <= width) return text;
  while (letters.length && context.measureText(`${letters.join("")}…`).width > width) letters.pop();
  return `${letters.join("")}…`;
}

// The corner of a label that covers no other one, inside the canvas: at its box or, where all is taken, near it; null: no room.
function placeLabel([x1, y1, x2, y2], width, canvas, taken) {
  const height = LABEL_HEIGHT, right = Math.max(0, canvas.width - width), low = Math.max(0, canvas.height - height);
  const free = ([x, y]) => taken.every((other) =>
    x >= other.left + other.width || x + width <= other.left || y >= other.top + height || y + height <= other.top);
  const xs = [x1, x2 - width, (x1 + x2 - width) / 2, x2, x1 - width];
  const ys = [y1 - height, y1, y2, y2 - height, (y1 + y2 - height) / 2];
  const found = ys.flatMap((y) => xs.map((x) => [clamp(x, 0, right), clamp(y, 0, low)])).find(free);
  if (found) return found;
  let nearest = null, least = Infinity;
  for (let y = 0; y <= low; y += 6) {
    for (let x = 0; x <= right; x += 6) {
      const gap = Math.hypot(Math.max(0, x1 - x - width, x - x2), Math.max(0, y1 - y - height, y - y2));
      if (gap < least && free([x, y])) [nearest, least] = [[x, y], gap];
    }
  }
  return nearest;
}

// Draws boxes with their labels, best first, and returns where the labels are.
function drawBoxes(context, factor, boxes) {
  const { canvas } = context, line = Math.max(2, canvas.width / 400), labels = [];
  for (const { bbox, look } of [...boxes].reverse()) {
    for (const [width, color] of [[line + 2, "#fff"], [line, look.color]]) { // a rim on any background
      context.lineWidth = width;
      context.strokeStyle = color;
      context.strokeRect(...bbox.map((side) => side * factor));
    }
  }
  context.font = FONT;
  for (const { bbox, look, label } of boxes.filter((box) => box.label).slice(0, NUM_LABELS)) {
    const [x, y, wide, high] = bbox.map((side) => side * factor), text = shortened(context, label, canvas.width - 8);
    const width = context.measureText(text).width + 8, corners = [x, y, x + wide, y + high];
    const place = placeLabel(corners, width, canvas, labels);
    if (place) labels.push({ left: place[0], top: place[1], width, height: LABEL_HEIGHT, text, look, corners });
  }
  for (const { left, top, width, height, look, corners: [x1, y1, x2, y2] } of labels) { // from its box to one that stands away
    const x = left + width / 2, y = top + height / 2;
    context.lineWidth = 2;
    context.strokeStyle = look.color;
    context.beginPath();
    context.moveTo(clamp(x, x1, x2), clamp(y, y1, y2));
    context.lineTo(x, y);
    if (left > x2 || left + width < x1 || top > y2 || top + height < y1) context.stroke();
  }
  for (const { left, top, width, height, text, look } of labels) {
    context.fillStyle = look.color;
    context.fillRect(left, top, width, height);
    context.fillStyle = look.ink;
    context.fillText(text, left + 4, top + 15);
  }
  return labels;
}
