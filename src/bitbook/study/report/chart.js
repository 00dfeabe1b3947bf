// Size and accuracy: a picture for each kind of method, all with the same axes.
const LEAST = 0.05;                                     // percent of error that stands for none
const TICKS = [0, 50, 70, 80, 90, 92, 95, 96, 97, 98, 99, 99.5, 99.8];
const NEAR = 28;                                        // pixels from which a point is meant
const stretched = value => -Math.log10(Math.max(100 - value, LEAST));

const star = [...Array(10).keys()].map(i => {
  const [angle, r] = [Math.PI * (i / 5 - 0.5), i % 2 ? 2 : 5];
  return (r * Math.cos(angle)).toFixed(2) + "," + (r * Math.sin(angle)).toFixed(2);
}).join(" ");
const SHAPES = [                                        // as many as page.py says
  "M-4,0 a4,4 0 1,0 8,0 a4,4 0 1,0 -8,0", "M-3.5,-3.5 h7 v7 h-7 Z", "M0,-5 L5,0 L0,5 L-5,0 Z", "M0,-4.6 L4.6,3.6 H-4.6 Z",
  "M0,4.6 L4.6,-3.6 H-4.6 Z", "M-1.6,-4.6 h3.2 v3 h3 v3.2 h-3 v3 h-3.2 v-3 h-3 v-3.2 h3 Z", "M" + star + " Z",
  "M-4.6,-4 L4.6,4 V-4 L-4.6,4 Z", "M-2.5,-4.4 h5 l2.5,4.4 l-2.5,4.4 h-5 l-2.5,-4.4 Z", "M-4.4,-2 h8.8 v4 h-8.8 Z",
];

function marker(method, attributes = {}) {
  return drawing("path", {d: SHAPES[method.shape], fill: method.color, stroke: "#fff", "stroke-width": 1, ...attributes});
}
const key = method => drawing("svg", {viewBox: "-7 -7 14 14", "aria-hidden": "true"}, marker(method));

function axes(here) {                                   // from the numbers of a group to shares of a picture, 0 to 1
  const scale = state.stretch ? stretched : value => value;
  const sizes = here.map(p => p.size[state.size]), means = here.map(p => p.test[0]);
  const bottom = scale(Math.max(0, 100 - 1.3 * Math.max(2 * LEAST, 100 - Math.min(...means))));
  const top = scale(100 - Math.max(LEAST, 0.7 * (100 - Math.max(...means))));
  const left = Math.log10(Math.min(...sizes) / 1.15), right = Math.log10(Math.max(...sizes) * 1.15);
  const x = bytes => (Math.log10(bytes) - left) / (right - left);
  const y = value => Math.min(1, Math.max(0, (scale(value) - bottom) / (top - bottom)));
  const inside = (at, share) => share(at) >= 0 && share(at) <= 1;
  const decades = [...Array(12).keys()].map(n => 10 ** n);
  const bytes = decades.flatMap(ten => [1, 2, 5].map(step => step * ten)).filter(at => inside(at, x));
  const linear = [...Array(21).keys()].map(n => 5 * n);
  const percents = (state.stretch ? TICKS : linear)
    .filter(at => scale(at) >= bottom && scale(at) <= top);
  return {x, y, bytes, percents};
}

function chart(name, members, here, best, {x, y, bytes, percents}) {
  const large = state.large === name;
  const room = find("charts").clientWidth || 1000;
  const columns = Math.max(1, Math.floor((room + 18) / 418));
  const width = Math.round(large ? room : (room - 18 * (columns - 1)) / columns);
  const height = Math.round(Math.min(large ? 0.55 * width : 0.74 * width, Math.max(300, 0.8 * window.innerHeight)));
  const [left, right, top, bottom] = [44, 8, 8, 34];
  const px = size => left + x(size) * (width - left - right), py = value => height - bottom - y(value) * (height - top - bottom);
  const at = point => [px(point.size[state.size]), py(point.test[0])];
  const path = line => "M" + line.map(p => at(p).map(v => v.toFixed(1)).join(",")).join("L");
  const svg = drawing("svg", {viewBox: `0 0 ${width} ${height}`, class: "chart"});

  const crowded = Math.ceil(bytes.length * 52 / (width - left - right));
  const fewer = bytes.filter((_, i) => i % crowded === 0);
  for (const size of fewer) {
    const label = {x: Math.min(px(size), width - right - 3.3 * whole(size).length), y: height - bottom + 14};
    svg.append(drawing("path", {d: `M${px(size)},${top}V${height - bottom}`, stroke: "#ececec"}),
               drawing("text", {...label, "text-anchor": "middle"}, whole(size)));
  }
  let last = Infinity;
  for (const value of percents) {
    const level = py(value);
    if (last - level < 13) continue;
    last = level;
    svg.append(drawing("path", {d: `M${left},${level}H${width - right}`, stroke: "#ececec"}),
               drawing("text", {x: left - 5, y: level + 4, "text-anchor": "end"}, value + " %"));
  }
  svg.append(drawing("text", {x: width - right, y: height - 4, "text-anchor": "end"},
                     state.size === CODED ? "bytes of the entropy-coded file" : "bytes of the file"));
  if (best.length) svg.append(drawing("path", {d: path(best), fill: "none", stroke: "#cfcfcf", "stroke-width": 6,
                                               "stroke-linejoin": "round"}));
  for (const point of here) {
    if (!members.includes(point)) {
      const [cx, cy] = at(point);
      svg.append(drawing("circle", {cx, cy, r: 2.2, fill: "#bdbdbd"}));
    }
  }
  const reference = points.find(p => p.groupIndex === state.group && p.method.name === "float" && p.name === "float32");
  if (reference) {
    const level = py(reference.test[0]);
    svg.append(drawing("path", {d: `M${left},${level}H${width - right}`, stroke: "#8a8a8a", "stroke-dasharray": "5 4"}),
               drawing("text", {x: left + 4, y: level - 4}, "float32"));
  }
  const names = [];
  for (const index of new Set(members.map(p => p.methodIndex))) {
    const method = data.methods[index];
    const line = members.filter(p => p.methodIndex === index).sort((a, b) => a.size[state.size] - b.size[state.size]);
    const dim = state.alone !== null && state.alone !== index;
    const curve = drawing("g", {class: dim ? "curve dim" : "curve"});
    if (name !== "source") curve.append(drawing("path", {d: path(line), fill: "none", stroke: method.color, "stroke-width": 1.6}));
    for (const point of line) {
      const [cx] = at(point), [, low, high] = point.test;
      if (low !== null) curve.append(drawing("path", {d: `M${cx},${py(low)}V${py(high)}`, stroke: method.color}));
    }
    for (const point of line) {
      curve.append(marker(method, {transform: `translate(${at(point)})`, class: "point", "data-index": point.index}));
    }
    svg.append(curve);
    const button = element("button", [key(method), method.name],
                           {type: "button", "aria-pressed": state.alone === index});
    button.onclick = () => { state.alone = state.alone === index ? null : index; draw(); };
    names.push(button);
  }
  const ring = svg.appendChild(drawing("circle", {r: 8, fill: "none", stroke: "#1c2430", "stroke-width": 1.5, visibility: "hidden"}));
  const nearest = event => {
    const box = svg.getBoundingClientRect(), zoom = width / box.width;
    const distance = p => Math.hypot(at(p)[0] - zoom * (event.clientX - box.left), at(p)[1] - zoom * (event.clientY - box.top));
    const meant = members.filter(p => state.alone === null || state.alone === p.methodIndex || !members.some(m => m.methodIndex === state.alone));
    return meant.map(p => [distance(p), p]).filter(([d]) => d < NEAR * zoom).sort(([a], [b]) => a - b)[0]?.[1];
  };
  svg.onpointermove = event => {
    const point = event.pointerType === "touch" ? undefined : nearest(event);
    ring.setAttribute("visibility", point ? "visible" : "hidden");
    if (point) ring.setAttribute("transform", `translate(${at(point)})`);
    hover(point, event);
  };
  svg.onpointerleave = () => { ring.setAttribute("visibility", "hidden"); hover(); };
  svg.onclick = event => { const point = nearest(event); if (point) visit(point); };
  const title = element("button", name, {type: "button", "aria-pressed": large});
  title.onclick = () => { state.large = large ? null : name; draw(); };
  return element("figure", [title, svg, element("div", names, {class: "names"})], {class: large ? "large" : ""});
}

function hover(point, event) {
  find("hover").hidden = !point;
  if (!point) return;
  const lines = [sizes(point), "test " + accuracy(point.test) + " %, " + range(point.test)];
  if (point.validation) lines.push("validation " + accuracy(point.validation) + " %");
  lines.push(seeds(point) + ", " + point.model, "click: ledger, weights, and the command that repeats it");
  find("hover").replaceChildren(element("b", point.recipe), ...lines.flatMap(line => [line, element("br")]));
  const box = find("hover").getBoundingClientRect();
  find("hover").style.left = Math.max(4, Math.min(event.clientX + 14, window.innerWidth - box.width - 4)) + "px";
  find("hover").style.top = (event.clientY + box.height + 18 > window.innerHeight ? event.clientY - box.height - 10 : event.clientY + 16) + "px";
}

function sizes(point) {
  const coded = point.coded === null ? "" : ", entropy-coded " + whole(point.coded);
  const bits = point.bits === null ? "" : ", " + point.bits.toFixed(2) + " bits per weight";
  return span(point.bytes[0], point.bytes[2]) + " bytes" + coded + bits;
}

function draw() {
  const inside = points.filter(p => p.groupIndex === state.group);
  const here = inside.filter(p => p.size[state.size] !== null);
  const lack = inside.length - here.length;
  find("missing").textContent = lack ? whole(lack) + " of " + whole(inside.length) + " recipes have no entropy-coded size, " +
    "as their results are older than it, and are left out." : "";
  const best = here.filter(p => p.front[state.size]).sort((a, b) => a.size[state.size] - b.size[state.size]);
  const scales = axes(here);
  const kinds = [...new Set(data.methods.map(method => method.panel))];
  find("charts").replaceChildren(...kinds.flatMap(name => {
    const members = here.filter(p => p.method.panel === name && (p.front[state.size] || !state.only));
    return members.length ? [chart(name, members, here, best, scales)] : [];
  }));
}
