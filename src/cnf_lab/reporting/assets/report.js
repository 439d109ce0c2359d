"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const COLOURS = 8;

  // ---- tables that sort
  const key = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.v ?? cell.textContent.trim();
    if (text === "") return null;
    return Number.isNaN(Number(text)) ? text.toLowerCase() : Number(text);
  };
  const compare = (a, b) =>
    typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
  for (const table of document.querySelectorAll("table.sortable"))
    table.tHead.querySelectorAll("th").forEach((head, column) =>
      head.firstElementChild.addEventListener("click", () => {
        const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        table.tHead.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
        const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
        // What is not known stays at the end, whichever way.
        rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)));
        table.tBodies[0].append(...rows.map(([, row]) => row));
      }),
    );

  // ---- one filter for the whole page
  const rows = [...$("table").tBodies[0].rows];
  const texts = new Map(rows.map((row) => [row.dataset.run, row.textContent.toLowerCase()]));
  const visible = new Set(texts.keys());
  const filter = () => {
    const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    visible.clear();
    for (const [run, text] of texts) if (words.every((word) => text.includes(word))) visible.add(run);
    for (const element of document.querySelectorAll("[data-run]")) element.hidden = !visible.has(element.dataset.run);
    $("count").textContent = `${visible.size} of ${texts.size}`;
    draw();
  };
  $("filter").addEventListener("input", filter);

  // ---- configurations, packed together
  let unpacked = null;
  const unpack = () => {
    unpacked ??= (async () => {
      const bytes = Uint8Array.from(atob($("configurations").textContent), (sign) => sign.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      return JSON.parse(await new Response(stream).text());
    })();
    return unpacked;
  };
  const open = (element) => {
    const target = element.querySelector("pre.config");
    if (!target || target.dataset.shown) return;
    target.dataset.shown = "1";
    unpack().then(
      (all) => (target.textContent = all.texts[all.of[Number(target.dataset.config)]]),
      () => (target.textContent = "This browser cannot unpack it; see config_resolved.yaml in the run's folder."),
    );
  };
  for (const element of document.querySelectorAll("details")) element.addEventListener("toggle", () => open(element));
  const reveal = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (target instanceof HTMLDetailsElement) target.open = true;
  };
  addEventListener("hashchange", reveal);
  document.addEventListener("click", (event) => event.target.closest?.("a.run") && setTimeout(reveal));

  // ---- curves
  const panels = JSON.parse($("curve-data").textContent);
  const make = (name, attributes, text) => {
    const element = document.createElementNS(SVG, name);
    for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const off = new Set();
  for (const panel of panels) panel.runs.slice(16).forEach((run) => off.add(run.id));
  const colour = (place) => `var(--c${place % COLOURS})`;
  const dashes = (place) => ["", "7 3", "2 3", "9 3 2 3"][Math.floor(place / COLOURS) % 4];

  const ticks = (low, high, log, most) => {
    if (log) {
      const found = [];
      const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
      for (let power = first; power <= last; power++)
        for (const digit of last - first <= 2 ? [1, 2, 5] : [1]) found.push(digit * 10 ** power);
      const inside = found.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
      if (inside.length > 1) return inside;
    }
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((digit) => digit * power >= rough) * power;
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-6; k++) found.push(k * step);
    return found;
  };
  const told = (value) => {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e9) return `${+(value / 1e9).toPrecision(4)}G`;
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
    if (size >= 1e4) return `${+(value / 1e3).toPrecision(4)}k`;
    return size < 1e-3 ? value.toExponential(0) : `${+value.toPrecision(6)}`;
  };

  const chart = (box, lines, xTitle, yTitle, log, cut) => {
    box.replaceChildren();
    const points = lines.flatMap((line) => line.points);
    if (!points.length) {
      const empty = document.createElement("p");
      empty.className = "muted";
      empty.textContent = "Nothing to draw with these choices.";
      return box.append(empty);
    }
    const width = Math.max(280, box.clientWidth), height = Math.min(340, Math.max(220, width * 0.42));
    const xs = points.map((point) => point[0]), ys = points.map((point) => point[1]).sort((a, b) => a - b);
    const min = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
    const max = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
    let [x0, x1, y0, y1] = [log ? min(xs) : Math.min(0, min(xs)), max(xs), ys[0], ys[ys.length - 1]];
    let clipped = false;
    if (cut && ys.length > 20) {
      const high = ys[Math.floor(0.93 * (ys.length - 1))];
      const limit = high + 0.3 * (high - y0);
      clipped = limit < y1;
      y1 = Math.min(y1, limit);
    }
    if (x1 <= x0) x1 = x0 + Math.max(1, Math.abs(x0) * 0.1);
    const room = (y1 - y0 || Math.abs(y0) * 0.05 || 1) * 0.06;
    [y0, y1] = [y0 - room, y1 + room];
    const yTicks = ticks(y0, y1, false, 6);
    const labels = yTicks.map((tick) => told(+tick.toPrecision(10)));
    const left = 16 + 7.2 * Math.max(...labels.map((label) => label.length)), top = 26, right = 14, bottom = 42;
    const at = (x) => left + (width - left - right) * (log ? Math.log(x / x0) / Math.log(x1 / x0) : (x - x0) / (x1 - x0));
    const up = (y) => height - bottom - ((height - top - bottom) * (y - y0)) / (y1 - y0);
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
    svg.setAttribute("aria-label", `${yTitle} against ${xTitle}, ${lines.length} curves`);
    const clip = `clip-${box.id}`;
    const defs = make("clipPath", { id: clip });
    defs.append(make("rect", { x: left - 4, y: top - 2, width: width - left - right + 8, height: height - top - bottom + 4 }));
    svg.append(defs);
    yTicks.forEach((tick, k) => {
      svg.append(make("line", { class: "grid", x1: left, x2: width - right, y1: up(tick), y2: up(tick) }));
      svg.append(make("text", { x: left - 6, y: up(tick) + 4, "text-anchor": "end" }, labels[k]));
    });
    let end = -Infinity;
    for (const tick of ticks(x0, x1, log, width / 110)) {
      const label = told(+tick.toPrecision(10)), place = at(tick);
      svg.append(make("line", { class: "grid", x1: place, x2: place, y1: height - bottom, y2: height - bottom + 4 }));
      if (place - 4 * label.length < end) continue;
      end = place + 4 * label.length + 6;
      svg.append(make("text", { x: place, y: height - bottom + 17, "text-anchor": "middle" }, label));
    }
    svg.append(make("text", { class: "title", x: 2, y: 13 }, yTitle + (clipped ? ", spikes cut" : "")));
    svg.append(make("text", { class: "title", x: width - right, y: height - 6, "text-anchor": "end" }, xTitle));
    for (const line of lines) {
      const group = make("g", { "clip-path": `url(#${clip})` });
      const path = line.points.map(([x, y], k) => `${k ? "L" : "M"}${at(x).toFixed(1)} ${up(y).toFixed(1)}`).join("");
      const style = { d: path, stroke: colour(line.place) };
      if (line.faint) style.class = "faint";
      else if (dashes(line.place)) style["stroke-dasharray"] = dashes(line.place);
      group.append(make("title", {}, line.label), make("path", style));
      if (line.points.length < 12)
        for (const [x, y] of line.points) group.append(make("circle", { cx: at(x), cy: up(y), r: 2.4, fill: colour(line.place) }));
      svg.append(group);
    }
    box.append(svg);
  };

  const draw = () => {
    if (!panels.length) return;
    const panel = panels[Number($("panel").value) || 0], axis = Number($("axis").value), log = $("log").checked;
    const split = $("split").value;
    const shown = panel.runs.map((run, place) => ({ ...run, place })).filter((run) => visible.has(String(run.id)));
    const on = shown.filter((run) => !off.has(run.id));
    // Runs that never solve have no evaluations to be drawn against.
    const usable = (list) => (list ?? []).map((row) => [row[axis], row[3]]).filter(([x]) => !log || x > 0);
    const counted = (run) => axis !== 2 || (run.val ?? run.train ?? []).some((row) => row[2] > 0);
    const lines = (name, faint) =>
      on.filter(counted).map((run) => ({ label: run.label, place: run.place, faint, points: usable(run[name]) }))
        .filter((line) => line.points.length);
    const xTitle = ["training steps", "seconds of training", "evaluations in training"][axis];
    chart($("likelihood"), lines(split, false), xTitle, `${panel.title}, ${$("split").selectedOptions[0].text} (${panel.unit})`, log, $("cut").checked);
    chart($("nfe"), [...lines("nfe", false), ...lines("nfe_val", true)], xTitle, "NFE: training step (line), validation (dotted)", log, false);
    const silent = on.filter((run) => !counted(run)).length;
    $("hint").textContent = silent ? `${silent} runs do not solve in training and are not drawn against evaluations.` : "";
    $("legend").replaceChildren(...shown.map((run) => {
      const label = document.createElement("label"), box = document.createElement("input");
      box.type = "checkbox";
      box.checked = !off.has(run.id);
      box.dataset.id = run.id;
      box.addEventListener("change", () => {
        box.checked ? off.delete(run.id) : off.add(run.id);
        draw();
        document.querySelector(`#legend [data-id="${run.id}"]`)?.focus();
      });
      const sign = make("svg", { width: 26, height: 10, "aria-hidden": "true" });
      sign.append(make("path", { d: "M1 5H25", stroke: colour(run.place), "stroke-width": 2.5, "stroke-dasharray": dashes(run.place) }));
      label.append(box, sign, document.createTextNode(run.label));
      return label;
    }));
  };
  if (panels.length) {
    panels.forEach((panel, number) => $("panel").append(new Option(`${panel.title} (${panel.runs.length})`, number)));
    for (const id of ["panel", "axis", "split", "log", "cut"]) $(id).addEventListener("change", draw);
    const all = (hide) => () => {
      for (const run of panels[Number($("panel").value)].runs)
        if (visible.has(String(run.id))) hide ? off.add(run.id) : off.delete(run.id);
      draw();
    };
    $("all").addEventListener("click", all(false));
    $("none").addEventListener("click", all(true));
    let width = 0;
    new ResizeObserver(([entry]) => {
      if (Math.abs(entry.contentRect.width - width) < 2) return;
      width = entry.contentRect.width;
      requestAnimationFrame(draw);
    }).observe($("likelihood"));
    draw();
  }
  reveal();
})();
