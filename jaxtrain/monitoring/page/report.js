"use strict";
// Draws the curves of a report with uPlot. Text reaches the page as textContent only.
(() => {
  const { runs } = JSON.parse(document.getElementById("data").textContent);
  const alone = runs.length === 1;
  const longest = Math.max(...runs.map((run) => run.curves.x.step.length));
  const view = { x: "step", logX: false, marks: true, smooth: longest < 30 ? 0 : Math.min(0.98, 1 - 50 / (longest + 50)) };
  const charts = [];
  let zoom = null; // [min, max] of the x axis, shared by the charts
  let zooming = false;

  const element = (name, attributes = {}, ...children) => {
    const made = Object.assign(document.createElement(name), attributes);
    made.append(...children);
    return made;
  };
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const faint = (hex) => `${hex}55`;

  // Numbers as text.
  const plain = (v) => {
    if (v === null || v === undefined) return "–";
    const size = Math.abs(v);
    if (size && (size < 1e-3 || size >= 1e9)) return v.toExponential(2);
    return v.toLocaleString("en", { maximumSignificantDigits: size >= 1e4 ? 6 : 4 });
  };
  const compact = (v) => (v === null ? "" : Math.abs(v) >= 1e4 ? v.toLocaleString("en", { notation: "compact" }) : plain(v));
  const percent = (v) => (v === null || v === undefined ? "–" : `${plain(100 * v)}%`);
  const duration = (s) => {
    if (s === null || s === undefined) return "–";
    if (s < 120) return `${plain(s)}s`;
    const m = s / 60;
    return m < 120 ? `${plain(m)}m` : m < 2880 ? `${plain(m / 60)}h` : `${plain(m / 1440)}d`;
  };
  const formatX = (v) => (view.x === "seconds" ? duration(v) : compact(v));
  const xNames = { step: "step", tokens: "tokens", seconds: "time" };

  // Mean of the exponential moving averages from both ends, which does not lag. Of a long run each pair of points is an
  // extreme of a bucket: the average is that of the buckets' means.
  const average = (values) => {
    let total = 0, weight = 0;
    return values.map((v) => {
      if (v === null) return null;
      total = view.smooth * total + (1 - view.smooth) * v;
      weight = view.smooth * weight + 1 - view.smooth;
      return total / weight;
    });
  };
  const smoothed = (run, key) => {
    const { y, mean } = run.curves;
    const values = mean ? mean[key].flatMap((v) => [v, v]) : y[key];
    const back = average([...values].reverse()).reverse();
    return average(values).map((v, i) => (v === null ? null : (v + back[i]) / 2));
  };

  // Columns on the chosen x axis; uPlot needs it ascending, and a logarithmic axis positive values.
  const table = (x, columns, logY) => {
    const kept = [];
    x.forEach((v, i) => {
      if (v !== null && (!view.logX || v > 0) && (!kept.length || v > x[kept[kept.length - 1]])) kept.push(i);
    });
    return [kept.map((i) => x[i]), ...columns.map((c) => kept.map((i) => (logY && !(c[i] > 0) ? null : c[i])))];
  };

  // The specification of a chart has `parts(run)`: [label, x, values, style] of each line.
  const curve = (key, title, unit, more = {}) => ({
    title, unit, format: plain, ...more, shown: runs.some((run) => run.curves.y[key]),
    parts(run) {
      if (!run.curves.y[key]) return [];
      const [x, raw] = [run.curves.x[view.x], run.curves.y[key]];
      if (more.exact || view.smooth === 0) return [[more.label ?? title, x, raw, "line"]];
      const line = ["smoothed", x, smoothed(run, key), "line"];
      return alone ? [[more.label ?? title, x, raw, "faint"], line] : [line];
    },
  });

  const loss = curve("nll", "Loss", "nats per token", { label: "train" });
  const norm = curve("grad_norm", "Gradient norm", "before clipping", { label: "mean", log: true, threshold: true });
  const specifications = [
    {
      ...loss, shown: true, wide: alone,
      parts(run) {
        const { validation } = run.curves;
        const found = runs.some((r) => r.curves.y.nll) ? loss.parts(run) : [];
        return validation.nll.length ? [...found, ["validation", validation[view.x], validation.nll, "dots"]] : found;
      },
    },
    curve("learning_rate", "Learning rate", "", { exact: true, zero: true }),
    {
      ...norm,
      parts(run) {
        const { x, y } = run.curves, highest = y.grad_norm_max;
        const differs = highest && y.grad_norm && highest.some((v, i) => v !== y.grad_norm[i]);
        return [...(alone && differs ? [["maximum", x[view.x], highest, "extreme"]] : []), ...norm.parts(run)];
      },
    },
    {
      title: "Gradient norm, histogram", unit: "share of the steps", histogram: true, format: percent, threshold: true,
      shown: runs.some((run) => run.curves.histogram),
    },
    {
      title: "Clipped steps", unit: "share", format: percent, zero: true, shown: runs.some((run) => run.curves.clipping),
      parts: ({ curves: { clipping } }) => (clipping ? [["clipped", clipping[view.x], clipping.share, "line"]] : []),
    },
    curve("update_ratio", "Update / parameters", "ratio of the norms", { log: true, exact: true }),
    curve("tokens_per_second", "Throughput", "tokens per second", { zero: true }),
    curve("mfu", "MFU", "share of the peak", { format: percent, zero: true }),
    ...(alone ? Object.entries(runs[0].curves.layers).map(([key, cells]) => ({
      title: key === "layer_grad_norm" ? "Gradient norm of each layer" : "Update / parameters of each layer",
      unit: "color on a logarithmic scale", heat: cells, format: plain, shown: true,
    })) : []),
  ];
  const drawn = new Set(["nll", "learning_rate", "grad_norm", "grad_norm_max", "update_ratio", "tokens_per_second", "mfu", "update_norm", "param_norm"]);
  const same = (key) => runs.every(({ curves: { y } }) => !y[key] || y[key].every((v) => !v) || (key === "loss" && y.nll && y[key].every((v, i) => v === y.nll[i])));
  const others = [...new Set(runs.flatMap((run) => Object.keys(run.curves.y)))].filter((key) => !drawn.has(key) && !same(key));
  specifications.push(curve("param_norm", "Parameter norm", "", { exact: true }));
  specifications.push(...others.map((key) => curve(key, key === "loss" ? "Loss with all its terms" : key.replaceAll("_", " "), "")));

  // Axes.
  const axes = (spec, yAxis = {}) => {
    const common = { stroke: color("soft"), grid: { stroke: color("grid"), width: 1 }, ticks: { stroke: color("grid"), width: 1 } };
    const values = (format) => (u, splits) => splits.map((v) => (v === null ? "" : format(v)));
    return [
      { ...common, values: values(spec.histogram ? compact : formatX), space: 60 },
      { ...common, values: values(spec.format === percent ? percent : compact), size: 62, ...yAxis },
    ];
  };

  const options = (spec, series, more = {}) => ({
    width: 400, height: spec.wide ? 320 : 240, series, legend: { live: true },
    scales: {
      x: { time: false, distr: view.logX && !spec.histogram ? 3 : 1, ...more.x },
      y: { distr: spec.logNow ? 3 : 1, ...(spec.zero && !spec.logNow ? { range: (u, low, high) => uPlot.rangeNum(0, high || 1, 0.1, true) } : {}), ...more.y },
    },
    axes: more.axes ?? axes(spec),
    cursor: spec.histogram ? { drag: { x: true, y: false } } : {
      drag: { x: true, y: false },
      sync: { key: "x", scales: ["x", null], setSeries: false, filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
    },
    hooks: {
      setScale: [(u, key) => key === "x" && !spec.histogram && shareZoom(u)],
      draw: [(u) => drawMarks(u, spec), ...(more.draw ?? [])],
      setCursor: more.setCursor ?? [],
    },
  });

  const shareZoom = (source) => {
    if (zooming) return;
    zooming = true;
    const { min, max } = source.scales.x;
    zoom = min === null ? null : [min, max];
    if (zoom) charts.forEach(({ plot, spec }) => plot && plot !== source && !spec.histogram && plot.setScale("x", { min, max }));
    zooming = false;
  };

  const vertical = (u, x, style, dash) => {
    if (x === null || x < u.scales.x.min || x > u.scales.x.max) return;
    const at = Math.round(u.valToPos(x, "x", true));
    u.ctx.save();
    u.ctx.strokeStyle = style;
    u.ctx.setLineDash(dash);
    u.ctx.beginPath();
    u.ctx.moveTo(at, u.bbox.top);
    u.ctx.lineTo(at, u.bbox.top + u.bbox.height);
    u.ctx.stroke();
    u.ctx.restore();
  };

  const drawMarks = (u, spec) => {
    const threshold = alone && spec.threshold ? runs[0].threshold : null;
    if (threshold && spec.histogram) vertical(u, threshold, color("s1"), [6, 4]);
    else if (threshold && threshold >= u.scales.y.min && threshold <= u.scales.y.max) {
      const at = Math.round(u.valToPos(threshold, "y", true));
      u.ctx.save();
      u.ctx.strokeStyle = u.ctx.fillStyle = color("s1");
      u.ctx.setLineDash([6, 4]);
      u.ctx.beginPath();
      u.ctx.moveTo(u.bbox.left, at);
      u.ctx.lineTo(u.bbox.left + u.bbox.width, at);
      u.ctx.stroke();
      u.ctx.textAlign = "right";
      u.ctx.fillText(`threshold ${plain(threshold)}`, u.bbox.left + u.bbox.width - 4, at - 5);
      u.ctx.restore();
    }
    if (!alone || !view.marks || spec.histogram || spec.timeline) return;
    for (const mark of runs[0].marks) {
      if (mark.kind === "finding") vertical(u, mark[view.x], color("bad"), [3, 3]);
      if (mark.kind === "restart" || mark.kind === "change") vertical(u, mark[view.x], color("soft"), [2, 4]);
      if (mark.kind === "skip") vertical(u, mark[view.x], faint(color("warn")), []);
    }
  };

  // A text that follows the cursor; `find(u)` returns it, or "".
  const tooltip = (find) => {
    let tip = null;
    return (u) => {
      if (!tip) u.over.append((tip = element("div", { className: "tip" })));
      const text = u.cursor.left >= 0 ? find(u) : "";
      tip.textContent = text;
      tip.style.display = text ? "block" : "none";
      if (!text) return;
      const left = Math.min(Math.max(u.cursor.left - tip.offsetWidth / 2, 0), Math.max(u.over.clientWidth - tip.offsetWidth, 0));
      tip.style.left = `${left}px`;
      tip.style.top = `${u.cursor.top > 60 ? u.cursor.top - tip.offsetHeight - 12 : u.cursor.top + 16}px`;
    };
  };

  const styles = {
    line: (stroke) => ({ stroke, width: 1.8 }),
    faint: (stroke) => ({ stroke: faint(stroke), width: 1, points: { show: false } }),
    extreme: () => ({ stroke: faint(color("s3")), width: 1, points: { show: false } }),
    dots: (stroke) => ({ stroke, width: 1.4, dash: alone ? [] : [5, 4], points: { show: true, size: 6, fill: stroke } }),
  };

  const lines = (spec) => {
    const tables = [], series = [{ label: xNames[view.x], value: (u, v) => formatX(v) }];
    let positive = false;
    runs.forEach((run, number) => {
      spec.parts(run).forEach(([label, x, values, style]) => {
        positive ||= values.some((v) => v > 0);
        tables.push({ x, values });
        const stroke = color(`s${alone ? (style === "dots" ? 1 : 0) : number % 8}`);
        const name = alone ? label : style === "dots" ? `${run.name}, validation` : run.name;
        series.push({
          label: name, spanGaps: true, value: (u, v) => spec.format(v), ...styles[style](stroke),
          ...(x.length === 1 ? { points: { show: true, size: 7, fill: stroke } } : {}),
        });
      });
    });
    spec.logNow = spec.log && positive;
    const joined = uPlot.join(tables.map(({ x, values }) => table(x, [values], spec.logNow)));
    return [options(spec, series), joined];
  };

  const histogram = (spec) => {
    const tables = [], series = [{ label: "gradient norm", value: (u, v) => plain(v) }];
    runs.forEach((run, number) => {
      if (!run.curves.histogram) return;
      const { edges, counts } = run.curves.histogram;
      const total = counts.reduce((a, b) => a + b, 0) || 1;
      tables.push([edges, [...counts.map((count) => count / total), 0]]);
      const stroke = color(`s${alone ? 0 : number % 8}`);
      series.push({
        label: alone ? "steps" : run.name, stroke, width: 1.4, fill: `${stroke}${alone ? "44" : "18"}`, spanGaps: true,
        paths: uPlot.paths.stepped({ align: 1 }), points: { show: false }, value: (u, v) => percent(v),
      });
    });
    return [options(spec, series, { x: { distr: 3 } }), uPlot.join(tables)];
  };

  const viridis = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  const heatColor = (share) => {
    const at = Math.min(Math.max(share, 0), 1) * (viridis.length - 1), low = Math.min(Math.floor(at), viridis.length - 2);
    return `rgb(${viridis[low].map((v, i) => Math.round(v + (at - low) * (viridis[low + 1][i] - v))).join()})`;
  };

  const heatMap = (spec) => {
    const { layer, values } = spec.heat, x = spec.heat[view.x];
    const positive = values.flat().filter((v) => v > 0);
    const [low, high] = [Math.min(...positive), Math.max(...positive)].map(Math.log10);
    spec.note = positive.length ? [plain(10 ** low), plain(10 ** high)] : null;
    const edge = (i) => (i <= 0 ? x[0] - ((x[1] ?? x[0] + 1) - x[0]) / 2 : i >= x.length ? x[x.length - 1] + (x[x.length - 1] - (x[x.length - 2] ?? x[0] - 1)) / 2 : (x[i - 1] + x[i]) / 2);
    const cells = (u) => {
      u.ctx.save();
      u.ctx.beginPath();
      u.ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
      u.ctx.clip();
      values.forEach((row, i) => {
        const [left, right] = [edge(i), edge(i + 1)].map((v) => u.valToPos(view.logX ? Math.max(v, x[0] / 2) : v, "x", true));
        row.forEach((v, j) => {
          const [top, bottom] = [j + 0.5, j - 0.5].map((at) => u.valToPos(at, "y", true));
          u.ctx.fillStyle = v > 0 ? heatColor(high > low ? (Math.log10(v) - low) / (high - low) : 0.5) : color("line");
          u.ctx.fillRect(left, top, right - left + 0.6, bottom - top + 0.6);
        });
      });
      u.ctx.restore();
    };
    const find = (u) => {
      const j = Math.round(u.posToVal(u.cursor.top, "y")), i = u.cursor.idx;
      return i === null || i === undefined || layer[j] === undefined ? "" : `layer ${layer[j]}, ${xNames[view.x]} ${formatX(x[i])}: ${plain(values[i][j])}`;
    };
    const splits = () => [...new Set([0, 1, 2, 3, 4].map((i) => Math.round((i * (layer.length - 1)) / 4)))];
    const y = { range: () => [-0.5, layer.length - 0.5] };
    const axis = { splits, values: (u, found) => found.map((j) => `layer ${layer[j]}`), grid: { show: false }, size: 76 };
    const [made, data] = [options(spec, [{}, { show: true, stroke: "transparent", points: { show: false } }], { y, axes: axes(spec, axis), draw: [cells], setCursor: [tooltip(find)] }), [x, x.map(() => null)]];
    return [{ ...made, legend: { show: false } }, data];
  };

  const timeline = (spec) => {
    const { marks } = runs[0];
    const kinds = [...new Set(marks.map((mark) => mark.kind))];
    const tones = { finding: "bad", skip: "warn", save: "s2", validation: "s1", restart: "s0", stop: "soft", change: "s3" };
    const series = [{}], tables = [];
    kinds.forEach((kind, row) => {
      const x = [...new Set(marks.filter((mark) => mark.kind === kind).map((mark) => mark[view.x]))].sort((a, b) => a - b);
      tables.push(table(x, [x.map(() => kinds.length - 1 - row)], false));
      const fill = color(tones[kind]);
      series.push({ label: kind, stroke: fill, paths: () => null, points: { show: true, size: 9, fill } });
    });
    const { step } = runs[0].curves.x;
    const ends = runs[0].curves.x[view.x].filter((v) => !view.logX || v > 0);
    tables.push([[ends[0], ends[ends.length - 1]].slice(0, step.length > 1 ? 2 : 1), Array(Math.min(step.length, 2)).fill(null)]);
    series.push({ show: false });
    const find = (u) => {
      const near = marks.map((mark) => ({ mark, away: Math.hypot(u.valToPos(mark[view.x], "x") - u.cursor.left, (u.valToPos(kinds.length - 1 - kinds.indexOf(mark.kind), "y") - u.cursor.top) / 1.5) }));
      const best = near.reduce((a, b) => (b.away < a.away ? b : a));
      return best.away > 14 ? "" : [...new Set(near.filter((n) => n.away === best.away).map((n) => n.mark.text))].join(" ");
    };
    const y = { range: () => [-0.6, kinds.length - 0.4] };
    const axis = { splits: () => kinds.map((kind, row) => row), values: () => [...kinds].reverse(), size: 84 };
    const made = options(spec, series, { y, axes: axes(spec, axis), setCursor: [tooltip(find)] });
    return [{ ...made, height: 70 + 26 * kinds.length, legend: { show: false } }, uPlot.join(tables)];
  };

  if (alone && runs[0].marks.length) specifications.splice(1, 0, { title: "Time line", unit: "hover or tap a mark", timeline: true, wide: true, shown: true, format: plain });

  // The page.
  const draw = (chart) => {
    const { spec, body } = chart;
    const [made, data] = (spec.histogram ? histogram : spec.heat ? heatMap : spec.timeline ? timeline : lines)(spec);
    chart.plot?.destroy();
    body.replaceChildren();
    zooming = true;
    chart.plot = new uPlot({ ...made, width: body.clientWidth || 400 }, data, body);
    if (zoom && !spec.histogram) chart.plot.setScale("x", { min: zoom[0], max: zoom[1] });
    zooming = false;
    if (spec.note) body.append(element("div", { className: "scale" }, spec.note[0], element("i"), spec.note[1]));
  };
  const drawAll = () => charts.forEach(draw);

  const pressed = (button, on) => button.setAttribute("aria-pressed", String(on));
  const container = document.getElementById("charts");
  for (const spec of specifications.filter((one) => one.shown)) {
    const body = element("div"), head = element("div", { className: "head" }, element("h3", { textContent: spec.title }), element("small", { textContent: spec.unit }));
    const chart = { spec, body, plot: null };
    if (spec.parts) {
      const button = element("button", { textContent: "log", title: "logarithmic axis" });
      pressed(button, Boolean(spec.log));
      button.onclick = () => { spec.log = !spec.log; pressed(button, spec.log); draw(chart); };
      head.append(button);
    }
    container.append(element("div", { className: spec.wide ? "chart wide" : "chart" }, head, body));
    charts.push(chart);
  }

  const group = element("div", { className: "group" });
  for (const [key, name] of Object.entries(xNames)) {
    const button = element("button", { textContent: name });
    pressed(button, key === view.x);
    button.onclick = () => {
      view.x = key;
      zoom = null;
      [...group.children].forEach((one) => pressed(one, one === button));
      drawAll();
    };
    group.append(button);
  }
  const check = (name, key) => {
    const input = element("input", { type: "checkbox", checked: view[key] });
    input.onchange = () => { view[key] = input.checked; drawAll(); };
    return element("label", {}, input, name);
  };
  const slider = element("input", { type: "range", min: 0, max: 99, value: Math.round(100 * view.smooth) });
  slider.oninput = () => { view.smooth = Number(slider.value) / 100; drawAll(); };
  const part = (name, share) => {
    const button = element("button", { textContent: name });
    button.onclick = () => {
      const ends = runs.map((run) => run.curves.x[view.x]);
      const [low, high] = [Math.min(...ends.map((x) => x[0])), Math.max(...ends.map((x) => x[x.length - 1]))];
      zoom = share === 1 || low === high ? null : [high - share * (high - low), high];
      drawAll();
    };
    return button;
  };
  document.getElementById("controls").append(
    element("label", {}, "x axis", group), element("label", {}, "smoothing", slider), check("log x", "logX"),
    ...(alone ? [check("marks", "marks")] : []),
    element("label", {}, "show", part("all", 1), part("last half", 0.5), part("last tenth", 0.1)),
    element("small", { textContent: "drag to zoom, double-click to reset" }),
  );
  drawAll();

  let width = container.clientWidth;
  new ResizeObserver(() => {
    if (container.clientWidth === width) return;
    width = container.clientWidth;
    requestAnimationFrame(() => charts.forEach(({ plot, body }) => plot?.setSize({ width: body.clientWidth, height: plot.height })));
  }).observe(container);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  const print = (on) => { document.documentElement.classList.toggle("print", on); drawAll(); };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
})();
