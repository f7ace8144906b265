"use strict";
// Everything the page does: theme, charts, filters and sorting of samples, opened pictures.
// Texts of the workspace reach the page as text nodes and attribute values only, never as mark-up.
(() => {
  const byId = id => document.getElementById(id);
  const text = id => byId(id)?.textContent;
  const DATA = JSON.parse(text("data"));
  const PAGE = 96; // samples on one page of the table or of the pictures

  function make(tag, attributes = {}, ...children) {
    const svg = tag === "svg" || tag === "path";
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value === true) node.setAttribute(name, "");
      else if (value !== false && value != null) node.setAttribute(name, value);
    }
    node.append(...children.filter(child => child != null));
    return node;
  }

  // -- theme ---------------------------------------------------------------------------------------------

  const THEMES = ["auto", "light", "dark"];
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  let theme = "auto";
  try { theme = localStorage.getItem("flawsmith-theme") ?? "auto"; } catch { /* storage is off: not kept */ }

  const colours = () => (theme === "auto" ? (prefersDark.matches ? "dark" : "light") : theme);

  function applyTheme() {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    byId("theme").textContent = `Theme: ${theme}`;
    for (const node of document.querySelectorAll(".plot.drawn")) draw(node);
  }

  byId("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    try { localStorage.setItem("flawsmith-theme", theme); } catch { /* as above */ }
    applyTheme();
  });
  prefersDark.addEventListener("change", applyTheme);

  // -- charts: drawn when scrolled to --------------------------------------------------------------------

  const FIRST = { split: "feedback", category: "mean" }; // what menus begin with, else with the last choice
  const choices = {};

  const options = (items, name) => [...new Set(items.map(item => String(item[name])))];

  function menu(name, values, chosen, onChoice) {
    const select = make("select", { onchange: () => onChoice(select.value) });
    select.append(...values.map(value => make("option", { value, ...(value === chosen && { selected: true }) }, value)));
    return make("label", {}, name, select);
  }

  function prepareChart(node) {
    const name = node.dataset.chart;
    const chosen = DATA.charts[name].series.map(series => series.choose).filter(Boolean);
    choices[name] = {};
    for (const key of Object.keys(chosen[0] ?? {})) {
      const values = options(chosen, key);
      choices[name][key] = values.includes(FIRST[key]) ? FIRST[key] : values.at(-1);
      if (values.length > 1) byId(`menus-${name}`).append(menu(key, values, choices[name][key], value => {
        choices[name][key] = value;
        if (node.classList.contains("drawn")) draw(node);
      }));
    }
  }

  // Okabe and Ito's colours in the order that suits a white and a black page; a hatch, a dash or a marker says
  // the same once more.
  const COLOURS = {
    light: ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#7f7f7f"],
    dark: ["#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#f0e442", "#a0a0a0"],
  };
  const MARKERS = ["circle", "square", "diamond", "triangle", "inverted_triangle", "star", "hex", "plus"];
  const DASHES = ["solid", "dashed", "dotted", "dotdash"];
  const HATCHES = ["blank", "right_diagonal_line", "dot", "left_diagonal_line", "horizontal_line", "cross", "vertical_line", "ring"];
  const inTurn = (list, at) => list[at % list.length];
  const BAR = 30; // height of a bar and its gap, in pixels

  async function draw(node) {
    const chart = DATA.charts[node.dataset.chart];
    const wanted = Object.entries(choices[node.dataset.chart]);
    const series = chart.series.filter(each => wanted.every(([key, value]) => each.choose[key] === value));
    const lines = chart.kind === "lines";
    const longest = node.clientWidth < 480 ? 16 : 28; // characters of a row's name
    const rows = (series[0]?.rows ?? chart.rows).map(row => (row.length > longest ? `${row.slice(0, longest - 1)}…` : row));
    const names = chart.kind === "ranges" ? [] : series.map(each => each.name);
    const beside = lines ? 40 : 8 * Math.max(0, ...rows.map(row => row.length)); // the names of the rows, in pixels
    const across = legendColumns(names, node.clientWidth - beside);
    const legendHeight = names.length > 1 ? 34 * Math.ceil(names.length / across) : 0;
    const height = (lines ? 310 : 56 + BAR * rows.length) + legendHeight;
    node.classList.add("drawn");
    node.style.minHeight = `${height}px`;
    const figure = chartFrame(chart, series, rows, height);
    const entries = { lines: drawLines, bars: drawBars, ranges: drawRanges }[chart.kind](figure, series, rows, chart);
    if (entries.length > 1) addLegend(figure, entries, across);
    node.replaceChildren();
    await Bokeh.Plotting.show(figure, node);
  }

  function extent(chart, series, rows) {
    if (chart.kind === "lines") return { start: -0.02, end: 1.02 };
    if (chart.log) return { start: Math.min(...series[0].low) / 2, end: Math.min(1, Math.max(...series[0].high) * 2) };
    if (chart.kind === "ranges" || chart.percent) return { start: 0, end: 1 };
    const sums = rows.map((_, row) => series.reduce((sum, each) => sum + (each.values[row] ?? 0), 0));
    return { start: 0, end: Math.max(...sums) * 1.02 || 1 };
  }

  function chartFrame(chart, series, rows, height) {
    const lines = chart.kind === "lines";
    const style = getComputedStyle(document.documentElement);
    const [ink, line] = ["--ink", "--line"].map(name => style.getPropertyValue(name).trim());
    const along = new Bokeh.Range1d(lines ? { start: -0.6, end: rows.length - 0.4 } : { start: rows.length - 0.4, end: -0.6 });
    const across = new Bokeh.Range1d(extent(chart, series, rows));
    const range = lines ? { x_range: along, y_range: across } : { x_range: across, y_range: along };
    const figure = Bokeh.Plotting.figure({
      ...range, height, sizing_mode: "stretch_width", toolbar_location: null, tools: [], outline_line_color: null,
      background_fill_alpha: 0, border_fill_alpha: 0, x_axis_type: chart.log ? "log" : "linear", min_border: 4,
    });
    for (const axis of [...figure.xaxis, ...figure.yaxis]) {
      Object.assign(axis, {
        axis_line_color: line, major_tick_line_color: line, minor_tick_line_color: null, major_label_text_color: ink,
        axis_label_text_color: ink, axis_label_text_font_style: "normal", axis_label_text_font_size: "12px",
        major_label_text_font_size: "12.5px", major_label_text_font: "system-ui, sans-serif", axis_label_text_font: "system-ui, sans-serif",
      });
    }
    for (const grid of [...figure.xgrid, ...figure.ygrid]) grid.grid_line_color = line;
    const [names] = lines ? figure.xaxis : figure.yaxis;
    const [values] = lines ? figure.yaxis : figure.xaxis;
    // With many rounds not every one is named.
    const every = lines ? Math.ceil(rows.length / 8) : 1;
    names.ticker = new Bokeh.FixedTicker({ ticks: rows.map((_, at) => at).filter(at => at % every === 0) });
    names.major_label_overrides = new Map(rows.map((row, at) => [at, row]));
    names.major_tick_line_color = null;
    for (const grid of lines ? figure.xgrid : figure.ygrid) grid.grid_line_color = null;
    if (chart.title) values.axis_label = chart.title;
    if (chart.log) { // 1 and 5 of each decade: the library's own ticks run into each other
      const decades = [-5, -4, -3, -2, -1].flatMap(power => [1, 5].map(digit => digit * 10 ** power));
      values.ticker = new Bokeh.FixedTicker({ ticks: decades });
    }
    if (chart.percent) values.formatter = new Bokeh.NumeralTickFormatter({ format: chart.log ? "0.[00]%" : "0%" });
    return figure;
  }

  function drawLines(figure, series, rows) {
    return series.map((each, at) => {
      const colour = inTurn(COLOURS[colours()], at);
      const places = rows.map((_, row) => row).filter(row => each.values[row] != null);
      // Marks of one round stand side by side, so that intervals do not hide each other.
      const x = places.map(row => row + (at - (series.length - 1) / 2) * 0.07);
      const pick = name => places.map(row => each[name][row] ?? each.values[row]);
      const source = new Bokeh.ColumnDataSource({ data: {
        x, value: pick("values"), low: pick("low"), high: pick("high"),
        round: places.map(row => rows[row]), name: places.map(() => each.name),
      } });
      const column = name => ({ field: name });
      const line = figure.line({ x: column("x"), y: column("value"), source, line_color: colour, line_width: 2, line_dash: inTurn(DASHES, at) });
      figure.segment({ x0: column("x"), x1: column("x"), y0: column("low"), y1: column("high"), source, line_color: colour, line_width: 2, line_alpha: 0.75 });
      const marks = figure.scatter({ x: column("x"), y: column("value"), source, marker: inTurn(MARKERS, at), size: 10, fill_color: colour, line_color: colour });
      figure.add_tools(new Bokeh.HoverTool({ renderers: [marks], tooltips: [
        ["figure", "@name"], ["round", "@round"], ["value", "@value{0.000}"], ["interval", "@low{0.00} to @high{0.00}"],
      ] }));
      return [each.name, [line, marks]];
    });
  }

  function drawBars(figure, series, rows, chart) {
    const left = rows.map(() => 0);
    return series.map((each, at) => {
      const right = rows.map((_, row) => left[row] + (each.values[row] ?? 0));
      const source = new Bokeh.ColumnDataSource({ data: {
        y: rows.map((_, row) => row), left: [...left], right, value: each.values, row: rows, name: rows.map(() => each.name),
      } });
      right.forEach((value, row) => { left[row] = value; });
      const bar = figure.hbar({
        y: { field: "y" }, left: { field: "left" }, right: { field: "right" }, height: 0.62, source,
        fill_color: inTurn(COLOURS[colours()], at), line_color: null,
        hatch_pattern: inTurn(HATCHES, at), hatch_color: colours() === "dark" ? "#14171a" : "#ffffff", hatch_alpha: 0.65, hatch_scale: 9,
      });
      figure.add_tools(new Bokeh.HoverTool({ renderers: [bar], tooltips: [
        ["", "@row"], ["", "@name"], ["", chart.percent ? "@value{0.0%}" : "@value{0,0.[0]}"],
      ] }));
      return [each.name, [bar]];
    });
  }

  function drawRanges(figure, [each], rows, chart) {
    const source = new Bokeh.ColumnDataSource({ data: { y: rows.map((_, row) => row), low: each.low, high: each.high, row: rows } });
    const bar = figure.hbar({
      y: { field: "y" }, left: { field: "low" }, right: { field: "high" }, height: 0.4, source,
      fill_color: COLOURS[colours()][0], line_color: null,
    });
    const format = chart.percent ? "{0.00%}" : "{0.00}";
    figure.add_tools(new Bokeh.HoverTool({ renderers: [bar], tooltips: [["", "@row"], ["from", `@low${format}`], ["to", `@high${format}`]] }));
    return [];
  }

  function legendColumns(names, width) {
    const longest = Math.max(0, ...names.map(name => name.length));
    return Math.max(1, Math.min(names.length, Math.floor(width / (longest * 7.5 + 50))));
  }

  function addLegend(figure, entries, across) {
    const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
    figure.add_layout(new Bokeh.Legend({
      items: entries.map(([name, renderers]) => new Bokeh.LegendItem({ label: { value: name }, renderers })),
      orientation: "horizontal", ncols: across,
      border_line_color: null, background_fill_alpha: 0, label_text_color: ink, label_text_font_size: "12.5px",
      label_text_font: "system-ui, sans-serif", padding: 2, spacing: 14, margin: 4, location: "top_left",
    }), "above");
  }

  function whenSeen(act, margin) {
    const observer = new IntersectionObserver(entries => {
      for (const entry of entries.filter(entry => entry.isIntersecting)) {
        observer.unobserve(entry.target);
        act(entry.target);
      }
    }, { rootMargin: margin });
    return observer;
  }

  // -- pictures: decoded when scrolled to ----------------------------------------------------------------

  const uri = id => `data:image/webp;base64,${text(id)}`;
  const sheetRules = new Set();
  const rules = document.head.appendChild(make("style")).sheet;

  function showThumbnail(node) {
    const sheet = node.dataset.sheet;
    if (!sheetRules.has(sheet)) {
      rules.insertRule(`.sheet-${sheet} { background-image: url("${uri(`sheet-${sheet}`)}"); }`);
      sheetRules.add(sheet);
    }
    node.classList.add(`sheet-${sheet}`);
  }

  function showHeat(node) {
    node.style.backgroundImage = `url("${uri(`heat-${node.dataset.heat}`)}")`;
  }

  const thumbnails = whenSeen(showThumbnail, "300px");
  const heats = whenSeen(showHeat, "300px");

  function outline(shown) {
    const paths = [0, 1].map(() => make("path", { d: shown.mask }));
    return make("svg", { class: "mask", viewBox: `0 0 ${shown.width} ${shown.height}`, "aria-hidden": "true" }, ...paths);
  }

  // -- samples -------------------------------------------------------------------------------------------

  const columns = DATA.samples;
  const count = DATA.count;
  const cell = (name, row) => {
    const column = columns[name];
    return column.codes ? column.values[column.codes[row]] : column[row];
  };
  const pictured = row => DATA.shown[cell("sample_id", row)];
  const fixed = (value, digits) => (value == null ? "–" : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }));
  const percent = value => (value == null ? "–" : `${fixed(100 * value, 2)} %`);
  const decimal = value => fixed(value, 2);
  const score = value => (value == null ? "–" : String(Number(value.toPrecision(4))));
  const milliseconds = value => (value == null ? "–" : fixed(1000 * value, 1));
  const SHOWN = [ // columns of the table: name, heading, how a number is written
    ["sample_id", "sample"], ["round", "round"], ["category", "category"], ["generator", "generator"],
    ["defect", "defect"], ["outcome", "outcome"], ["reason", "reason"], ["area", "area", percent],
    ["severity", "severity", decimal], ["contrast", "contrast", decimal], ["leak", "leak", percent],
    ["hollow", "hollow", percent], ["attempts", "draws", String], ["seconds", "ms", milliseconds],
    ["prompt", "prompt"],
  ];
  const FILTERS = ["round", "category", "generator", "defect", "outcome", "reason"];
  const filters = Object.fromEntries(FILTERS.map(name => [name, ""]));
  const view = { mode: DATA.sheets ? "pictures" : "table", key: null, down: false, page: 0, words: "", rows: [] };
  const controls = {};

  function compare(a, b) {
    if (a == null || b == null) return (a == null) - (b == null);
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  }

  // Of [value, place] pairs; what has no value comes last either way.
  const ranking = down => (a, b) => {
    const turned = down && a[0] != null && b[0] != null;
    return (turned ? compare(b[0], a[0]) : compare(a[0], b[0])) || a[1] - b[1];
  };

  function select() {
    const active = FILTERS.filter(name => filters[name] !== "");
    const words = view.words.toLowerCase().split(/\s+/).filter(Boolean);
    const haystack = row => ["sample_id", "category", "generator", "defect", "reason", "prompt", "detail"]
      .map(name => cell(name, row)).join(" ").toLowerCase();
    const rows = [];
    for (let row = 0; row < count; row++) {
      if (!active.every(name => String(cell(name, row)) === filters[name])) continue;
      if (view.mode === "pictures" && !pictured(row)) continue;
      if (words.length) { const own = haystack(row); if (!words.every(word => own.includes(word))) continue; }
      rows.push(row);
    }
    const key = view.key ?? (view.mode === "pictures" ? "generator" : view.down ? "sample_id" : null);
    if (key) {
      const ranked = rows.map(row => [cell(key, row), row]);
      ranked.sort(ranking(view.down));
      view.rows = ranked.map(pair => pair[1]);
    } else view.rows = rows;
  }

  function refresh(keepPage = false) {
    if (!count) return;
    if (!keepPage) view.page = 0;
    select();
    const pages = Math.max(1, Math.ceil(view.rows.length / PAGE));
    view.page = Math.min(view.page, pages - 1);
    const first = view.page * PAGE;
    const rows = view.rows.slice(first, first + PAGE);
    const number = value => value.toLocaleString("en");
    byId("sample-count").textContent = view.rows.length
      ? `${number(first + 1)}–${number(first + rows.length)} of ${number(view.rows.length)}` +
        (view.mode === "pictures" ? " with pictures" : "")
      : "No sample fits the filters." + (view.mode === "pictures" ? " The table has those without a picture, too." : "");
    byId("page-back").disabled = view.page === 0;
    byId("page-on").disabled = view.page === pages - 1;
    byId("view-pictures")?.setAttribute("aria-pressed", view.mode === "pictures");
    byId("view-table").setAttribute("aria-pressed", view.mode === "table");
    if (byId("masks-on")) byId("masks-on").parentNode.hidden = view.mode !== "pictures";
    byId("sample-grid").hidden = view.mode !== "pictures";
    byId("sample-table").hidden = view.mode !== "table";
    if (view.mode === "pictures") showTiles(rows); else showRows(rows);
  }

  function showTiles(rows) {
    const nodes = [];
    let group = null;
    for (const row of rows) {
      const id = cell("sample_id", row), shown = pictured(row), generator = cell("generator", row);
      if (view.key === null && generator !== group) nodes.push(make("h3", {}, (group = generator)));
      const across = shown.place % 10, down = Math.floor((shown.place % 100) / 10);
      const thumb = make("span", {
        class: "thumb", "data-sheet": Math.floor(shown.place / 100),
        style: `background-position: calc(${-across} * var(--tile)) calc(${-down} * var(--tile))`,
      }, outline(shown));
      thumbnails.observe(thumb);
      nodes.push(make("button", {
        type: "button", class: "tile", "data-row": row,
        "aria-label": `Open sample ${id}: ${generator}, ${cell("defect", row)}, ${cell("category", row)}`,
      }, thumb, make("span", {}, `${cell("category", row)}: ${cell("defect", row)}`),
      make("span", { class: "faint" }, id)));
    }
    byId("sample-grid").replaceChildren(...nodes);
  }

  function showRows(rows) {
    const head = SHOWN.map(([name, heading, write]) => make("th", {
      scope: "col", class: write && "number",
      "aria-sort": view.key === name ? (view.down ? "descending" : "ascending") : null,
    }, make("button", { type: "button", "data-sort": name }, heading)));
    const body = rows.map(row => make("tr", {}, ...SHOWN.map(([name, , write], at) => {
      const value = cell(name, row);
      const shown = write ? write(value) : String(value);
      if (at === 0) return make("th", { scope: "row" },
        make("button", { type: "button", class: "quiet", "data-row": row, "aria-label": `Open sample ${shown}` }, shown));
      return make("td", { class: write && "number", title: shown.length > 24 ? shown : null }, shown);
    })));
    byId("sample-table").replaceChildren(make("table", {},
      make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body)));
  }

  function prepareSamples() {
    if (!count) return;
    const form = byId("filters");
    controls.words = make("input", { type: "search", placeholder: "id, prompt, reason …", oninput: event => {
      view.words = event.target.value;
      refresh();
    } });
    form.append(make("label", {}, "search", controls.words));
    for (const name of FILTERS) {
      const values = [...new Set(columns[name].values ?? columns[name])].map(String).filter(value => value !== "");
      controls[name] = make("select", { onchange: event => { filters[name] = event.target.value; refresh(); } },
        make("option", { value: "" }, "all"),
        ...values.sort(compare).map(value => make("option", { value }, value)));
      if (values.length > (name === "reason" ? 0 : 1)) form.append(make("label", {}, name, controls[name]));
    }
    const order = view.mode === "pictures" || DATA.sheets;
    if (order) {
      controls.order = make("select", { onchange: event => sortBy(event.target.value || null, view.down) },
        make("option", { value: "" }, "default"),
        ...SHOWN.map(([name, heading]) => make("option", { value: name }, heading)));
      controls.down = make("input", { type: "checkbox", onchange: event => sortBy(view.key, event.target.checked) });
      form.append(make("label", {}, "sort by", controls.order), make("label", { class: "check" }, controls.down, "descending"));
    }
    form.append(make("button", { type: "reset", onclick: () => { sortBy(null, false); setFilters({}); } }, "Reset"));
    form.addEventListener("submit", event => event.preventDefault());
    byId("view-pictures")?.addEventListener("click", () => { view.mode = "pictures"; refresh(); });
    byId("view-table").addEventListener("click", () => { view.mode = "table"; refresh(); });
    byId("page-back").addEventListener("click", () => turn(-1));
    byId("page-on").addEventListener("click", () => turn(1));
    byId("masks-on")?.addEventListener("change", event => showMasks(event.target.checked));
    refresh();
  }

  function turn(step) {
    view.page += step;
    refresh(true);
  }

  function sortBy(key, down) {
    view.key = key;
    view.down = down;
    if (controls.order) {
      controls.order.value = key ?? "";
      controls.down.checked = down;
    }
    refresh();
  }

  function setFilters(wanted) {
    view.words = controls.words.value = "";
    for (const name of FILTERS) {
      filters[name] = String(wanted[name] ?? "");
      controls[name].value = filters[name];
    }
    const lost = wanted.outcome && wanted.outcome !== "accepted";
    if (lost) view.mode = "table"; // what was not accepted has no picture
    refresh();
  }

  function showMasks(on) {
    document.body.classList.toggle("no-masks", !on);
    for (const box of document.querySelectorAll("#masks-on, #viewer-masks")) box.checked = on;
  }

  // -- opened pictures -----------------------------------------------------------------------------------

  const viewer = byId("viewer");
  let opened = null; // {list, at, show}

  function open(list, at, show) {
    opened = { list, at, show };
    render();
    if (!viewer.open) viewer.showModal();
  }

  function step(by) {
    const at = opened.at + by;
    if (at < 0 || at >= opened.list.length) return;
    opened.at = at;
    const focused = document.activeElement?.id;
    render();
    const again = focused && byId(focused);
    (again && !again.disabled ? again : byId("viewer-close")).focus();
  }

  function render() {
    const { title, controls: own = [], body } = opened.show(opened.list[opened.at]);
    viewer.replaceChildren(
      make("div", { class: "top" }, make("h2", { id: "viewer-title" }, title), ...own,
        make("button", { type: "button", id: "viewer-back", disabled: opened.at === 0, onclick: () => step(-1) }, "Previous"),
        make("button", { type: "button", id: "viewer-on", disabled: opened.at === opened.list.length - 1, onclick: () => step(1) }, "Next"),
        make("button", { type: "button", id: "viewer-close", onclick: () => viewer.close() }, "Close")),
      make("div", { class: "body" }, ...body));
    viewer.scrollTop = 0;
  }

  function facts(pairs) {
    return make("dl", {}, ...pairs.filter(([, value]) => value !== "" && value != null).flatMap(([name, value]) => [
      make("dt", {}, name), make("dd", {}, value instanceof Node ? value : String(value))]));
  }

  function pretty(json) {
    if (!json || json === "{}") return "";
    try { return make("pre", {}, JSON.stringify(JSON.parse(json), null, 1)); } catch { return json; }
  }

  function figure(caption, place, alt, shown) {
    if (place == null) return make("figure", {}, make("figcaption", {}, caption), make("p", { class: "empty" }, "Not stored in this page."));
    const image = make("img", { src: uri(`picture-${place}`), alt, width: shown.width, height: shown.height });
    return make("figure", {}, make("figcaption", {}, caption),
      make("div", { class: "frame" }, image, outline(shown)));
  }

  function sampleView(row) {
    const get = name => cell(name, row);
    const id = get("sample_id"), shown = pictured(row);
    const body = [];
    const own = [];
    if (shown) {
      own.push(make("label", { class: "check" }, make("input", {
        type: "checkbox", id: "viewer-masks", checked: !document.body.classList.contains("no-masks"),
        onchange: event => showMasks(event.target.checked),
      }), "Mask outline"));
      const first = shown.features
        ? make("figure", {}, make("figcaption", {}, "Sample"), make("p", { class: "empty" }, "Its features were changed, not its pixels; the outline on the normal says where."))
        : figure("Sample", shown.picture, `Sample ${id}: synthetic ${get("defect")} on ${get("category")}`, shown);
      body.push(make("div", { class: "pair" }, first,
        figure("Normal picture it was made from", shown.normal, `The normal picture of ${get("category")}`, shown)));
    } else if (get("outcome") === "accepted") {
      body.push(make("p", { class: "empty" }, "No picture of it is in this page; `flawsmith show` and the shards have it."));
    }
    if (get("outcome") === "accepted" || get("outcome") === DATA.vetoed) {
      const command = `${DATA.replay} ${id}`;
      const code = make("code", { id: "replay" }, command);
      const button = make("button", { type: "button", id: "copy", onclick: () => copy(command, code, button) }, "Copy");
      body.push(make("h3", {}, "Make it again"), make("div", { class: "command" }, code, button));
    } else {
      body.push(make("p", {}, `It was ${get("outcome")}: ${get("reason")}. Only accepted samples are stored and can be replayed.`));
    }
    body.push(make("h3", {}, "Recipe"), facts([
      ["round", get("round")], ["category", get("category")], ["generator", get("generator")], ["defect", get("defect")],
      ["prompt", get("prompt")], ["detail", get("detail")], ["wanted area", percent(get("wanted_area"))],
      ["severity", decimal(get("severity"))], ["spots", get("count")], ["location", get("location")],
      ["made from", columns.source ? get("source") : ""], ["image id", get("image_id")], ["licence", get("licence")],
      ["donors", get("donors")], ["seed", get("seed")], ["shard, batch", `${get("shard")}, ${get("batch")}`],
      ["params", pretty(get("params"))],
    ]), make("h3", {}, "Outcome"), facts([
      ["outcome", get("outcome")], ["reason", get("reason")], ["area", percent(get("area"))],
      ["contrast", decimal(get("contrast"))], ["leak", percent(get("leak"))], ["hollow", percent(get("hollow"))],
      ["draws", get("attempts")], ["took", `${milliseconds(get("seconds"))} ms on ${get("device")}`],
      ["checksum", get("checksum")], ["measures", pretty(get("measures"))], ["versions", pretty(get("versions"))],
    ]));
    return { title: id, controls: own, body };
  }

  async function copy(command, code, button) {
    try {
      await navigator.clipboard.writeText(command);
    } catch { // some browsers give a page from disk no clipboard
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
  }

  // -- heat maps -----------------------------------------------------------------------------------------

  const KINDS = { false_alarm: "false alarm", miss: "missed", gain: "gained" };
  const worst = { round: "", split: "", kind: "all" };

  const heatTitle = heat => `${KINDS[heat.kind]}: ${heat.category}${heat.kind === "false_alarm" ? "" : `, ${heat.defect}`}`;
  const share = value => (value == null ? "" : `${Math.round(100 * value)} %`);
  const heatNote = heat => heat.kind === "false_alarm"
    ? `score ${score(heat.score)}, alarm from ${score(heat.threshold)}`
    : `${share(heat.hit)} found${heat.before == null ? "" : `, before ${share(heat.before)}`}`;

  function heatView(place) {
    const heat = DATA.heatmaps[place];
    const alt = `${heatTitle(heat)}; left the picture with the true defect outlined, right its heat map`;
    return { title: heatTitle(heat), body: [
      make("div", { class: "frame" }, make("img", { src: uri(`heat-${place}`), alt })),
      make("h3", {}, "What the detector said"),
      facts([
        ["round", heat.round], ["split", heat.split], ["category", heat.category], ["defect", heat.defect],
        ["score", score(heat.score)], ["alarm from", score(heat.threshold)], ["found of it", share(heat.hit)],
        ["round before", share(heat.before)], ["image id", heat.image_id], ["picture", heat.path],
      ])] };
  }

  function showWorst() {
    const chosen = [...DATA.heatmaps.keys()].filter(place => Object.entries(worst).every(
      ([name, value]) => value === "all" || String(DATA.heatmaps[place][name]) === value));
    byId("worst-count").textContent = chosen.length ? `${chosen.length} pictures` : "No picture of this kind.";
    byId("worst-grid").replaceChildren(...chosen.map(place => {
      const heat = DATA.heatmaps[place];
      const thumb = make("span", { class: `thumb heat${byId("heat-on").checked ? " show" : ""}`, "data-heat": place });
      heats.observe(thumb);
      const note = heatNote(heat);
      return make("button", { type: "button", class: "tile", "data-place": place, "aria-label": `Open ${heatTitle(heat)}, ${note}` },
        thumb, make("span", {}, heatTitle(heat)), make("span", { class: "faint" }, note));
    }));
    return chosen;
  }

  function prepareHeats() {
    for (const strip of document.querySelectorAll(".strip")) for (const [at, node] of [...strip.children].entries()) {
      const heat = DATA.heatmaps[node.dataset.heat];
      node.setAttribute("aria-label", `Open ${heatTitle(heat)}, ${heatNote(heat)} (${at + 1} of ${strip.children.length})`);
      node.addEventListener("click", () => {
        const list = [...node.closest(".type").querySelectorAll(".heat")].map(other => Number(other.dataset.heat));
        open(list, list.indexOf(Number(node.dataset.heat)), heatView);
      });
      heats.observe(node);
    }
    if (!byId("worst-grid")) return;
    for (const name of ["round", "split", "kind"]) {
      const values = options(DATA.heatmaps, name).sort(compare);
      worst[name] = name === "kind" ? "all" : values.includes(FIRST[name]) ? FIRST[name] : values.at(-1);
      const offered = name === "kind" ? ["all", ...values] : values;
      if (offered.length > 1) byId("menus-worst").append(menu(name, offered, worst[name], value => {
        worst[name] = value;
        showWorst();
      }));
    }
    byId("heat-on").addEventListener("change", event => {
      for (const node of document.querySelectorAll("#worst-grid .heat")) node.classList.toggle("show", event.target.checked);
    });
    showWorst();
  }

  // -- tables of figures: sorted by their headings -------------------------------------------------------

  function prepareTable(table) {
    const heads = [...table.querySelectorAll("thead th")];
    const body = table.tBodies[0];
    const original = [...body.rows];
    const value = (row, at) => {
      const own = row.cells[at].firstChild?.textContent.trim() ?? "";
      const number = Number(own.replace(/[,%]/g, "").replace(/ .*/, ""));
      return own === "–" ? null : own === "" || Number.isNaN(number) ? own : number;
    };
    for (const [at, head] of heads.entries()) {
      if (original.every(row => row.cells[at].classList.contains("number"))) head.classList.add("number");
      const button = make("button", { type: "button", onclick: () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const ranked = original.map((row, place) => [value(row, at), place, row]);
        ranked.sort(ranking(down));
        body.replaceChildren(...ranked.map(item => item[2]));
      } });
      button.append(...head.childNodes);
      head.append(button);
    }
  }

  // -- keys and clicks -----------------------------------------------------------------------------------

  document.addEventListener("click", event => {
    const target = event.target.closest("[data-row], [data-place], [data-sort], [data-filter]");
    if (!target) return;
    const { row, place, sort, filter } = target.dataset;
    if (row !== undefined) open(view.rows, view.rows.indexOf(Number(row)), sampleView);
    if (place !== undefined) {
      const list = [...document.querySelectorAll("#worst-grid [data-place]")].map(node => Number(node.dataset.place));
      open(list, list.indexOf(Number(place)), heatView);
    }
    if (sort !== undefined) {
      sortBy(sort, view.key === sort && !view.down);
      document.querySelector(`[data-sort="${sort}"]`).focus();
    }
    if (filter !== undefined && count) {
      setFilters(JSON.parse(filter));
      byId("samples-title").parentNode.querySelector("#filters").scrollIntoView();
      controls.words.focus({ preventScroll: true });
    }
  });

  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input[type=search], select")) return;
    if (viewer.open && event.key === "ArrowLeft") step(-1);
    else if (viewer.open && event.key === "ArrowRight") step(1);
    else if (event.key === "m" && byId("masks-on")) showMasks(!byId("masks-on").checked);
    else if (event.key === "/" && controls.words && !viewer.open) controls.words.focus();
    else return;
    event.preventDefault();
  });

  viewer.addEventListener("click", event => { if (event.target === viewer) viewer.close(); });

  applyTheme();
  prepareSamples();
  prepareHeats();
  document.querySelectorAll("table.figures").forEach(prepareTable);
  document.querySelectorAll(".plot").forEach(prepareChart);
  performance.mark("interactive"); // filters, pictures and tables answer from here on
  addEventListener("DOMContentLoaded", () => { // the plotting library comes last in the file
    const charts = whenSeen(node => draw(node).then(() => performance.mark("chart")), "200px");
    document.querySelectorAll(".plot").forEach(node => charts.observe(node));
  });
})();
