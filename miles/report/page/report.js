// The charts of the page, and what a reader does with them. Nothing is loaded: the data lie in the
// page, and a live page asks the server that it came from.
(() => {
  "use strict";
  const root = document.documentElement;
  const state = { x: "step", smooth: 0, log: false, hidden: new Map() };
  const AXES = { step: "step", tokens: "trained tokens", time: "time of training" };
  const AXIS_SCALES = { step: 1, tokens: 1, time: 10 };
  let data = unpacked(JSON.parse(document.getElementById("run-data").textContent));
  let plots = [];
  let zoom = null;
  let isFollowing = false;

  // The places on an axis come as differences, which are short: 5, 1, 1 stands for 5, 6, 7.
  function unpacked(content) {
    for (const chart of content.charts) {
      for (const [name, differences] of Object.entries(chart.x)) {
        let sum = 0;
        chart.x[name] = differences.map((difference) => (sum += difference) / AXIS_SCALES[name]);
      }
    }
    return content;
  }

  // ---------------------------------------------------------------- numbers

  const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 2 });

  function compact(value) {
    const size = Math.abs(value);
    for (const [unit, name] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
      if (size >= unit * 10 || (unit > 1e3 && size >= unit)) return `${+(value / unit).toPrecision(4)}${name}`;
    }
    return grouped.format(value);
  }

  function shownValue(chart, value) {
    if (value === null || value === undefined) return "–";
    if (chart.share) return `${+(value * 100).toFixed(2)}%`;
    const size = Math.abs(value);
    if (size !== 0 && size < 1e-3) return value.toExponential(2);
    if (size >= 1e4) return compact(value);
    return String(+value.toPrecision(5));
  }

  function shownTime(seconds) {
    const whole = Math.round(seconds);
    const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
    const two = (number) => String(number).padStart(2, "0");
    return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
  }

  const shownX = { step: (v) => grouped.format(v), tokens: compact, time: shownTime };

  // ---------------------------------------------------------------- smoothing

  // An exponential mean. A point's weight falls with the distance in thousandths of the axis, so
  // that a long run, which has more steps than points, is smoothed as a short one.
  function smoothed(xs, values, amount) {
    const last = xs[xs.length - 1];
    const scale = Math.min(1000, xs.length) / (last - xs[0] || 1);
    let mean = 0;
    let weight = 0;
    let before = null;
    return values.map((value, place) => {
      if (value === null) return null;
      const kept = before === null ? 0 : Math.pow(amount, Math.max((xs[place] - before) * scale, 1e-9));
      before = xs[place];
      mean = mean * kept + value * (1 - amount);
      weight = weight * kept + (1 - amount);
      return mean / weight;
    });
  }

  // ---------------------------------------------------------------- colours

  const probe = document.createElement("span");
  probe.hidden = true;
  document.body.append(probe);

  function color(name, alpha = 1) {
    probe.style.color = `var(--${name})`;
    const parts = getComputedStyle(probe).color.match(/[\d.]+/g);
    return `rgba(${parts.slice(0, 3).join(",")},${(parts[3] || 1) * alpha})`;
  }

  const colorOf = (curve) => `c${curve.color % 7}`;
  // Beyond the palette, dashes tell curves apart.
  const dashOf = (curve) => (curve.kind === "evaluation" ? [6, 4] : [[], [10, 3], [2, 3]][Math.floor(curve.color / 7) % 3]);

  // ---------------------------------------------------------------- a chart

  const element = (tag, className, text = "") => {
    const made = document.createElement(tag);
    made.className = className;
    made.textContent = text;
    return made;
  };

  function cardOf(chart) {
    const card = element("section", chart.wide ? "card wide" : "card");
    card.id = `chart-${chart.name}`;
    const title = element("h3", "", chart.title);
    if (chart.unit) title.append(element("span", "pale", ` (${chart.unit})`));
    const plot = element("div", "plot");
    plot.tabIndex = 0;
    plot.setAttribute("role", "img");
    const legend = element("div", "legend");
    const note = element("div", "note");
    card.append(title, element("p", "about", chart.about), legend, plot, note);
    return { chart, card, plot, legend, note, u: null, columns: [], buttons: [], at: null };
  }

  function fillLegend(view) {
    const hidden = state.hidden.get(view.chart.name) || new Set();
    view.at = element("span", "at");
    view.buttons = view.chart.curves.map((curve) => {
      const button = element("button", "");
      button.type = "button";
      button.setAttribute("aria-pressed", String(!hidden.has(curve.label)));
      button.title = "show or hide this curve";
      const swatch = element("span", dashOf(curve).length ? "swatch dashed" : "swatch");
      swatch.style.setProperty("--curve", `var(--${colorOf(curve)})`);
      const value = element("b", "");
      button.append(swatch, element("span", "", curve.label), value);
      button.addEventListener("click", () => {
        const names = state.hidden.get(view.chart.name) || new Set();
        if (!names.delete(curve.label)) names.add(curve.label);
        state.hidden.set(view.chart.name, names);
        draw(view);
      });
      return { button, value };
    });
    view.legend.replaceChildren(view.at, ...view.buttons.map((entry) => entry.button));
  }

  // What the legend shows: the values at a step, of evaluations the last one before it.
  function showValues(view, place) {
    const { chart, u } = view;
    const xs = chart.x.step;
    const isPointed = place !== null && place !== undefined;
    const index = isPointed ? place : xs.length - 1;
    const axis = state.x === "step" ? "" : ` · ${shownX[state.x](u.data[0][index])}${state.x === "tokens" ? " tokens" : ""}`;
    view.at.textContent = `${isPointed ? "" : "last "}step ${grouped.format(xs[index])}${axis}`;
    chart.curves.forEach((curve, number) => {
      let found = index;
      if (curve.kind === "evaluation" || !isPointed) {
        while (found > 0 && curve.values[found] === null) found -= 1;
      }
      let text = shownValue(chart, curve.values[found]);
      const mean = view.columns[number].smooth;
      if (mean) text = `${shownValue(chart, mean[found])} (${text})`;
      if (isPointed && found !== index && curve.values[found] !== null) text += ` at ${grouped.format(xs[found])}`;
      view.buttons[number].value.textContent = text;
    });
  }

  // Stalls, starts and skipped steps within a few pixels of the cursor, in words.
  function showNote(view) {
    const left = view.u.cursor.left;
    if (left === undefined || left < 0) {
      view.note.textContent = "";
      return;
    }
    const near = (from, to) => left >= view.u.valToPos(from, "x") - 6 && left <= view.u.valToPos(to, "x") + 6;
    const texts = [];
    for (const band of view.chart.bands) {
      if (near(band.from[state.x], band.to[state.x])) {
        const span = band.from.step === band.to.step ? `step ${band.from.step}` : `steps ${band.from.step} to ${band.to.step}`;
        texts.push(`${span}: ${band.text}`);
      }
    }
    for (const mark of data.marks) {
      if (near(mark.at[state.x], mark.at[state.x])) {
        texts.push(mark.kind === "start" ? `started at step ${mark.at.step}: ${mark.text}` : mark.text);
      }
    }
    view.note.textContent = texts.slice(0, 3).join(" · ");
  }

  function drawBands(view, u) {
    u.ctx.save();
    u.ctx.fillStyle = color("stall");
    for (const band of view.chart.bands) {
      const from = u.valToPos(band.from[state.x], "x", true);
      const to = u.valToPos(band.to[state.x], "x", true);
      const begin = Math.max(from - 1.5, u.bbox.left);
      const end = Math.min(Math.max(to, from) + 1.5, u.bbox.left + u.bbox.width);
      if (end > begin) u.ctx.fillRect(begin, u.bbox.top, end - begin, u.bbox.height);
    }
    u.ctx.restore();
  }

  function drawMarks(u) {
    u.ctx.save();
    for (const mark of data.marks) {
      const x = Math.round(u.valToPos(mark.at[state.x], "x", true));
      if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
      u.ctx.strokeStyle = color(mark.kind === "start" ? "c3" : "c1", 0.75);
      u.ctx.lineWidth = 1.5 * devicePixelRatio;
      u.ctx.setLineDash(mark.kind === "start" ? [] : [4 * devicePixelRatio, 4 * devicePixelRatio]);
      u.ctx.beginPath();
      u.ctx.moveTo(x, u.bbox.top);
      u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
      u.ctx.stroke();
    }
    u.ctx.restore();
  }

  // The columns of a chart: the values as they are, and the smoothed ones beside them.
  function columnsOf(chart, xs, isLog) {
    return chart.curves.map((curve) => {
      const raw = isLog ? curve.values.map((value) => (value > 0 ? value : null)) : curve.values;
      const canSmooth = curve.kind === "line" && state.smooth > 0;
      return { curve, raw, smooth: canSmooth ? smoothed(xs, raw, state.smooth) : null };
    });
  }

  function seriesOf(view) {
    const hidden = state.hidden.get(view.chart.name) || new Set();
    const series = [{}];
    for (const { curve, smooth } of view.columns) {
      const isEvaluation = curve.kind === "evaluation";
      const common = { show: !hidden.has(curve.label), scale: "y", dash: dashOf(curve), spanGaps: isEvaluation };
      const stroke = color(colorOf(curve));
      series.push({
        ...common,
        stroke: smooth ? color(colorOf(curve), 0.28) : stroke,
        width: smooth ? 1 : 1.6,
        paths: curve.kind === "stairs" ? uPlot.paths.stepped({ align: 1 }) : undefined,
        points: isEvaluation ? { show: true, size: 7, fill: stroke, stroke } : { size: 5, fill: stroke, stroke },
      });
      if (smooth) series.push({ ...common, stroke, width: 2, points: { show: false } });
    }
    return series;
  }

  function rangeOf(chart, isLog) {
    if (isLog) return undefined;
    return (u, low, high) => {
      if (low === null || high === null) return [0, 1];
      const room = (high - low || Math.abs(high) || 1) * 0.06;
      const isFromZero = chart.share || chart.name === "queue-depth" || (low >= 0 && low - room < 0);
      return [isFromZero ? 0 : low - room, high + room];
    };
  }

  const sizeOf = (view) => ({
    width: Math.max(view.plot.clientWidth, 120),
    height: view.chart.wide && innerWidth > 760 ? 320 : 220,
  });

  function axisWidth(u, values) {
    const longest = Math.max(...(values || [""]).map((text) => (text || "").length));
    return 16 + longest * 7;
  }

  function draw(view) {
    const { chart } = view;
    const isLog = state.log && chart.log;
    const xs = chart.x[state.x];
    view.columns = columnsOf(chart, xs, isLog);
    const columns = [xs];
    for (const { raw, smooth } of view.columns) columns.push(raw, ...(smooth ? [smooth] : []));

    const axis = { stroke: color("pale"), font: "12px system-ui, sans-serif", ticks: { show: false } };
    const grid = { stroke: color("line"), width: 1 };
    const y = { distr: isLog ? 3 : 1 };
    if (rangeOf(chart, isLog)) y.range = rangeOf(chart, isLog);
    const options = {
      ...sizeOf(view),
      legend: { show: false },
      padding: [10, 14, 0, 0],
      cursor: {
        drag: { x: true, y: false, dist: 6 },
        points: { size: 7 },
        sync: { key: "run", filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
      },
      scales: { x: { time: false }, y },
      series: seriesOf(view),
      axes: [
        { ...axis, grid: { show: false }, values: (u, ticks) => ticks.map((v) => (v === null ? "" : shownX[state.x](v))), space: 80, size: 28 },
        { ...axis, grid, values: (u, ticks) => ticks.map((v) => (v === null ? "" : shownValue(chart, v))), size: axisWidth },
      ],
      hooks: {
        drawClear: [(u) => drawBands(view, u)],
        draw: [drawMarks],
        setCursor: [(u) => { if (view.u === u) { showValues(view, u.cursor.idx); showNote(view); } }],
        setScale: [(u, key) => { if (key === "x") follow(u); }],
      },
    };

    if (view.u) view.u.destroy();
    view.u = null;
    fillLegend(view);
    view.u = new uPlot(options, columns, view.plot);
    if (zoom) within(() => view.u.setScale("x", zoom));
    watchTouch(view);
    showValues(view, null);
    const ends = view.chart.curves.map((curve) => {
      const values = curve.values.filter((value) => value !== null);
      return values.length ? `${curve.label} from ${shownValue(chart, values[0])} to ${shownValue(chart, values[values.length - 1])}` : `${curve.label} without values`;
    });
    view.plot.setAttribute("aria-label", `Chart: ${chart.title}. ${ends.join("; ")}. Left and right arrow keys read the values.`);
  }

  // ---------------------------------------------------------------- zoom, for all charts together

  function within(change) {
    isFollowing = true;
    change();
    isFollowing = false;
  }

  function follow(u) {
    if (isFollowing || !plots.some((view) => view.u === u)) return;
    const { min, max } = u.scales.x;
    const xs = u.data[0];
    zoom = min <= xs[0] && max >= xs[xs.length - 1] ? null : { min, max };
    applyZoom(u);
  }

  function applyZoom(origin = null) {
    within(() => {
      for (const { u } of plots) {
        if (u && u !== origin) u.setScale("x", zoom || { min: u.data[0][0], max: u.data[0][u.data[0].length - 1] });
      }
    });
    const button = document.getElementById("reset-zoom");
    button.disabled = !zoom;
    root.dataset.zoomed = String(Boolean(zoom));
  }

  // ---------------------------------------------------------------- fingers and keys

  function point(view, left) {
    view.u.setCursor({ left, top: view.u.over.clientHeight / 2 }, true, true);
  }

  function watchTouch(view) {
    const over = view.u.over;
    over.style.touchAction = "pan-y";
    for (const kind of ["pointerdown", "pointermove"]) {
      over.addEventListener(kind, (event) => {
        if (event.pointerType === "touch") point(view, event.clientX - over.getBoundingClientRect().left);
      });
    }
  }

  function onKey(view, event) {
    const xs = view.u.data[0];
    const now = view.u.cursor.left >= 0 && view.u.cursor.idx !== null ? view.u.cursor.idx : xs.length - 1;
    const stride = event.shiftKey ? Math.max(Math.round(xs.length / 20), 1) : 1;
    const moves = { ArrowLeft: now - stride, ArrowRight: now + stride, Home: 0, End: xs.length - 1 };
    if (event.key === "Escape") {
      zoom = null;
      applyZoom();
    } else if (event.key in moves) {
      event.preventDefault();
      const place = Math.min(Math.max(moves[event.key], 0), xs.length - 1);
      point(view, view.u.valToPos(xs[place], "x"));
    }
  }

  // ---------------------------------------------------------------- the page

  const watcher = new ResizeObserver((entries) => {
    for (const entry of entries) {
      const view = plots.find((each) => each.plot === entry.target);
      if (view && view.u && view.u.width !== sizeOf(view).width) view.u.setSize(sizeOf(view));
    }
  });

  function drawAll() {
    if (!data.charts.some((chart) => state.x in chart.x)) state.x = "step";
    plots.forEach(draw);
    applyZoom();
  }

  // A chart of a long run lacks steps. The reader is told so.
  function showThinning() {
    const most = Math.max(0, ...data.charts.map((chart) => chart.x.step.length));
    const text = document.getElementById("thinned");
    text.hidden = most >= data.num_steps;
    text.textContent =
      `The run has ${grouped.format(data.num_steps)} steps. A chart shows up to ${grouped.format(most)} of them: ` +
      "of each stretch, the steps with the lowest and the highest values. metrics.jsonl has every step.";
  }

  function setUp() {
    showThinning();
    watcher.disconnect();
    for (const view of plots) if (view.u) view.u.destroy();
    plots = data.charts.map(cardOf);
    document.getElementById("charts").replaceChildren(...plots.map((view) => view.card));
    for (const view of plots) {
      view.plot.addEventListener("keydown", (event) => onKey(view, event));
      watcher.observe(view.plot);
    }
    for (const option of document.getElementById("x-axis").options) {
      option.disabled = !data.charts.length || !(option.value in data.charts[0].x);
    }
    const kinds = new Set(data.marks.map((mark) => mark.kind));
    if (data.charts.some((chart) => chart.bands.length)) kinds.add("stall");
    for (const entry of document.querySelectorAll("#key [data-kind]")) entry.hidden = !kinds.has(entry.dataset.kind);
    drawAll();
  }

  // New data of a live run: charts that are there stay, with what the reader has chosen.
  function renew(fresh) {
    const names = (content) => content.charts.map((chart) => `${chart.name}:${chart.curves.map((c) => c.label)}`).join("|");
    const isSame = names(fresh) === names(data);
    data = unpacked(fresh);
    showThinning();
    if (!isSame) {
      setUp();
      return;
    }
    plots.forEach((view, number) => {
      view.chart = data.charts[number];
    });
    // A chart under the cursor keeps still; the next news draw it.
    plots.filter((view) => !view.plot.matches(":hover")).forEach(draw);
    applyZoom();
  }

  function watchTools() {
    const smooth = document.getElementById("smoothing");
    const shown = document.getElementById("smoothing-shown");
    document.getElementById("x-axis").addEventListener("change", (event) => {
      state.x = event.target.value;
      zoom = null;
      drawAll();
    });
    smooth.addEventListener("input", () => {
      state.smooth = Number(smooth.value);
      shown.textContent = state.smooth ? state.smooth.toFixed(2) : "off";
      drawAll();
    });
    document.getElementById("log").addEventListener("change", (event) => {
      state.log = event.target.checked;
      drawAll();
    });
    document.getElementById("reset-zoom").addEventListener("click", () => {
      zoom = null;
      applyZoom();
    });
  }

  function watchTheme() {
    const button = document.getElementById("theme");
    const isDark = () => getComputedStyle(root).colorScheme === "dark" || (root.dataset.theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
    const show = () => {
      button.textContent = isDark() ? "Light theme" : "Dark theme";
    };
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      try {
        localStorage.setItem("miles-theme", root.dataset.theme);
      } catch (error) {
        // The choice then lasts as long as the page.
      }
      show();
      drawAll();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      show();
      drawAll();
    });
    show();
  }

  function watchFilter() {
    document.addEventListener("input", (event) => {
      if (event.target.id !== "settings-filter") return;
      const wanted = event.target.value.trim().toLowerCase();
      let found = 0;
      for (const row of document.querySelectorAll("#settings tbody tr")) {
        row.hidden = !row.textContent.toLowerCase().includes(wanted);
        found += row.hidden ? 0 : 1;
      }
      const rest = document.getElementById("settings-defaults");
      if (rest && wanted) rest.open = true;
      document.getElementById("settings-found").textContent = wanted ? `${found} found` : "";
    });
  }

  // ---------------------------------------------------------------- a run that goes on

  function replaceParts(parts) {
    for (const [name, html] of Object.entries(parts)) {
      const place = document.getElementById(`part-${name}`);
      if (!place) continue;
      const open = [...place.querySelectorAll("details")].map((each) => each.open);
      place.innerHTML = html;
      place.querySelectorAll("details").forEach((each, number) => {
        each.open = number < open.length ? open[number] : each.open;
      });
    }
    const sections = [...document.querySelectorAll("main section[id] > h2")];
    document.getElementById("contents").replaceChildren(
      ...sections.map((heading) => {
        const link = element("a", "", heading.dataset.short || heading.textContent);
        link.href = `#${heading.parentElement.id}`;
        return link;
      }),
    );
  }

  async function watchRun() {
    const sign = document.getElementById("live");
    let version = Number(root.dataset.version);
    for (;;) {
      await new Promise((resolve) => setTimeout(resolve, document.hidden ? 5000 : 1000));
      try {
        const answer = await fetch(`news.json?version=${version}`, { cache: "no-store" });
        if (!answer.ok) throw new Error(String(answer.status));
        const news = await answer.json();
        sign.textContent = "live";
        sign.classList.remove("lost");
        if (news.version === version) continue;
        version = news.version;
        root.dataset.version = String(version);
        replaceParts(news.parts);
        renew(news.data);
      } catch (error) {
        sign.textContent = "miles report --live has ended";
        sign.classList.add("lost");
      }
    }
  }

  watchTools();
  watchTheme();
  watchFilter();
  setUp();
  root.dataset.ready = "true";
  if ("live" in root.dataset) watchRun();
})();
