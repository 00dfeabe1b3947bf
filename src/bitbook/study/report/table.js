// The table of recipes: sorted by any column, filtered by words and bounds.
const COLUMNS = [           // name, what is sorted, what is shown if not the same; "more": not on phones and paper
  ["recipe", p => p.recipe, p => [key(p.method), p.recipe]],
  ["bytes", p => p.bytes[1], p => span(p.bytes[0], p.bytes[2])],
  ["entropy-coded", p => p.coded, p => p.coded === null ? "" : whole(p.coded)],
  ["bits per weight", p => p.bits, p => p.bits === null ? "" : p.bits.toFixed(2), "more"],
  ["test, %", p => p.test[0], p => accuracy(p.test)],
  ["validation, %", p => p.validation ? p.validation[0] : null, p => accuracy(p.validation), "more"],
  ["test loss", p => p.loss, p => p.loss === null ? "" : p.loss.toFixed(4), "more"],
  ["seeds", p => p.seeds.length, p => p.seeds.length, "more"],
  ["front", p => p.front[state.size] ? 1 : 0, p => p.front[state.size] ? "yes" : "", "more"],
  ["start", p => p.group.start, undefined, "more"],
  ["training", p => p.training, undefined, "more"],
  ["held out", p => p.group.holdout, undefined, "more"],
  ["model", p => p.model, undefined, "more"],
  ["data", p => p.group.dataset, undefined, "more"],
  ["seconds", p => p.seconds, p => p.seconds.toFixed(2), "more"],
].filter(([name]) => name !== "entropy-coded" || points.some(p => p.coded !== null));
const numeric = COLUMNS.map(([, by]) => points.every(p => by(p) === null || typeof by(p) === "number"));
const collator = new Intl.Collator("en", {numeric: true});

function list() {
  const wanted = find("text").value.toLowerCase().split(/\s+/).filter(Boolean);
  const most = Number(find("most").value) || Infinity, least = Number(find("least").value) || 0;
  const kept = points.filter(p => wanted.every(start => p.words.some(word => word.startsWith(start)))
    && (find("everywhere").checked || p.groupIndex === state.group)
    && (!find("best").checked || p.front[state.size])
    && (most === Infinity || (p.size[state.size] !== null && p.size[state.size] <= most)) && p.test[0] >= least);
  const by = COLUMNS[state.column][1], sign = state.down ? -1 : 1;
  const compared = (a, b) => {                          // what has no number comes last
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (numeric[state.column] ? a - b : collator.compare(a, b));
  };
  kept.sort((a, b) => compared(by(a), by(b)) || a.index - b.index);
  find("count").textContent = whole(kept.length) + " of " + whole(points.length) + " recipes";
  document.body.classList.toggle("filtered", wanted.length > 0 || most < Infinity || least > 0);
  const other = state.size === FIXED ? "entropy-coded" : "bytes";     // not on phones
  const kind = i => [numeric[i] ? "n" : "", COLUMNS[i][3] ?? "", COLUMNS[i][0] === other ? "other" : ""].join(" ").trim();
  find("table").tHead.replaceChildren(element("tr", COLUMNS.map(([name], i) => {
    const arrow = i === state.column ? (state.down ? " ▼" : " ▲") : "";
    const button = element("button", name + arrow, {type: "button"});
    button.onclick = () => { state.down = i === state.column && !state.down; state.column = i; list(); };
    const order = i === state.column ? {"aria-sort": state.down ? "descending" : "ascending"} : {};
    return element("th", button, {scope: "col", class: kind(i), ...order});
  })));
  find("table").tBodies[0].replaceChildren(...kept.map(point => {
    const cells = COLUMNS.map(([, by, show = by], i) => element("td", show(point), {class: kind(i)}));
    const row = element("tr", cells, {tabindex: 0, class: point.front[state.size] ? "best" : ""});
    row.onclick = () => visit(point);
    row.onkeydown = event => { if (event.key === "Enter") visit(point); };
    return row;
  }));
}
