// The address names the factor that is open (#f=12): links, rows, keys and points of the map all only change it.
const data = JSON.parse(document.getElementById("data").textContent);
const get = (id) => document.getElementById(id);
const make = (tag, text, more) => Object.assign(document.createElement(tag), { textContent: text, dir: "auto" }, more);
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 68rem)");
const ids = data.rows.map((row) => row[0]);
const columnOf = (name) => data.columns.findIndex((column) => column.name === name);
const colours = data.columns.filter(({ name, decimals }) => decimals !== null && !["vector", "nearest"].includes(name));
let chosen = 0; // its row in data.rows

const link = (id) => make("a", id, { href: `#f=${id}` });

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
  return make("bdi", shown(value, column), { className: "token", title: shown(value, column) });
}

// DataTables decodes entities in what it searches, through innerHTML: it may only see escaped text there.
const escaped = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");

function column(of, index) {
  return {
    type: of.decimals === null ? "string" : "num",
    className: index === 0 ? "first" : "",
    columnControl: [{ extend: "searchDropdown", text: `Filter ${escaped(of.name)}` }],
    render: (value, use) => {
      if (use === "display") return cell(value, of, index);
      if (use === "filter") return value === null ? "" : escaped(value);
      return value ?? -Infinity;
    },
  };
}

const head = get("factors").createTHead().insertRow();
for (const { name, about } of data.columns) {
  head.append(make("th", name, { scope: "col", title: about ?? "" }));
  if (about) get("about").append(make("dt", name), make("dd", about));
}
const table = new DataTable("#factors", {
  data: data.rows,
  columns: data.columns.map(column),
  order: [],
  autoWidth: false,
  pageLength: 15,
  layout: { topStart: "info", topEnd: "search", bottomStart: null, bottomEnd: "paging" },
  language: { info: "_TOTAL_ factors", infoEmpty: "no factors", infoFiltered: "of _MAX_", search: "Search",
    emptyTable: "No factors", zeroRecords: "None match" },
});
const listed = () => table.rows({ search: "applied", order: "applied" }).indexes().toArray();

function turnTo(row) {
  const place = listed().indexOf(row);
  if (place >= 0) table.page(Math.floor(place / table.page.len())).draw("page");
}

/** The chosen row's link, or else the first, is the one that Tab reaches. */
function mark() {
  const links = [...get("factors").querySelectorAll("tbody a")];
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
get("factors").tBodies[0].addEventListener("click", (event) => {
  const row = table.row(event.target.closest("tr")).data();
  if (row) location.hash = `f=${row[0]}`;
});
get("factors").tBodies[0].addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const next = listed()[listed().indexOf(table.row(event.target.closest("tr")).index()) + step];
  if (next === undefined) return;
  if (!table.row(next).node()?.isConnected) turnTo(next);
  table.row(next).node().querySelector("a").focus();
});

/** What both plots share: the page's own colours and type, and no buttons. */
function plot(id, traces, more) {
  const style = getComputedStyle(document.documentElement);
  const [ink, line] = ["--quiet", "--line"].map((name) => style.getPropertyValue(name));
  const axis = { color: ink, gridcolor: line, showgrid: id === "chart", zeroline: false, automargin: true, title: { standoff: 8 } };
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

/** Numbers on a scale; the largest clusters in colours of their own, the rest grey. */
function marker(name) {
  const values = data.rows.map((row) => row[columnOf(name)]);
  if (name !== "cluster") {
    return { color: values, colorscale: "Viridis", showscale: true, colorbar: { thickness: 8, outlinewidth: 0 } };
  }
  const palette = ["#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#56b4e9", "#ece133"];
  const sizes = new Map();
  for (const value of values) sizes.set(value, (sizes.get(value) ?? 0) + 1);
  const largest = [...sizes.keys()].filter((value) => sizes.get(value) > 1).sort((a, b) => sizes.get(b) - sizes.get(a));
  return { color: values.map((value) => palette[largest.indexOf(value)] ?? "#9aa1a9") };
}

async function drawMap() {
  const of = data.columns[columnOf(get("colour").value)];
  const [x, y] = [0, 1].map((axis) => data.map.points.map((point) => point[axis]));
  const text = data.rows.map((row) => `factor ${row[0]}<br>${of.name.replaceAll("<", "&lt;")} ${shown(row[columnOf(of.name)], of)}`);
  const name = (axis) => `component ${axis + 1} (${(100 * data.map.explained[axis]).toFixed(0)} % of variance)`;
  const points = { x, y, text, hoverinfo: "text", mode: "markers", selectedpoints: listed(),
    marker: { size: 8, line: { width: 0.5, color: "#888" }, ...marker(of.name) }, unselected: { marker: { opacity: 0.12 } } };
  const ring = { x: [x[chosen]], y: [y[chosen]], hoverinfo: "skip", mode: "markers",
    marker: { size: 15, symbol: "circle-open", color: getComputedStyle(document.body).color, line: { width: 2 } } };
  await plot("map", [points, ring], {
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    xaxis: { title: name(0), showticklabels: false }, yaxis: { title: name(1), showticklabels: false },
  });
}

function drawChart() {
  get("depth").hidden = !data.norms;
  if (!data.norms) return;
  const x = data.norms[0].map((_, layer) => layer);
  const style = getComputedStyle(document.documentElement);
  const line = (y, name, colour, width) => ({ x, y, name, mode: "lines", hovertemplate: "layer %{x}: %{y:.3~g}",
    line: { color: style.getPropertyValue(colour), width } });
  plot("chart", [line(data.median, "median", "--quiet", 1), line(data.norms[chosen], `factor ${ids[chosen]}`, "--accent", 2)], {
    xaxis: { title: "layer", fixedrange: true }, yaxis: { title: "length", rangemode: "tozero", fixedrange: true },
  });
}

function speak() {
  const said = data.steered[ids[chosen]];
  const at = Number(get("strength").value);
  const times = `×${data.strengths[at]}`;
  get("times").textContent = times;
  get("strength").ariaValueText = times;
  get("steered-name").textContent = `steered, ${times}`;
  const [few, open] = [data.instructions.length, said && get("show").checked];
  get("note").textContent = !said ? "Its completions are not kept here: they are for the first factor of each of the highest clusters."
    : open ? "" : `${few} completion${few === 1 ? " is" : "s are"} folded; the text may be harmful.`;
  get("said").hidden = !open;
  for (const body of [...get("said").tBodies]) body.remove();
  if (!open) return;
  data.instructions.forEach((instruction, i) => {
    const body = get("said").createTBody();
    body.insertRow().append(make("th", instruction, { colSpan: 2, scope: "rowgroup" }));
    const row = body.insertRow();
    for (const [label, text] of [["without steering", data.clean[i]], [`steered, ${times}`, said[at][i]]]) {
      const cell = make("td", text);
      cell.dataset.label = label;
      row.append(cell);
    }
  });
}

function open() {
  const row = data.rows[chosen];
  get("name").textContent = `Factor ${ids[chosen]}`;
  const values = data.columns.map((column, i) => {
    const pair = make("div", "");
    pair.append(make("dt", column.name, { title: column.about ?? "" }), make("dd", shown(row[i], column)));
    return pair;
  });
  get("values").replaceChildren(...values.slice(1, -2)); // the nearest factor and its cosine stand below
  for (const side of ["v", "u"]) {
    get(`similar-${side}`).replaceChildren(...data.similar[side][chosen].map(([id, cosine]) => {
      const each = make("span", "");
      each.append(link(id), " ", make("small", cosine.toFixed(2).replace("-", "−")));
      return each;
    }));
  }
  speak();
  drawChart();
  mark();
}

function follow(event) {
  const found = ids.indexOf(Number(/^#f=(-?\d+)$/.exec(location.hash)?.[1]));
  if (found < 0 && event) return;
  chosen = Math.max(found, 0);
  open();
  if (!get("factors").tBodies[0].querySelector(".chosen")) turnTo(chosen);
  const [x, y] = data.map.points[chosen];
  if (event) Plotly.restyle("map", { x: [[x]], y: [[y]] }, [1]);
  if (found >= 0 && narrow.matches) get("factor").scrollIntoView();
}

function paint() {
  document.documentElement.classList.toggle("dark", dark.matches);
  drawMap();
  drawChart();
}

Object.assign(get("strength"), { max: data.strengths.length - 1, value: data.start });
get("steering").hidden = data.strengths.length === 1;
get("show").checked = !data.hide;
get("colour").append(...colours.map(({ name }) => make("option", name, { value: name })));
get("colour").value = columnOf("score") >= 0 ? "score" : columnOf("cluster") >= 0 ? "cluster" : colours[0].name;
get("colour").addEventListener("change", drawMap);
get("strength").addEventListener("input", speak);
get("show").addEventListener("change", speak);
addEventListener("hashchange", follow);
dark.addEventListener("change", paint);
follow();
paint();
get("map").on("plotly_click", ({ points: [{ pointNumber }] }) => { location.hash = `f=${ids[pointNumber]}`; });
