// The built-in page: asks /live.json twice a second and draws what it says. Nothing is ever sent.
"use strict";

const STATES = ["compute", "wait_plan", "wait_activation", "wait_kv", "prepare", "send"];
const COLOURS = ["#0072b2", "#bbbbbb", "#e69f00", "#d55e00", "#cc79a7", "#56b4e9"];
const EVERY_MS = 500;
const SHARES_S = 10;
const KEEP_S = 12;
const LABEL_PX = 26; // narrower spans of compute do not name their step

const byId = (id) => document.getElementById(id);
const seen = []; // Status, oldest first
const spans = new Map(); // stage -> [{begin, end, code, step}], seconds of the machine's clock
let last = 0;
let windowS = 3;
let paused = false;
let endS = 0;

function column(base64) {
  const text = atob(base64);
  const view = new DataView(new ArrayBuffer(text.length));
  for (let i = 0; i < text.length; i++) view.setUint8(i, text.charCodeAt(i));
  return view;
}

function integers(base64) {
  const view = column(base64);
  const found = [];
  for (let i = 0; i < view.byteLength; i += 8) {
    found.push(view.getUint32(i, true) + view.getInt32(i + 4, true) * 2 ** 32);
  }
  return found;
}

function takeSpans(report) {
  const codes = column(report.states);
  const lengths = integers(report.lengths_ns);
  const steps = integers(report.steps);
  if (!spans.has(report.stage)) spans.set(report.stage, []);
  const mine = spans.get(report.stage);
  let begin = report.begin_ns;
  for (let i = 0; i < lengths.length; i++) {
    const end = begin + lengths[i];
    mine.push({ begin: begin / 1e9, end: end / 1e9, code: codes.getUint8(i), step: steps[i] });
    begin = end;
  }
  const from = begin / 1e9 - KEEP_S;
  let drop = 0;
  while (drop < mine.length && mine[drop].end < from) drop++;
  mine.splice(0, drop);
}

function takeStatus(status) {
  const before = seen[seen.length - 1];
  if (before && before.instance_id !== status.instance_id) {
    seen.length = 0;
    spans.clear();
  }
  seen.push(status);
  while (seen.length > 2 && seen[1].uptime_s <= status.uptime_s - SHARES_S) seen.shift();
}

// Drawing

function draw(numStages) {
  const canvas = byId("gantt");
  const ratio = window.devicePixelRatio || 1;
  const row = numStages > 4 ? 24 : 34;
  const left = 62;
  const width = Math.max(200, canvas.clientWidth);
  const height = numStages * row + 24;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const g = canvas.getContext("2d");
  g.scale(ratio, ratio);
  const style = getComputedStyle(document.body);
  const ink = style.color;
  g.font = "12px system-ui, sans-serif";
  g.textBaseline = "middle";
  const plot = Math.floor(width - left - 8);
  const beginS = endS - windowS;
  for (let stage = 0; stage < numStages; stage++) {
    const y = stage * row;
    g.fillStyle = ink;
    g.fillText(`stage ${stage}`, 0, y + row / 2);
    drawRow(g, spans.get(stage) || [], beginS, left, y + 2, plot, row - 4);
  }
  drawAxis(g, ink, left, numStages * row, plot);
}

// Every pixel column shows the shares of its time, so that spans narrower than a pixel are right too.
function drawRow(g, mine, beginS, left, top, plot, height) {
  const shares = new Float64Array(plot * STATES.length);
  const perPixel = windowS / plot;
  for (const span of mine) {
    const from = Math.max(0, (span.begin - beginS) / perPixel);
    const to = Math.min(plot, (span.end - beginS) / perPixel);
    for (let x = Math.floor(from); x < to; x++) {
      shares[x * STATES.length + span.code] += Math.min(to, x + 1) - Math.max(from, x);
    }
  }
  for (let x = 0; x < plot; x++) {
    let y = top + height;
    for (let code = 0; code < STATES.length; code++) {
      const part = shares[x * STATES.length + code] * height;
      if (part > 0) {
        g.fillStyle = COLOURS[code];
        g.fillRect(left + x, y - part, 1, part);
        y -= part;
      }
    }
  }
  g.fillStyle = "#ffffff";
  g.textAlign = "center";
  for (const span of mine) {
    const from = Math.max(0, (span.begin - beginS) / perPixel);
    const to = Math.min(plot, (span.end - beginS) / perPixel);
    const label = String(span.step);
    if (span.code === 0 && to - from > Math.max(LABEL_PX, 8 * label.length)) {
      g.fillText(label, left + (from + to) / 2, top + height / 2);
    }
  }
  g.textAlign = "start";
}

function drawAxis(g, ink, left, top, plot) {
  g.fillStyle = ink;
  const ticks = 5;
  for (let i = 0; i <= ticks; i++) {
    const x = left + (plot * i) / ticks;
    g.fillRect(Math.min(x, left + plot - 1), top, 1, 4);
    const back = (windowS * (ticks - i)) / ticks;
    g.textAlign = i === 0 ? "start" : i === ticks ? "end" : "center";
    g.fillText(i === ticks ? "now" : `−${Number(back.toFixed(1))} s`, x, top + 14);
  }
  g.textAlign = "start";
}

// Tables

function cells(parent, rows) {
  parent.replaceChildren(
    ...rows.map((row) => {
      const tr = document.createElement("tr");
      tr.replaceChildren(
        ...row.map((cell) => {
          const td = document.createElement("td");
          if (cell instanceof Node) td.append(cell);
          else td.textContent = cell;
          if (typeof cell === "string" && /^[−\d–]/.test(cell)) td.className = "n";
          return td;
        }),
      );
      return tr;
    }),
  );
}

function bar(value, most, name) {
  const made = document.createElement("progress");
  made.max = Math.max(most, 1);
  made.value = value;
  made.setAttribute("aria-label", name);
  return made;
}

// Of a process at the begin of the time looked at; none if it was started since.
function before(kind, process) {
  for (const status of seen.slice(0, -1)) {
    const found = status[kind].find((one) => one.pid === process.pid);
    if (found) return found.state_seconds;
  }
  return {};
}

function shares(kind, process, states) {
  const then = before(kind, process);
  const grown = (state) => (process.state_seconds[state] || 0) - (then[state] || 0);
  const total = Object.keys(process.state_seconds).reduce((sum, state) => sum + grown(state), 0);
  return states.map((state) => (total > 0 ? `${((100 * grown(state)) / total).toFixed(1)} %` : "–"));
}

function duration(seconds) {
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, "0")} s`;
  return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, "0")} min`;
}

const number = (value) => Math.round(value).toLocaleString("en");
const percent = (used, total) => (total ? ` (${Math.round((100 * used) / total)} %)` : "");

function rate(status, name) {
  const span = status.uptime_s - seen[0].uptime_s;
  return span > 0 ? `${number((status[name] - seen[0][name]) / span)} per second` : "–";
}

function show(status) {
  const waits = status.missing.length ? `, waiting for ${status.missing.join(", ")}` : "";
  byId("system").textContent =
    `${status.model_name}: ${status.phase}${waits}, up ${duration(status.uptime_s)}`;
  const span = status.uptime_s - seen[0].uptime_s;
  byId("span").textContent = span >= 1 ? `${Math.round(span)} s` : "moment";
  cells(
    byId("stages").tBodies[0],
    status.stages.map((stage) => [
      `${stage.stage}`,
      stage.layers[1] > stage.layers[0] ? `${stage.layers[0]}–${stage.layers[1] - 1}` : "–",
      stage.device,
      number(stage.steps),
      ...shares("stages", stage, STATES),
    ]),
  );
  showWork(status);
  cells(byId("kv").tBodies[0], [
    tier("devices", status.device_blocks_used, status.device_blocks_total),
    tier("host", status.host_blocks_used, status.host_blocks_total),
  ]);
  cells(
    byId("slots").tBodies[0],
    status.slots.map((slot, index) => [
      `${index}`,
      number(slot.requests),
      number(slot.context_tokens),
      number(slot.prefill_tokens),
    ]),
  );
  byId("no-jobs").hidden = status.jobs.length > 0;
  byId("jobs").hidden = status.jobs.length === 0;
  cells(
    byId("jobs").tBodies[0],
    status.jobs.map((job) => [
      job.name,
      bar(job.num_results, job.num_requests, `results of ${job.name}`),
      `${number(job.num_results)} of ${number(job.num_requests)}${percent(job.num_results, job.num_requests)}`,
      number(job.num_failed),
      job.eta_s === null || job.eta_s === undefined ? "–" : duration(job.eta_s),
      job.state,
    ]),
  );
}

function tier(name, used, total) {
  return [
    name,
    bar(used, total, `KV blocks in use, ${name}`),
    `${number(used)} of ${number(total)}${percent(used, total)}`,
  ];
}

function showWork(status) {
  const facts = [
    ["running", number(status.requests_running)],
    ["waiting", number(status.requests_waiting)],
    ["finished", number(status.requests_finished)],
    ["output tokens", rate(status, "generation_tokens")],
    ["prompt tokens", rate(status, "prompt_tokens")],
    ["late prefetches", number(status.late_prefetches || 0)],
    ["recoveries", number(Math.max(0, status.epoch - 1))],
    ...status.samplers.map((one) => [
      `sampler ${one.sampler} busy`,
      shares("samplers", one, ["sample"])[0],
    ]),
  ];
  byId("work").replaceChildren(
    ...facts.flatMap(([name, value]) => {
      const dt = document.createElement("dt");
      const dd = document.createElement("dd");
      dt.textContent = name;
      dd.textContent = value;
      return [dt, dd];
    }),
  );
}

// Life

async function look() {
  const trouble = byId("trouble");
  try {
    const answer = await fetch(`live.json?after=${last}`, { cache: "no-store" });
    if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
    const live = await answer.json();
    if (live.last !== null) last = live.last;
    if (live.status !== null) {
      const restarted = seen.length > 0 && seen[0].instance_id !== live.status.instance_id;
      if (restarted) last = 0;
      takeStatus(live.status);
    }
    live.spans.forEach(takeSpans);
    trouble.hidden = true;
    if (!paused && live.status !== null) {
      const ends = [...spans.values()].filter((mine) => mine.length).map((mine) => mine[mine.length - 1].end);
      endS = ends.length ? Math.min(...ends) : live.now_ns / 1e9;
      draw(live.status.stages.length);
      show(live.status);
    }
  } catch (error) {
    trouble.textContent = `No answer from the coordinator: ${error.message}`;
    trouble.hidden = false;
  }
  setTimeout(look, EVERY_MS);
}

function legend() {
  const head = document.createElement("tr");
  for (const name of ["stage", "layers", "device", "steps"]) {
    const th = document.createElement("th");
    th.textContent = name;
    if (name !== "device") th.className = "n";
    head.append(th);
  }
  for (const state of STATES) {
    const swatch = document.createElement("span");
    swatch.className = `swatch ${state}`;
    const th = document.createElement("th");
    th.className = "n";
    th.append(swatch, state);
    head.append(th);
    const item = document.createElement("span");
    item.append(swatch.cloneNode(), state);
    byId("legend").append(item);
  }
  byId("stages").tHead.append(head);
}

function start() {
  legend();
  for (const button of document.querySelectorAll("button[data-window]")) {
    button.addEventListener("click", () => {
      windowS = Number(button.dataset.window);
      for (const other of document.querySelectorAll("button[data-window]")) {
        other.setAttribute("aria-pressed", String(other === button));
      }
      if (seen.length) draw(seen[seen.length - 1].stages.length);
    });
  }
  byId("pause").addEventListener("click", () => {
    paused = !paused;
    byId("pause").setAttribute("aria-pressed", String(paused));
  });
  look();
}

start();
