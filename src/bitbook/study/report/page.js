// Controls, and the first picture.
data.groups.forEach((group, i) => find("group").append(element("option", group.title, {value: i})));
find("group").value = state.group;
if (points.every(p => p.coded === null)) find("size").hidden = true;
for (const id of ["controls", "filter"]) find(id).onsubmit = event => event.preventDefault();
find("controls").onchange = () => {
  state.group = Number(find("group").value);
  state.size = Number(find("controls").elements.size.value);
  state.stretch = find("stretch").checked;
  state.only = find("only").checked;
  draw();
  list();
};
find("filter").oninput = list;
find("detail").onclose = () => history.replaceState(null, "", location.pathname + location.search);
find("detail").onclick = event => { if (event.target === find("detail")) find("detail").close(); };
draw();
list();
let breadth = window.innerWidth;
window.addEventListener("resize", () => { if (breadth !== window.innerWidth) { breadth = window.innerWidth; draw(); } });
window.addEventListener("hashchange", follow);
follow();
document.documentElement.dataset.ready = performance.now().toFixed(0);
