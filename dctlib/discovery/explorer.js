// The address names the vector that is open (#v=12): links, rows, keys and points of the map all only change it.
const data = JSON.parse(document.getElementById("data").textContent);
const get = (id) => document.getElementById(id);
const make = (tag, text, more) => Object.assign(document.createElement(tag), { textContent: text, dir: "auto" }, more);
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 68rem)");
const ids = data.rows.map((row) => row[0]);
const columnOf = (name) => data.columns.findIndex((column) => column.name === name);
const colours = data.columns.filter(({ name, decimals }) => decimals !== null && !["vector", "nearest"].includes(name));
let chosen = 0; // its row in data.rows

const link = (id) => make("a", id, { href: `#v=${id}` });

/** A cell as it is read: numbers to their column's digits, text with what cannot be seen escaped. */
function shown(value, { decimals }) {
  if (value === null) return "–";
  if (decimals === null) return JSON.stringify(value).slice(1, -1);
  if (Math.abs(value) >= 1e5) return value.toExponential(1).replace("e+", "e");
  return value.toFixed(decimals).replace("-", "−");
}

function cell(value, column, index) {
  if (index === 0) return link(value);
  if (column.decimals !== null) return document.createTextNode(shown(value, column));
  if (column.name === "says") return make("bdi", shown(value, column), { className: "says" });
  return make("bdi", shown(value, column), { className: "token" });
}

// DataTables decodes entities in what it searches, through innerHTML: it may only see escaped text there. Its pattern
// ends at a line's end.
const escaped = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replace(/\s+/g, " ");

function column(of, index) {
  return {
    type: of.decimals === null ? "string" : "num",
    className: index === 0 ? "first" : "",
    orderSequence: of.name === "damage" ? ["asc", "desc"] : ["desc", "asc"],
    columnControl: [{ extend: "searchDropdown", text: `Filter ${escaped(of.name)}` }],
    render: (value, use) => {
      if (use === "display") return cell(value, of, index);
      if (use === "filter") return [value ?? "", ...(index === 0 ? data.steered[value] ?? [] : [])].map(escaped).join(" ");
      return value ?? -Infinity;
    },
  };
}

const head = get("vectors").createTHead().insertRow();
for (const { name, about } of data.columns) {
  head.append(make("th", name, { scope: "col", title: about ?? "" }));
  if (about) get("about").append(make("dt", name), make("dd", about));
}
const table = new DataTable("#vectors", {
  data: data.rows,
  columns: data.columns.map(column),
  order: [],
  autoWidth: false,
  pageLength: 15,
  layout: { topStart: "info", topEnd: "search", bottomStart: null, bottomEnd: "paging" },
  language: { info: "_TOTAL_ vectors", infoEmpty: "no vectors", infoFiltered: "of _MAX_", search: "Search",
    emptyTable: "No vectors", zeroRecords: "None match" },
});
const listed = () => table.rows({ search: "applied", order: "applied" }).indexes().toArray();

function turnTo(row) {
  const place = listed().indexOf(row);
  if (place >= 0) table.page(Math.floor(place / table.page.len())).draw("page");
}

/** The chosen row's link, or else the first, is the one that Tab reaches. */
function mark() {
  const links = [...get("vectors").querySelectorAll("tbody a")];
  const open = links.find((each) => Number(each.textContent) === ids[chosen]);
  for (const each of links) {
    each.tabIndex = each === (open ?? links[0]) ? 0 : -1;
    each.ariaCurrent = each === open ? "true" : null;
    each.closest("tr").classList.toggle("chosen", each === open);
  }
}
table.on("draw", mark);
table.on("search", () => Plotly.restyle("map", { selectedpoints: [listed()] }, [0]));

// The library leaves these without a name, and phones with a keyboard that has no minus.
addEventListener("focusin", ({ target }) => {
  const box = target.closest(".dtcc-dropdown");
  const controls = box?.querySelectorAll("select, input") ?? [];
  for (const each of controls) Object.assign(each, { ariaLabel: box.ariaLabel, inputMode: "text" });
});
get("vectors").tBodies[0].addEventListener("click", (event) => {
  const row = table.row(event.target.closest("tr")).data();
  if (row) location.hash = `v=${row[0]}`;
});
get("vectors").tBodies[0].addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const next = listed()[listed().indexOf(table.row(event.target.closest("tr")).index()) + step];
  if (next === undefined) return;
  if (!table.row(next).node()?.isConnected) turnTo(next);
  table.row(next).node().querySelector("a").focus();
});

/** A plot in the page's own colours and type, without buttons. */
function plot(id, traces, more) {
  const style = getComputedStyle(document.documentElement);
  const [ink, line] = ["--quiet", "--line"].map((name) => style.getPropertyValue(name));
  const axis = { color: ink, gridcolor: line, showgrid: false, zeroline: false, automargin: true, title: { standoff: 8 } };
  const layout = {
    font: { family: "system-ui, sans-serif", size: 12, color: ink },
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", showlegend: false, hovermode: "closest",
    margin: { l: 8, r: 8, t: 8, b: 8 },
  };
  for (const name of ["xaxis", "yaxis"]) {
    layout[name] = { ...axis, ...more[name], title: { ...axis.title, text: more[name].title } };
  }
  layout.dragmode = more.dragmode ?? false;
  return Plotly.react(id, traces, layout, { displayModeBar: false, responsive: true });
}

/** Numbers on a scale; what was not measured is grey. */
function marker(name) {
  const values = data.rows.map((row) => row[columnOf(name)]);
  return { color: values.map((value) => value ?? NaN), colorscale: "Viridis", showscale: true,
    colorbar: { thickness: 8, outlinewidth: 0 } };
}

async function drawMap() {
  const of = data.columns[columnOf(get("colour").value)];
  const [x, y] = [0, 1].map((axis) => data.map.slice(0, -1).map((point) => point[axis]));
  const [unsteered] = data.map.slice(-1);
  const text = data.rows.map((row) => `vector ${row[0]}<br>${of.name.replaceAll("<", "&lt;")} ${shown(row[columnOf(of.name)], of)}`);
  const points = { x, y, text, hoverinfo: "text", mode: "markers", selectedpoints: listed(),
    marker: { size: 8, line: { width: 0.5, color: "#888" }, ...marker(of.name) }, unselected: { marker: { opacity: 0.12 } } };
  const ring = { x: [x[chosen]], y: [y[chosen]], hoverinfo: "skip", mode: "markers",
    marker: { size: 15, symbol: "circle-open", color: getComputedStyle(document.body).color, line: { width: 2 } } };
  const known = data.map.map((point) => point[0]).filter((value) => Number.isFinite(value));
  const inside = 2 * unsteered[0] < Math.min(...known) + Math.max(...known) ? "top right" : "top left";
  const star = { x: [unsteered[0]], y: [unsteered[1]], text: ["without steering"], hoverinfo: "text", mode: "markers+text",
    textposition: inside, marker: { size: 11, symbol: "star", color: getComputedStyle(document.body).color } };
  await plot("map", [points, ring, star], {
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    xaxis: { title: "words, first component", showticklabels: false },
    yaxis: { title: "words, second component", showticklabels: false },
  });
}

function speak() {
  const said = data.steered[ids[chosen]];
  const [few, open] = [data.instructions.length, said && get("show").checked];
  get("note").textContent = !said ? "It was not read on all requests: others went further in the search."
    : open ? "" : `${few} completion${few === 1 ? " is" : "s are"} folded; the text may be harmful.`;
  get("said").hidden = !open;
  document.body.classList.toggle("folded", !get("show").checked);
  for (const body of [...get("said").tBodies]) body.remove();
  if (!open) return;
  data.instructions.forEach((instruction, i) => {
    const body = get("said").createTBody();
    body.insertRow().append(make("th", instruction, { colSpan: 2, scope: "rowgroup" }));
    const row = body.insertRow();
    for (const [label, text] of [["without steering", data.unsteered[i]], ["steered", said[i]]]) {
      const cell = make("td", text);
      cell.dataset.label = label;
      row.append(cell);
    }
  });
}

/** How the open vector is used; a page that names no folder has nothing to say here. */
function offer() {
  const texts = data.snippets[ids[chosen]];
  get("use").hidden = !Object.keys(data.snippets).length;
  get("unshared").hidden = Boolean(texts);
  get("copied").textContent = "";
  ["as-python", "as-command"].forEach((id, i) => {
    get(id).textContent = texts?.[i] ?? "";
    get(id).parentElement.hidden = !texts;
  });
}

// Where the browser keeps the clipboard to itself, the text is selected instead.
get("use").addEventListener("click", async ({ target }) => {
  if (!target.dataset.copies) return;
  const source = get(target.dataset.copies);
  try {
    await navigator.clipboard.writeText(source.textContent);
    get("copied").textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren(source);
    get("copied").textContent = "Selected: copy it with Ctrl+C, or ⌘C.";
  }
});

function open() {
  const row = data.rows[chosen];
  get("name").textContent = `Vector ${ids[chosen]}`;
  const values = data.columns.map((column, i) => {
    const pair = make("div", "");
    const text = make("dd", shown(row[i], column), { className: column.name === "says" ? "says" : "" });
    pair.append(make("dt", column.name, { title: column.about ?? "" }), text);
    return pair;
  });
  get("values").replaceChildren(...values.slice(1, -2)); // the nearest vector and its cosine stand below
  for (const side of ["v", "u"]) {
    get(`similar-${side}`).replaceChildren(...data.similar[side][chosen].map(([id, cosine]) => {
      const each = make("span", "");
      each.append(link(id), " ", make("small", cosine.toFixed(2).replace("-", "−")));
      return each;
    }));
  }
  offer();
  speak();
  mark();
}

function follow(event) {
  const found = ids.indexOf(Number(/^#v=(-?\d+)$/.exec(location.hash)?.[1]));
  if (found < 0 && event) return;
  chosen = Math.max(found, 0);
  open();
  if (!get("vectors").tBodies[0].querySelector(".chosen")) turnTo(chosen);
  const [x, y] = data.map[chosen];
  if (event) Plotly.restyle("map", { x: [[x]], y: [[y]] }, [1]);
  if (found >= 0 && narrow.matches) get("vector").scrollIntoView();
}

function paint() {
  document.documentElement.classList.toggle("dark", dark.matches);
  drawMap();
}

get("show").checked = !data.hide;
get("colour").append(...colours.map(({ name }) => make("option", name, { value: name })));
get("colour").value = columnOf("first") >= 0 ? "first" : colours[0].name;
get("colour").addEventListener("change", drawMap);
get("show").addEventListener("change", speak);
addEventListener("hashchange", follow);
dark.addEventListener("change", paint);
follow();
paint();
get("map").on("plotly_click", ({ points: [{ curveNumber, pointNumber }] }) => {
  if (curveNumber === 0) location.hash = `v=${ids[pointNumber]}`;
});
