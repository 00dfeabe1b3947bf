// One recipe: its numbers, where its bytes are, its weights, and the command that repeats it.
function ledger(point) {
  const {words} = data;
  const rows = data.ledgers[point.ledger].map(([tensor, part, recipe, shape, bytes, weights]) =>
    ({tensor: words[tensor], part: words[part], recipe: words[recipe], shape, bytes, weights}));
  const sum = (members, name) => members.reduce((total, row) => total + row[name], 0);
  const total = sum(rows, "bytes"), largest = Math.max(...rows.map(row => row.bytes), 1);
  const bar = part => element("span", [], {class: "bar", style: "width:" + 90 * part + "px"});
  const line = (names, bytes, weights, kind) => element("tr", [
    ...names.map((name, i) => element("td", name, {class: i > 1 ? "more" : ""})),
    element("td", whole(bytes), {class: "n"}),
    element("td", weights ? (8 * bytes / weights).toFixed(3) : "", {class: "n more"}),
    element("td", (100 * bytes / total).toFixed(1) + " %", {class: "n"}),
    element("td", kind ? [] : bar(bytes / largest))], {class: kind});
  const body = [];
  for (const tensor of new Set(rows.map(row => row.tensor))) {
    const parts = rows.filter(row => row.tensor === tensor), weights = sum(parts, "weights");
    parts.forEach((row, i) => body.push(line([i ? "" : tensor, row.part, row.recipe, row.shape.join(" × ")],
                                             row.bytes, weights, "")));
    if (parts.length > 1) body.push(line(["", "all of it", "", ""], sum(parts, "bytes"), weights, "sum"));
  }
  body.push(line(["whole file", "", "", ""], total, sum(rows, "weights"), "sum"));
  const kinds = ["", "", "more", "more", "n", "n more", "n", ""];
  const head = ["tensor", "part", "stored as", "shape", "bytes", "bits per weight", "share", ""];
  return element("div", element("table", [
    element("thead", element("tr", head.map((name, i) => element("th", name, {class: kinds[i]})))),
    element("tbody", body)]), {class: "wide"});
}

let sketches = null;                                    // read once somebody looks
function weights(point) {
  sketches ??= JSON.parse(find("sketches").textContent);
  const found = sketches.points[point.index];
  if (!found.length) return [];
  const picture = (number, said) =>
    element("img", [], {src: "data:image/png;base64," + sketches.pictures[number], alt: said});
  const strips = [];
  for (const {tensor, rows, codewords} of found) {
    if (rows) {
      strips.push(element("h3", "Rows of " + tensor + " as images: what a unit looks for"), element("div", [
        "float start", picture(rows.before, "rows of " + tensor + " before"),
        "in the file", picture(rows.after, "the same rows in the file")], {class: "strip"}));
    }
    if (codewords) {
      const {shown, total, each} = codewords;
      const how = each === "image" ? "each an image" : "each a " + each;
      strips.push(element("h3", `Codewords of ${tensor}, ${how}: ` +
                          (shown < total ? `the ${shown} most used of ${total}` : `all ${total}, the most used first`)),
                  element("div", picture(codewords.picture, "codewords of " + tensor), {class: "strip one"}));
      const image = strips.at(-1).firstChild;
      image.onload = () => { image.style.maxWidth = 14 * image.naturalWidth + "px"; };
    }
  }
  return [
    element("h3", "Weights before (grey) and in the file (blue), of seed " + point.seeds[0]),
    element("div", found.map(histogram), {class: "weights"}), ...strips,
    ...(strips.length ? [element("p", "Blue is negative, orange positive, white zero; all on the scale of the float start.",
                                 {class: "note"})] : [])];
}

function histogram({tensor, low, high, before, levels, after}) {
  const [width, height, top, bottom] = [280, 130, 6, 18], floor = height - bottom;
  const at = value => high > low ? 4 + (value - low) / (high - low) * (width - 8) : width / 2;
  const rise = (count, most) => floor - Math.sqrt(count / most) * (floor - top);  // a root, so that rare values show
  const svg = drawing("svg", {viewBox: `0 0 ${width} ${height}`, role: "img",
                              "aria-label": "histogram of " + tensor + " before and in the file"});
  const bars = (counts, attributes) => counts.forEach((count, i) => {
    const step = (width - 8) / counts.length, y = rise(count, Math.max(...counts));
    svg.append(drawing("rect", {x: 4 + i * step, y, width: step, height: floor - y, ...attributes}));
  });
  bars(before, {fill: "#c9ced6"});
  if (after) bars(after, {fill: "#0072b2", "fill-opacity": 0.45});
  const most = Math.max(1, ...(levels ?? []).map(([, count]) => count));
  for (const [value, count] of levels ?? []) {
    const share = drawing("title", {}, `${value}: ${whole(count)} weights`);
    svg.append(drawing("path", {d: `M${at(value)},${floor}V${rise(count, most)}`, stroke: "#0072b2", "stroke-width": 1.6}),
               drawing("circle", {cx: at(value), cy: rise(count, most), r: 2.6, fill: "#0072b2"}, share));
  }
  svg.append(drawing("path", {d: `M0,${floor}H${width}`, stroke: "#8a8a8a"}),
             drawing("text", {x: 2, y: height - 5}, low.toPrecision(2)),
             drawing("text", {x: width - 2, y: height - 5, "text-anchor": "end"}, high.toPrecision(2)),
             drawing("text", {x: width / 2, y: height - 5, "text-anchor": "middle"}, levels ? whole(levels.length) + " levels" : ""));
  return element("div", [tensor, svg]);
}

function open(point) {
  const close = element("button", "Close", {class: "close", autofocus: "", type: "button"});
  close.onclick = () => find("detail").close();
  const copy = element("button", "Copy", {type: "button"});
  const command = data.command + point.cell;
  copy.onclick = () => navigator.clipboard?.writeText(command).then(() => { copy.textContent = "Copied"; });
  const facts = [
    ["bytes", sizes(point)],
    ["test accuracy", accuracy(point.test) + " %, " + range(point.test)],
    ["validation", point.validation ? accuracy(point.validation) + " %" : "nothing held out"],
    ["seeds", point.seeds.join(", ") + (point.diverged ? "; " + point.diverged + " diverged" : "")],
    ["model", point.model], ["start", point.group.start],
    ["training", point.training], ["median seconds", point.seconds.toFixed(2)]];
  find("detail").replaceChildren(
    close, element("h2", point.recipe),
    element("dl", facts.flatMap(([name, value]) => [element("dt", name), element("dd", value)])),
    element("h3", ["Repeat this trial ", copy]), element("pre", command, {id: "command"}),
    ...weights(point),
    element("h3", "Where the bytes of the file are, of seed " + point.seeds[0]), ledger(point));
  if (!find("detail").open) find("detail").showModal();
  find("detail").scrollTop = 0;
}

function visit(point) {
  history.replaceState(null, "", "#trial-" + point.id);  // so that the address can be passed on
  open(point);
}

function follow() {
  const point = points.find(p => location.hash === "#trial-" + p.id);
  if (point) open(point);
}
