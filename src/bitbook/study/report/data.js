// What the page knows, and how it is written.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const find = id => document.getElementById(id);
const whole = number => Math.round(number).toLocaleString("en");
const span = (a, b) => whole(a) === whole(b) ? whole(a) : whole(a) + "–" + whole(b);

function built(node, attributes, content) {             // text only ever becomes text, never markup
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...[content].flat().map(part => part instanceof Node ? part : String(part)));
  return node;
}
const element = (tag, content = [], attributes = {}) => built(document.createElement(tag), attributes, content);
const drawing = (tag, attributes = {}, content = []) =>
  built(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, content);

function accuracy(score) {                              // mean, low, high, least, most; one seed has no interval
  if (!score) return "";
  const [mean, low] = score;
  return mean.toFixed(2) + (low === null ? "" : " ± " + (mean - low).toFixed(2));
}
const range = score => "range " + score[3].toFixed(2) + "–" + score[4].toFixed(2);
const seeds = point => point.seeds.length + (point.seeds.length > 1 ? " seeds" : " seed");

const FIXED = 0, CODED = 1;
const points = data.points.map((point, index) => {
  const method = data.methods[point.method], group = data.groups[point.group];
  const recipe = method.name + ", " + point.name;
  const words = [recipe, point.family, point.model, group.dataset, group.start, point.training].join(" ").toLowerCase()
    .split(/[\s,()]+/);
  return {...point, index, method, methodIndex: point.method, group, groupIndex: point.group, recipe, words,
          size: [point.bytes[1], point.coded]};
});
const state = {                                         // what the reader has chosen
  group: data.main, size: FIXED, stretch: true, only: false, large: null, alone: null, column: 1, down: false};
