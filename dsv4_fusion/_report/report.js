"use strict";
(() => {
  const started = performance.now();
  const data = JSON.parse(document.getElementById("data").textContent);
  const report = data.report;
  const KIND = { fused: "fused", near: "near miss", left: "left alone" };
  const $ = (id) => document.getElementById(id);

  // Small helpers: everything from the data goes in as text, never as markup.
  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== false && value !== undefined) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== undefined && child !== null));
    return node;
  }
  function shape(tag, attributes = {}, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }
  const count = (number, one, many) => `${number.toLocaleString("en")} ${number === 1 ? one : many || one + "s"}`;
  function bytes(number) {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = 0;
    while (Math.abs(number) >= 1024 && unit < units.length - 1) { number /= 1024; unit += 1; }
    return `${number.toFixed(unit && Math.abs(number) < 100 ? 1 : 0)} ${units[unit]}`;
  }
  const arrow = (pair) => `${pair[0].toLocaleString("en")} → ${pair[1].toLocaleString("en")}`;

  // Theme
  const themes = ["system", "light", "dark"];
  $("theme").addEventListener("click", () => {
    const next = themes[(themes.indexOf(document.documentElement.dataset.theme || "system") + 1) % 3];
    if (next === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    $("theme").textContent = `Theme: ${next}`;
  });

  // Marks: sites, near misses and what is left alone, of all graphs, each with the layers it is drawn in
  const marks = [];
  const views = [];
  data.drawings.forEach((drawing, graph) => {
    const own = drawing.marks.map((mark) => ({ ...mark, drawing, views: [] }));
    marks.push(...own);
    drawing.layers.forEach((layer) => {
      const view = { graph, drawing, path: layer.path, template: drawing.templates[layer.template], marks: layer.marks.map((i) => own[i]), open: new Set() };
      view.marks.forEach((mark) => mark.views.push(view));
      views.push(view);
    });
  });

  // Summary
  $("summary").textContent = data.summary;
  const total = (index) => data.drawings.reduce((sum, drawing) => sum + drawing.cost[index], 0);
  const saved = marks.reduce((sum, mark) => sum + (mark.cost ? mark.cost[1] - mark.cost[3] : 0), 0);
  const cards = [
    [report.sites.length, report.sites.some((site) => !site.rewritten) ? "sites matched" : "sites fused"],
    [report.near_misses.length, "near misses"],
    [report.left_alone.length, "left alone: recognised, no fusion yet"],
    [arrow([report.nodes_before, report.nodes_after]), "graph nodes"],
  ];
  if (data.drawings.length) {
    cards.push([arrow([total(0), total(2)]), "kernels, by estimate"]);
    cards.push([bytes(saved), "less to read and write, by estimate"]);
  }
  $("cards").append(...cards.map(([value, label]) => make("div", { class: "card" }, make("b", {}, String(value)), make("span", {}, label))));

  function table(heads, rows) {
    const cell = (tag, value) => {
      const [content, kind] = Array.isArray(value) ? value : [value, undefined];
      return make(tag, { class: kind, scope: tag === "th" ? "col" : undefined }, content);
    };
    return make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...heads.map((head) => cell("th", head)))),
      make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((value) => cell("td", value)))))));
  }
  const number = (value) => [String(value), "number"];
  const fused = Object.entries(report.counts).map(([name, sites]) => {
    const own = marks.filter((mark) => mark.kind === "fused" && mark.fusion === name);
    const sum = (index) => own.reduce((all, mark) => all + mark.cost[index], 0);
    return [make("code", {}, name), number(sites), number(own.length ? arrow([sum(0), sum(2)]) : "–"), number(own.length ? `${bytes(sum(1))} → ${bytes(sum(3))}` : "–")];
  });
  if (fused.length) $("fusions").append(table(["fusion", number("sites"), number("kernels, by estimate"), number("bytes moved, by estimate")], fused));
  if (report.notes.length || !data.drawings.length) {
    $("notes").hidden = false;
    const more = data.drawings.length ? [] : ["no picture: only dsv4_fusion.explain, and python -m dsv4_fusion explain, collect what is drawn"];
    $("notes").querySelector("ul").append(...[...report.notes, ...more].map((note) => make("li", {}, note)));
  }
  if (report.near_misses.length) {
    $("misses").hidden = false;
    $("misses").querySelector("div").append(table(["module", "fusion", "what differs", "source", ["", "action"]], report.near_misses.map((miss) => {
      const mark = marks.find((entry) => entry.kind === "near" && entry.path === miss.path && entry.reason === miss.reason);
      return [make("span", { class: "path" }, miss.path || "(no module)"), make("code", {}, miss.fusion), miss.reason, make("code", {}, miss.source || ""),
        [mark && mark.views.length ? make("button", { type: "button", onclick: () => go(mark.views[0], mark) }, "Show") : "", "action"]];
    })));
  }
  const listed = marks.length
    ? marks.map((mark) => [chip(mark), make("span", { class: "path" }, mark.path || "(no module)"), mark.op ? make("code", {}, mark.op) : mark.reason, number(mark.nodes),
      [mark.views.length ? make("button", { type: "button", onclick: () => go(mark.views[0], mark), "aria-label": `Show ${mark.fusion} in ${mark.path}` }, "Show") : "", "action"]])
    : report.sites.map((site) => [site.fusion, make("span", { class: "path" }, site.path), make("code", {}, site.op), number(site.nodes), ["", "action"]]);
  $("sites").append(listed.length ? table(["fusion", "module", "becomes", number("nodes"), ["", "action"]], listed) : make("p", {}, "Nothing matched."));
  function chip(mark) {
    return make("span", { class: `chip ${mark.kind}` }, mark.kind === "fused" ? mark.fusion : `${KIND[mark.kind]}: ${mark.fusion}`);
  }
  $("footer").textContent = `dsv4_fusion ${data.versions.dsv4_fusion}, torch ${data.versions.torch}. Estimates: pointwise operations are computed where they are used, `
    + "reductions of one shape share a kernel, every kernel reads and writes each value once; both sides are counted so. Layout: dagre, MIT.";

  // Layers: a tree of modules and regions, drawn when it is opened
  views.forEach((view, index) => {
    const several = data.drawings.length > 1;
    const same = view.template.of === view.path ? "" : `drawn as ${view.template.of}`;
    const canvas = make("div", { class: "canvas" });
    view.element = make("details", { class: "layer", id: `layer-${index}`, ontoggle: () => view.element.open && draw(view) },
      make("summary", {}, make("span", { class: "path" }, (several ? `graph ${view.graph}: ` : "") + view.path), ...view.marks.map(chip),
        make("span", { class: "same" }, `${count(view.template.nodes.length, "node")}${same && ", " + same}`)), canvas);
    view.canvas = canvas;
    $("layers").append(view.element);
  });
  if (!views.length) $("layers").append(make("p", { class: "hint" }, "No picture was collected."));

  const NAME = 0, CODE = 1, SOURCE = 2, MODULE = 3, INPUTS = 4, SLOT = 5;

  function tree(view) {
    if (view.root) return view.root;
    const root = (view.root = { id: "root", label: view.path, items: [], rows: 0, groups: new Map(), holds: new Set() });
    const parent = new Map();
    const group = (above, key, fields) => {
      if (!above.groups.has(key)) {
        const fresh = { id: `${above.id}/${key}`, items: [], rows: 0, groups: new Map(), holds: new Set(), ...fields };
        above.groups.set(key, fresh);
        above.items.push(fresh);
        parent.set(fresh, above);
      }
      return above.groups.get(key);
    };
    const modules = (row) => row[MODULE].split(".").filter(Boolean);
    const inside = new Map();  // a region: the innermost module that holds all of it, or nothing where it is most of that
    const sizes = new Map();
    view.template.nodes.forEach((row) => {
      if (row[SLOT] < 0) return;
      sizes.set(row[SLOT], (sizes.get(row[SLOT]) || 0) + 1);
      const own = modules(row), shared = inside.get(row[SLOT]) || own;
      const differs = shared.findIndex((part, depth) => part !== own[depth]);
      inside.set(row[SLOT], differs < 0 ? shared : shared.slice(0, differs));
    });
    inside.forEach((shared, slot) => {
      const around = view.template.nodes.filter((row) => row[MODULE].split(".")[0] === shared[0]).length;
      if (shared.length === 1 && 2 * sizes.get(slot) > around) inside.set(slot, []);
    });
    view.template.nodes.forEach((row, index) => {
      let at = root;
      const mark = view.marks[row[SLOT]];
      (mark ? inside.get(row[SLOT]) : modules(row)).forEach((part) => { at = group(at, part, { label: part, kind: "module" }); });
      if (mark) {
        for (let up = at; up; up = parent.get(up)) up.holds.add(mark);
        at = group(at, `mark ${row[SLOT]}`, { label: mark.fusion, kind: mark.kind, mark });
      }
      const leaf = { id: `${at.id}/#${index}`, index, row };
      at.items.push(leaf);
      for (let up = at; up; up = parent.get(up)) up.rows += 1;
    });
    wrap(root);
    return root;
  }
  // Where a module has operations of its own beside modules, those in a row become one box.
  function wrap(group) {
    const inner = group.items.filter((item) => item.items);
    inner.forEach(wrap);
    if (!inner.length) return;
    const items = [];
    group.items.sort((a, b) => first(a) - first(b)).forEach((item) => {
      const last = items[items.length - 1];
      if (item.items) items.push(item);
      else if (last && last.run) { last.items.push(item); last.rows += 1; }
      else items.push({ id: `${item.id}+`, label: "operations", kind: "module", run: true, holds: new Set(), items: [item], rows: 1 });
    });
    group.items = items.map((item) => (item.run && item.rows === 1 ? item.items[0] : item));
  }
  const first = (item) => (item.items ? first(item.items[0]) : item.index);

  function operator(row) {
    const found = /= ([\w.]+)\(/.exec(row[CODE]);
    return (found ? found[1] : row[NAME]).replace(/^aten\.|^prims\./, "").replace(/\.(default|Tensor|Scalar|int|dim_IntList|dim|self|using_ints|Tensor_Scalar)$/, "");
  }
  const type = (row) => (/^\w+: (.*?) = /.exec(row[CODE]) || ["", ""])[1];
  const pen = document.createElement("canvas").getContext("2d");
  function width(text, small) {
    pen.font = `${small ? 10.5 : 12}px ui-monospace, monospace`;
    return pen.measureText(text).width;
  }

  // Every open box is laid out for itself and is one node of the layout around it: each layout stays small.
  const HEADER = 26, PAD = 10;
  function label(item) {
    if (!item.items) return [operator(item.row), type(item.row).length > 34 ? type(item.row).slice(0, 33) + "…" : type(item.row)];
    if (!item.mark) {
      const inside = [...item.holds];
      const held = inside.length > 1 ? `, holds ${inside.length} regions` : inside.length ? `, holds ${inside[0].fusion}` : "";
      return [item.label, count(item.rows, "node") + held];
    }
    return [item.label, `${KIND[item.kind]}, ${item.rows < item.mark.nodes ? `${item.rows} of ` : ""}${count(item.mark.nodes, "node")}`];
  }
  function trails(view) {
    if (view.trails) return view.trails;
    view.trails = new Map();
    (function walk(group, above) {
      group.items.forEach((item) => (item.items ? walk(item, [...above, item]) : view.trails.set(item.index, [...above, item])));
    })(view.root, []);
    const used = new Set();
    view.edges = new Map();  // a group: the edges between what it holds
    const edge = (group, from, to) => {
      if (!view.edges.has(group)) view.edges.set(group, new Map());
      view.edges.get(group).set(`${from} ${to}`, [from, to]);
    };
    view.template.nodes.forEach((row, index) => row[INPUTS].forEach((input) => {
      const to = view.trails.get(index);
      if (input < 0) return edge(view.root, "in", to[0].id);
      const from = view.trails.get(input);
      used.add(input);
      let depth = 0;
      while (from[depth] === to[depth]) depth += 1;
      return edge(depth ? from[depth - 1] : view.root, from[depth].id, to[depth].id);
    }));
    view.template.nodes.forEach((row, index) => { if (!used.has(index)) edge(view.root, view.trails.get(index)[0].id, "out"); });
    return view.trails;
  }
  const STUBS = { in: "from earlier layers", out: "to what follows" };
  function arrange(view, group) {
    const state = JSON.stringify([...view.open].filter((id) => id.startsWith(`${group.id}/`)).sort());
    if (group.arranged && group.arranged.state === state) return group.arranged;
    const graph = new dagre.graphlib.Graph();
    graph.setGraph({ rankdir: "TB", nodesep: 16, ranksep: 26, edgesep: 8, marginx: PAD, marginy: PAD, ranker: group.items.length > 150 ? "tight-tree" : "network-simplex" });
    graph.setDefaultEdgeLabel(() => ({}));
    group.items.forEach((item) => {
      const inner = item.items && view.open.has(item.id) ? arrange(view, item) : undefined;
      const lines = label(item);
      graph.setNode(item.id, inner ? { item, inner, width: Math.max(inner.width, width(lines.join(" ")) + 50), height: inner.height + HEADER }
        : { item, lines, width: Math.max(width(lines[0]), width(lines[1], true)) + (item.items ? 48 : 22) + (item.holds && item.holds.size ? 12 : 0), height: 38 });
    });
    const edges = view.edges.get(group) || new Map();
    edges.forEach(([from, to]) => {
      [from, to].filter((id) => STUBS[id]).forEach((id) => graph.setNode(id, { stub: STUBS[id], width: width(STUBS[id]) + 20, height: 24 }));
      graph.setEdge(from, to);
    });
    dagre.layout(graph);
    const reach = graph.edges().flatMap((name) => graph.edge(name).points.map((point) => point.x));  // beyond the boxes, too
    const left = Math.max(0, PAD - Math.min(PAD, ...reach)), right = Math.max(graph.graph().width, ...reach.map((x) => x + PAD));
    group.arranged = { state, graph, left, width: right + left, height: graph.graph().height };
    return group.arranged;
  }
  function paint(view, svg, tip, arranged, dx, dy) {
    const graph = arranged.graph;
    dx += arranged.left;
    graph.edges().forEach((name) => svg.append(shape("path", { class: "edge", d: curve(graph.edge(name).points, dx, dy), "marker-end": `url(#${tip})` })));
    graph.nodes().forEach((name) => {
      const at = graph.node(name), x = at.x - at.width / 2 + dx, y = at.y - at.height / 2 + dy;
      if (at.stub) svg.append(shape("g", { class: "stub" }, shape("rect", { class: "box", x, y, width: at.width, height: at.height, rx: 12 }), text(x + at.width / 2, y + 16, at.stub, "", "middle")));
      else svg.append(element(view, at.item, at.inner ? "cluster" : "", x, y, at.width, at.height, at.lines || label(at.item)));
      if (at.inner) paint(view, svg, tip, at.inner, x + (at.width - at.inner.width) / 2, y + HEADER);
    });
  }
  function draw(view) {
    const root = tree(view);
    trails(view);
    const all = groupsOf(root), arranged = arrange(view, root);
    const w = Math.ceil(arranged.width), h = Math.ceil(arranged.height);
    const svg = shape("svg", { width: w, height: h, viewBox: `0 0 ${w} ${h}`, role: "group", "aria-label": `Graph of ${view.path}` });
    const tip = `tip-${views.indexOf(view)}`;
    svg.append(shape("defs", {}, shape("marker", { id: tip, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" }, shape("path", { d: "M0 0L8 4L0 8z" }))));
    paint(view, svg, tip, arranged, 0, 0);
    const bar = make("div", { class: "bar" },
      make("button", { type: "button", onclick: () => { all.filter((item) => item.mark || item.holds.size).forEach((item) => view.open.add(item.id)); draw(view); } }, "Open the regions"),
      make("button", { type: "button", onclick: () => { view.open.clear(); draw(view); } }, "Close all"));
    view.canvas.replaceChildren(bar, svg);
    svg.addEventListener("keydown", (event) => walk(event, svg));
  }
  const groupsOf = (group) => group.items.filter((item) => item.items).flatMap((item) => [item, ...groupsOf(item)]);

  function curve(given, dx, dy) {
    const points = given.map((point) => ({ x: point.x + dx, y: point.y + dy }));
    let path = `M${points[0].x} ${points[0].y}`;
    for (let i = 1; i < points.length - 1; i += 1) {
      const middle = { x: (points[i].x + points[i + 1].x) / 2, y: (points[i].y + points[i + 1].y) / 2 };
      path += `Q${points[i].x} ${points[i].y} ${middle.x} ${middle.y}`;
    }
    const end = points[points.length - 1];
    return `${path}L${end.x} ${end.y}`;
  }
  function text(x, y, content, kind, anchor) {
    const node = shape("text", { x, y, class: kind, "text-anchor": anchor || "start" });
    node.textContent = content;
    return node;
  }

  function element(view, item, cluster, x, y, w, h, lines) {
    const slot = item.row && item.row[SLOT], mark = item.mark || (slot >= 0 ? view.marks[slot] : undefined);
    const differs = item.row && mark && mark.kind === "near" && mark.differs === item.row[NAME];
    const kind = item.items ? item.kind : `op${differs ? " differs" : ""}`;
    const opened = Boolean(cluster);
    const label = `${lines.join(", ")}${item.items ? (opened ? ", open" : ", closed") : ""}`;
    const node = shape("g", { class: `item ${kind} ${cluster}`, tabindex: 0, role: "button", "data-id": item.id, "aria-label": label });
    if (item.items) node.setAttribute("aria-expanded", String(opened));
    if (view.selected === item.id) node.classList.add("selected");
    node.append(shape("rect", { class: "box", x, y, width: w, height: h, rx: item.items ? 7 : 4 }));
    if (!cluster && item.holds && item.holds.size) {
      const kinds = ["near", "fused", "left"].filter((kind) => [...item.holds].some((entry) => entry.kind === kind));
      kinds.forEach((kind, i) => node.append(shape("g", { class: kind }, shape("rect", { class: "box", x: x + w - 14, y: y + 6 + i * 11, width: 8, height: 8, rx: 2 }))));
    }
    const title = shape("title");
    title.textContent = item.row ? item.row[CODE] : `${label}${mark && mark.reason ? `: ${mark.reason}` : ""}`;
    node.append(title);
    if (cluster) node.append(text(x + 28, y + 15, lines[0]));
    else {
      const left = item.items ? x + 30 : x + 11;
      node.append(text(left, y + 16, lines[0]), text(left, y + 30, lines[1], "small"));
    }
    const flip = (event) => { if (event) event.stopPropagation(); toggle(view, item); };
    if (item.items) {
      const button = shape("g", { class: "toggle", "aria-hidden": "true" }, shape("rect", { x: x + 6, y: cluster ? y + 4 : y + 11, width: 16, height: 16, rx: 3 }), text(x + 14, (cluster ? y + 4 : y + 11) + 12, cluster ? "−" : "+", "", "middle"));
      button.addEventListener("click", flip);
      node.append(button);
      node.addEventListener("dblclick", flip);
    }
    node.addEventListener("click", () => (item.items && !item.mark ? toggle(view, item) : select(view, item)));
    node.addEventListener("keydown", (event) => {
      const wants = { "+": true, "=": true, ArrowRight: true, "-": false, ArrowLeft: false }[event.key];
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); item.items && !item.mark ? toggle(view, item) : select(view, item); }
      else if (item.items && wants !== undefined) { event.preventDefault(); if (view.open.has(item.id) !== wants) toggle(view, item); }
    });
    return node;
  }
  function walk(event, svg) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const items = [...svg.querySelectorAll("g.item")].sort((a, b) => {
      const p = a.getBoundingClientRect(), q = b.getBoundingClientRect();
      return p.top - q.top || p.left - q.left;
    });
    const next = items[items.indexOf(document.activeElement) + step];
    if (next) next.focus();
  }
  function focusItem(view, id) {
    const node = [...view.canvas.querySelectorAll("g.item")].find((entry) => entry.dataset.id === id);
    if (!node) return;
    node.focus({ preventScroll: true });
    const open = node.getAttribute("aria-expanded") === "true";  // of an open box its header, not its middle
    (open ? node.querySelector(".toggle") : node).scrollIntoView({ block: "center", inline: open ? "start" : "center" });
  }
  function toggle(view, item) {
    if (!view.open.delete(item.id)) view.open.add(item.id);
    draw(view);
    focusItem(view, item.id);
  }

  // The panel
  let back = null;
  function select(view, item) {
    views.forEach((other) => { other.selected = undefined; });
    document.querySelectorAll("g.item.selected").forEach((node) => node.classList.remove("selected"));
    view.selected = item.id;
    const node = [...view.canvas.querySelectorAll("g.item")].find((entry) => entry.dataset.id === item.id);
    if (node) node.classList.add("selected");
    back = () => focusItem(view, item.id);
    const panel = $("panel");
    panel.hidden = false;
    panel.replaceChildren(make("button", { type: "button", class: "close", "aria-label": "Close", onclick: close }, "✕"), ...(item.mark ? aboutMark(view, item) : aboutRow(view, item)));
    panel.scrollTop = 0;
  }
  function close() {
    $("panel").hidden = true;
    if (back) back();
  }
  const facts = (pairs) => make("dl", {}, ...pairs.filter(([, value]) => value !== undefined && value !== "").flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  function code(source, differs) {
    const block = make("pre", { tabindex: 0 });
    source.split("\n").forEach((line) => {
      const found = /^(\w+)(: .*?)( = .*)$/.exec(line);
      const parts = found ? [found[1], make("span", { class: "type" }, found[2]), found[3]] : [line];
      const here = differs && found && found[1] === differs;
      block.append(here ? make("span", { class: "differs" }, ...parts) : make("span", {}, ...parts), "\n");
    });
    return block;
  }
  function aboutMark(view, item) {
    const mark = item.mark, codes = mark.drawing.codes;
    const parts = [make("h3", {}, chip(mark), " ", mark.path || "(no module)")];
    parts.push(facts([["becomes", mark.op], [mark.kind === "near" ? "differs" : "why", mark.reason], ["source", mark.source && make("code", {}, mark.source)], ["nodes", String(mark.nodes)],
      ["kernels", mark.cost && `${arrow([mark.cost[0], mark.cost[2]])}, by estimate`], ["bytes moved", mark.cost && `${bytes(mark.cost[1])} → ${bytes(mark.cost[3])}, by estimate`]]));
    parts.push(make("button", { type: "button", onclick: () => toggle(view, item) }, "Open or close it in the graph"));
    parts.push(make("h4", {}, mark.kind === "near" ? "What was found of the pattern" : "Before"), code(codes[mark.before], mark.differs));
    if (mark.after !== undefined) parts.push(make("h4", {}, "After"), code(codes[mark.after]));
    return parts;
  }
  function aboutRow(view, item) {
    const row = item.row, nodes = view.template.nodes;
    const users = nodes.filter((other) => other[INPUTS].includes(item.index));
    const list = (rows) => (rows.length ? code(rows.map((entry) => entry[CODE]).join("\n")) : make("p", { class: "hint" }, "Outside this layer."));
    const as = view.template.of === view.path ? "" : ` (names as in ${view.template.of})`;
    const mark = row[SLOT] >= 0 ? view.marks[row[SLOT]] : undefined;
    const differs = mark && mark.kind === "near" && mark.differs === row[NAME];
    return [make("h3", {}, operator(row)), facts([["module", [view.path, row[MODULE]].filter(Boolean).join(".") + as], ["source", make("code", {}, view.drawing.sources[row[SOURCE]] || "")],
      ["region", mark && `${KIND[mark.kind]}: ${mark.fusion}`], ["differs", differs ? mark.reason : undefined]]), make("h4", {}, "Operation"), code(row[CODE], differs ? row[NAME] : undefined),
    make("h4", {}, "Reads"), list(row[INPUTS].filter((input) => input >= 0).map((input) => nodes[input])), make("h4", {}, "Read by"), list(users)];
  }

  // Going somewhere: open the layer and all boxes on the way, then select
  function go(view, target) {
    const root = tree(view);
    const trail = (function find(group, above) {
      for (const item of group.items) {
        if (item === target || item.mark === target || item.index === target || item.id === target) return [...above, item];
        const inner = item.items ? find(item, [...above, item]) : undefined;
        if (inner) return inner;
      }
      return undefined;
    })(root, []);
    if (!trail) return;
    trail.slice(0, -1).forEach((item) => view.open.add(item.id));
    view.element.open = true;
    draw(view);
    const item = trail[trail.length - 1];
    if (!item.items || item.mark) select(view, item);
    requestAnimationFrame(() => focusItem(view, item.id));
  }

  // Search
  let index;
  function entries() {
    if (index) return index;
    index = marks.filter((mark) => mark.views.length).map((mark) => ({ words: `${KIND[mark.kind]} ${mark.path} ${mark.fusion} ${mark.op || ""} ${mark.reason || ""} ${mark.source}`, label: [chip(mark), " ", mark.path], go: () => go(mark.views[0], mark) }));
    views.forEach((view) => {
      index.push({ words: view.path, label: ["layer ", view.path], go: () => { view.element.open = true; view.element.scrollIntoView(); view.element.querySelector("summary").focus(); } });
      view.template.nodes.forEach((row, at) => {
        const module = [view.path, row[MODULE]].filter(Boolean).join(".");
        index.push({ words: `${operator(row)} ${row[NAME]} ${module} ${view.drawing.sources[row[SOURCE]]}`, label: [`${operator(row)} `, make("code", {}, module)], go: () => go(view, at) });
      });
    });
    index.forEach((entry) => { entry.words = entry.words.toLowerCase(); });
    return index;
  }
  function search() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean), results = $("results");
    results.hidden = !words.length;
    if (!words.length) return;
    const found = entries().filter((entry) => words.every((word) => entry.words.includes(word)));
    const leave = (entry) => { results.hidden = true; entry.go(); };
    results.replaceChildren(make("p", {}, found.length ? `${count(found.length, "result")}${found.length > 60 ? ", the first 60" : ""}` : "Nothing found."),
      ...found.slice(0, 60).map((entry) => make("button", { type: "button", onclick: () => leave(entry) }, ...entry.label.map((part) => (typeof part === "string" ? part : part.cloneNode(true))))));
  }
  $("search").addEventListener("input", search);
  $("search").addEventListener("keydown", (event) => {
    const choice = $("results").querySelector("button");
    if ((event.key === "Enter" || event.key === "ArrowDown") && choice && !$("results").hidden) { event.preventDefault(); event.key === "Enter" ? choice.click() : choice.focus(); }
  });
  $("results").addEventListener("keydown", (event) => {
    const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = document.activeElement[step];
    (next && next.tagName === "BUTTON" ? next : $("search")).focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/INPUT|TEXTAREA/.test(document.activeElement.tagName)) { event.preventDefault(); $("search").focus(); }
    if (event.key === "Escape") { if (!$("results").hidden) { $("results").hidden = true; $("search").focus(); } else if (!$("panel").hidden) close(); }
  });
  document.addEventListener("click", (event) => { if (!event.target.closest("#results, #search")) $("results").hidden = true; });

  // Begin with the first near miss, or the first layer that something is fused in
  const begin = views.find((view) => view.marks.some((mark) => mark.kind === "near")) || views.find((view) => view.marks.length) || views[0];
  if (begin) begin.element.open = true;
  document.documentElement.dataset.ready = String(Math.round(performance.now() - started));
})();
