// The page of xattn.explore. Python computes every number; this module unpacks them, draws them, plays the sound and
// handles the keys. A page has one or two views of the same utterance, which share the time axis and the sound.

const INDEX = JSON.parse(document.getElementById("index").textContent);
const STILL = matchMedia("(prefers-reduced-motion: reduce)");
const TYPES = {
  uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array, float64: Float64Array,
};
const pixelsOf = (colours) =>
  Uint32Array.from(colours, ([red, green, blue]) => (255 << 24) | (blue << 16) | (green << 8) | red);
const MAP = pixelsOf(INDEX.colours.map);
const ALL = "all"; // label of the average of layers or heads
const HEIGHTS = { one: { row: 17, bands: 110 }, two: { row: 13, bands: 60 } }; // pixels of a token's row, of bands
const POINT = "Point at a panel to read its values.";
const KEYS = {
  "← →": "previous or next token", "↑ ↓": "previous or next attribution; in the table, another head",
  "Enter": "play the stretch of the token or word", "Space": "play or pause the recording",
  "+ −": "zoom in or out", "Shift + ← →": "move in time", "Home": "show the whole recording",
  "?": "show these keys",
};

// DOM

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

function fill(select, names, chosen) {
  select.replaceChildren(...names.map((name, i) => make("option", { value: i, selected: i === chosen }, name)));
  select.disabled = names.length < 2;
}

// A choice gives the focus back, so that the arrow keys move between tokens again.
const picker = (label, choose) => {
  const change = () => { select.blur(); choose(Number(select.value)); };
  const select = make("select", { "aria-label": label, change });
  return { select, node: make("label", {}, label, select) };
};

// Numbers with a true minus sign; what rounds to 0 has none
const signed = (text) => (Number(text) ? text.replace("-", "−") : text.replace("-", ""));
const fixed = (value, digits = 2) => signed(value.toFixed(digits));
const number = (value) => signed(String(Number(value.toPrecision(3))));
const seconds = (value) => `${fixed(value)} s`;

// Data

function bytesOf(name) {
  return Uint8Array.from(atob(document.getElementById(name).textContent), (letter) => letter.charCodeAt(0));
}

// Unpack a chunk: the length of its header, the header, and the arrays, for which objects stand in the header.
async function unpack(name) {
  const stream = new Blob([bytesOf(name)]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  const buffer = await new Response(stream).arrayBuffer();
  const begin = 4 + new DataView(buffer).getUint32(0, true);
  const array = ({ at, type, shape }) => {
    const size = shape.reduce((product, length) => product * length, 1) * TYPES[type].BYTES_PER_ELEMENT;
    return Object.assign(new TYPES[type](buffer.slice(begin + at, begin + at + size)), { shape });
  };
  const header = new TextDecoder().decode(new Uint8Array(buffer, 4, begin - 4));
  return JSON.parse(header, (_, value) => (TYPES[value?.type] ? array(value) : value));
}

const unpacked = new Map(); // promises by the names of chunks
function recordOf(name) {
  if (!unpacked.has(name)) {
    unpacked.set(name, unpack(name).then(async (record) => {
      record.spectrogram = record.features && await unpack(record.features);
      for (const { cells } of record.attributions) if (cells) cells.which = (await unpack(cells.which)).numbers;
      return record;
    }));
  }
  return unpacked.get(name);
}

// Sound: one element for the page. Times of maps and of the sound differ by the start of a part of a recording.

const sound = make("audio", { id: "sound", preload: "auto" });
let offset = 0, stop = Infinity, drawnAt = 0;

function play(from, to) {
  if (!sound.src) return;
  sound.dataset.from = from;
  sound.dataset.to = to;
  stop = to;
  sound.currentTime = Math.max(0, from - offset);
  begin();
}

function toggle() {
  if (!sound.src) return;
  if (!sound.paused) return sound.pause();
  stop = Infinity;
  begin();
}

function moveTo(time) {
  if (!sound.src) return;
  sound.currentTime = Math.max(0, time - offset);
  moveCursor(time);
}

function begin() { sound.play().then(follow, () => say("The browser did not play the sound.")); }

// Move the cursor while the sound plays, in steps if the reader prefers little motion; stop at the end of a stretch.
function follow() {
  const now = sound.currentTime + offset;
  if (now >= stop) sound.pause();
  if (!STILL.matches || Math.abs(now - drawnAt) > 0.25 || sound.paused) moveCursor(now);
  if (!sound.paused) requestAnimationFrame(follow);
}

function moveCursor(time) {
  drawnAt = time;
  clock.textContent = sound.src ? seconds(time) : "";
  for (const view of views) for (const panel of view.panels) panel.mark(panel.cursor, time, time);
}

// A panel: a canvas on the time axis with the marks above it

class Panel {
  // hover and click are called with the time, the row and the column under the pointer, and hover with null when it
  // leaves.
  constructor(name, height, { hover, click }) {
    this.name = name;
    this.canvas = make("canvas", { "data-panel": name, role: "img" });
    [this.stretch, this.drag, this.cursor] = ["stretch", "drag", "cursor"].map((kind) =>
      make("div", { class: kind, hidden: true }));
    this.node = make("div", { class: "panel" }, this.canvas, this.stretch, this.drag, this.cursor);
    this.height(height);
    let begun = null; // where a drag began
    const drawn = (event) => Math.abs(event.offsetX - begun) > 4;
    this.canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      begun = event.offsetX;
      this.canvas.setPointerCapture(event.pointerId); // so that a drag can leave the panel
    });
    this.canvas.addEventListener("pointermove", (event) => {
      hover(this.at(event));
      if (begun !== null && drawn(event)) this.mark(this.drag, this.time(begun), this.time(event.offsetX));
    });
    this.canvas.addEventListener("pointerup", (event) => {
      if (begun === null) return;
      if (drawn(event)) zoomTo(this.time(Math.min(begun, event.offsetX)), this.time(Math.max(begun, event.offsetX)));
      else click(this.at(event));
      begun = null;
      this.drag.hidden = true;
    });
    this.canvas.addEventListener("pointercancel", () => { begun = null; this.drag.hidden = true; });
    this.canvas.addEventListener("pointerleave", () => hover(null));
    this.canvas.addEventListener("wheel", (event) => {
      const sideways = event.shiftKey ? event.deltaY || event.deltaX : event.deltaX;
      if (event.ctrlKey || event.metaKey) zoom(event.deltaY < 0 ? 1.25 : 0.8, this.time(event.offsetX));
      else if (Math.abs(sideways) > Math.abs(event.shiftKey ? 0 : event.deltaY)) shift(sideways / 1000);
      else return;
      event.preventDefault();
    }, { passive: false });
    new ResizeObserver(() => this.paint()).observe(this.canvas);
  }

  height(pixels) { this.node.style.height = `${pixels}px`; }

  time(x) {
    const share = Math.min(Math.max(x / this.canvas.clientWidth, 0), 1);
    return range.from + share * (range.to - range.from);
  }

  at(event) {
    if (!this.source) return null;
    const { rows, ends, upward } = this.source, time = this.time(event.offsetX);
    const row = Math.min(rows - 1, Math.max(0, Math.floor((event.offsetY / this.canvas.clientHeight) * rows)));
    return { time, row: upward ? rows - 1 - row : row, column: Math.min(ends.length - 1, firstAfter(ends, time)) };
  }

  mark(node, from, to) {
    const scale = 100 / (range.to - range.from);
    node.hidden = Math.max(from, to) < range.from || Math.min(from, to) > range.to;
    node.style.left = `${(Math.min(from, to) - range.from) * scale}%`;
    node.style.width = from === to ? "" : `${Math.abs(to - from) * scale}%`;
  }

  // source: rows, starts and ends of columns in seconds, upward (the first row is the lowest), colours, and
  // level(row, column), from 0 to steps(row), or -1 for a deleted cell, through which the hatching shows. A pixel
  // shows the highest level of its columns.
  paint() {
    const { canvas, source } = this, ratio = window.devicePixelRatio;
    const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
    if (!source || !width || !height) return;
    [canvas.width, canvas.height] = [width, height];
    const edge = Array.from({ length: width + 1 }, (_, x) => range.from + (x / width) * (range.to - range.from));
    const first = edge.map((time) => firstAfter(source.ends, time));
    const image = new ImageData(width, height), pixels = new Uint32Array(image.data.buffer);
    const line = new Uint32Array(width);
    for (let i = 0, y = 0; i < source.rows; i++) {
      const row = source.upward ? source.rows - 1 - i : i, steps = source.steps(row);
      for (let x = 0; x < width; x++) {
        let value = -1;
        const last = Math.min(Math.max(first[x], first[x + 1] - 1), source.ends.length - 1);
        for (let column = first[x]; column <= last; column++) {
          if (source.starts[column] < edge[x + 1]) value = Math.max(value, source.level(row, column));
        }
        line[x] = value < 0 ? 0 : source.colours[Math.round((value * (source.colours.length - 1)) / steps)];
      }
      for (const end = Math.round(((i + 1) * height) / source.rows); y < end; y++) pixels.set(line, y * width);
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
}

// The index of the first of the ascending values above a limit
function firstAfter(values, limit) {
  let low = 0, high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] > limit) high = middle; else low = middle + 1;
  }
  return low;
}

// A view: one condition with its pickers, panels, heads and deletions

class View {
  constructor(condition, attribution) {
    Object.assign(this, { condition, wanted: attribution, token: 0, word: null, percent: 0, curve: 0 });
    const hover = (describe) => (place) => { this.readout.textContent = place ? describe(place) : POINT; };
    const seek = (place) => place && moveTo(place.time);
    this.conditions = picker("Model and direction", (i) => { this.condition = i; this.load(); });
    this.attributions = picker("Attribution", (i) => this.choose(i));
    this.curves = picker("by", (i) => { this.curve = i; this.refresh(); });
    this.words = make("div", { class: "text words", role: "group", "aria-label": "Words of the hypothesis" });
    this.reference = make("div", { class: "text reference" });
    this.tokens = make("div", { class: "side tokens", role: "group", "aria-label": "Tokens" });
    this.spectrogram = new Panel("spectrogram", HEIGHTS.one.bands,
      { hover: hover((place) => this.featureAt(place)), click: seek });
    this.rows = new Panel("attribution", 100, {
      hover: hover((place) => this.valueAt(place)),
      click: (place) => place && this.select(place.row, true),
    });
    this.rows.node.classList.add("rows");
    this.cells = new Panel("cells", HEIGHTS.one.bands, { hover: hover((place) => this.cellAt(place)), click: seek });
    this.panels = [this.spectrogram, this.rows, this.cells];
    [this.spectrogramTitle, this.title, this.cellsTitle] = [make("h2"), make("h2"), make("h2")];
    this.bands = make("div", { class: "side bands" });
    this.cellBands = make("div", { class: "side bands" });
    this.cellBox = make("div", {}, this.cellsTitle, make("div", { class: "row" }, this.cellBands, this.cells.node));
    this.axis = make("div", { class: "axis", "aria-hidden": "true" });
    this.readout = make("p", { class: "readout" }, POINT);
    this.caption = make("p", { class: "caption" });
    this.notes = make("p", { class: "note" });
    this.heads = make("div", { class: "heads" });
    this.slider = make("input", { type: "range", min: 0, step: 1, value: 0, "aria-label": "Share of the cells deleted",
      input: () => { this.percent = Number(this.slider.value); this.refresh(); } });
    this.share = make("output");
    this.written = make("p", { class: "written", "aria-live": "polite" });
    this.deletion = make("fieldset", { class: "deletion" }, make("legend", {}, "Delete the most salient cells"),
      make("div", { class: "bar" }, this.slider, this.share, this.curves.node), this.written);
    this.node = make("section", { class: "view", focusin: () => activate(this), pointerdown: () => activate(this) },
      make("div", { class: "bar" }, this.conditions.node, this.attributions.node), this.words, this.reference,
      make("div", { class: "body" },
        make("div", { class: "maps" },
          make("div", { class: "features" }, this.spectrogramTitle,
            make("div", { class: "row" }, this.bands, this.spectrogram.node)),
          this.title, make("div", { class: "row" }, this.tokens, this.rows.node), this.axis, this.readout,
          make("div", { class: "details" }, this.cellBox, this.caption, this.notes, this.deletion)),
        this.heads));
  }

  async load() {
    const { records } = utterance();
    this.condition = Math.min(this.condition, records.length - 1);
    const wanted = records[this.condition].chunk, record = await recordOf(wanted);
    if (utterance().records[this.condition]?.chunk !== wanted) return; // another one was chosen meanwhile
    Object.assign(this, { record, percent: 0, token: Math.min(this.token, record.tokens.length - 1), word: null });
    fill(this.conditions.select, records.map((each) => each.label), this.condition);
    const names = record.attributions.map((each) => each.name);
    fill(this.attributions.select, record.attributions.map((each) => each.title), 0);
    this.curve = Math.min(this.curve, Math.max(0, record.deletions.length - 1));
    fill(this.curves.select, record.deletions.map((each) => each.kind), this.curve);
    this.words.replaceChildren(make("span", { class: "name" }, "Hypothesis"), ...record.words.map((word, i) =>
      make("button", { class: `word${word.differs ? " differs" : ""}`, click: () => this.selectWord(i),
        "aria-label": word.text + (word.differs ? ", differs from the reference" : "") }, word.text)));
    this.reference.replaceChildren(make("span", { class: "name" }, "Reference"),
      ...record.reference.flatMap(([sign, word]) => [sign ? make("span", { class: "differs" }, word) : word, " "]));
    this.tokens.replaceChildren(...record.tokens.map((token, i) =>
      make("button", { class: "token", title: token, click: () => this.select(i, true) }, token)));
    this.notes.textContent = record.notes.join(" ");
    this.deletion.hidden = !record.deletions.length;
    this.showSpectrogram();
    this.choose(Math.max(0, names.indexOf(this.wanted)));
    arrange();
    setRange(range.from, range.to);
  }

  get attribution() { return this.record.attributions[this.chosen]; }

  choose(i) {
    this.chosen = i;
    this.attributions.select.value = i;
    this.wanted = this.attribution.name;
    const [layers, heads] = this.attribution.values.shape;
    this.head = [layers - 1, heads - 1]; // the averages come last
    this.showHeads();
    this.refresh();
    say(`${this.attribution.title}. ${this.attribution.facts.join(" ")}`);
  }

  select(i, heard = false, word = null) {
    const { tokens, words } = this.record;
    Object.assign(this, { token: i, word });
    const [from, to] = this.stretch();
    if (to < range.from || from > range.to) shift((from + to - range.from - range.to) / 2 / (range.to - range.from));
    this.refresh();
    const differs = words.find((each) => each.tokens.includes(i)).differs;
    const what = word === null ? `Token ${i + 1} of ${tokens.length}: ${tokens[i]}`
      : `Word ${word + 1} of ${words.length}: ${words[word].text}`;
    const sign = word === null ? ", in a word that differs from the reference" : ", which differs from the reference";
    say(`${what}${differs ? sign : ""}; ${seconds(from)} to ${seconds(to)}`);
    if (heard) this.play();
    const same = (view) => view !== this && String(view.record?.tokens) === String(tokens);
    for (const other of views.filter(same)) {
      Object.assign(other, { token: i, word });
      other.refresh();
    }
  }

  selectWord(i) { this.select(this.record.words[i].content[0], true, i); }

  play() { play(...this.stretch()); }

  get block() { return this.head[0] * this.attribution.values.shape[1] + this.head[1]; }

  rowOf(token) { return this.block * this.record.tokens.length + token; }

  // The start and the end of the stretch of the selected word or else token, in seconds
  stretch() {
    const { starts, ends, stretches } = this.attribution;
    const row = this.word === null ? this.token : this.record.words[this.word].stretch;
    const place = 2 * (this.block * stretches.shape[2] + row);
    const [first, more] = stretches.subarray(place, place + 2);
    return [starts[first], ends[first + more]];
  }

  // The attribution whose heads the table shows: beside the standardised average, that is the attention itself.
  get headed() {
    const weights = this.attribution.name === "standardised_attention" &&
      this.record.attributions.find(({ name }) => name === "cross_attention");
    return weights || this.attribution;
  }

  get headInTable() {
    const { layers, heads } = this.headed;
    return this.headed === this.attribution ? this.head : [layers.length - 1, heads.length - 1];
  }

  headName([layer, head] = this.head, { layers, heads } = this.attribution) {
    return [[layers[layer], "layer"], [heads[head], "head"]].filter(([label]) => label)
      .map(([label, axis]) => (label === ALL ? `average of ${axis}s` : `${axis} ${label}`)).join(", ");
  }

  showSpectrogram() {
    const { spectrogram } = this.record;
    this.spectrogram.node.closest(".features").hidden = !spectrogram;
    if (!spectrogram) return;
    const [frames, bands] = spectrogram.values.shape;
    this.spectrogram.source = { rows: bands, ...this.columnsOf(frames), upward: true,
      colours: pixelsOf(spectrogram.colours), steps: () => spectrogram.colours.length - 1,
      level: (band, frame) => (this.deletes(frame * bands + band) ? -1 : spectrogram.values[frame * bands + band]) };
    for (const side of [this.bands, this.cellBands]) {
      side.replaceChildren(...[bands - 1, bands >> 1, 0].map((band) => make("span", {}, this.bandName(band))));
    }
  }

  bandName(band) {
    const centres = this.record.spectrogram?.bands;
    return centres ? `${Math.round(centres[band]).toLocaleString("en")} Hz` : `band ${band + 1}`;
  }

  // Whether the slider deletes a cell: `rank` is the index of the percentage from which on it is deleted.
  deletes(cell) { return this.percent > 0 && this.record.deletions[this.curve].rank[cell] <= this.percent; }

  // A table of layers and heads, with their averages last
  showHeads() {
    const { layers, heads, rho, silent } = this.headed;
    this.heads.hidden = layers.length * heads.length < 2;
    if (this.heads.hidden) return;
    const named = (label, letter) => (label === ALL || !label ? label : letter + label);
    const low = rho && Math.min(...rho), span = rho && Math.max(...rho) - low || 1;
    const cell = (layer, head) => {
      const value = rho?.[layer * heads.length + head];
      const [red, green, blue] = rho ? INDEX.colours.rho[Math.round((255 * (value - low)) / span)] : [238, 238, 238];
      const ink = 0.3 * red + 0.59 * green + 0.11 * blue > 130 ? "#000" : "#fff";
      const name = this.headName([layer, head], this.headed) + (rho ? `, rho ${fixed(value)}` : "");
      return make("td", {}, make("button", {
        class: layers[layer] === ALL || heads[head] === ALL ? "average" : "", title: name, "aria-label": name,
        style: `background: rgb(${red} ${green} ${blue}); color: ${ink}`, "data-head": `${layer} ${head}`,
        click: () => this.chooseHead(layer, head),
      }, rho ? fixed(value).replace(/^(−?)0\./, "$1.") : "·"));
    };
    this.heads.replaceChildren(make("p", {}, rho ? "rho with SM^X by layer and head" : "Layers and heads"),
      make("table", { "aria-label": "Layers and heads" },
        make("tr", {}, make("td"), ...heads.map((label) => make("th", { scope: "col" }, named(label, "H")))),
        ...layers.map((label, layer) => make("tr", {}, make("th", { scope: "row" }, named(label, "L")),
          ...heads.map((_, head) => cell(layer, head))))),
      make("div", {}, silent));
  }

  chooseHead(layer, head) {
    if (this.headed !== this.attribution) this.choose(this.record.attributions.indexOf(this.headed));
    this.head = [layer, head];
    this.refresh();
    say(`${this.headName()}${this.headFacts()}`);
  }

  headFacts() {
    const { rho, padding } = this.attribution;
    const share = padding && Math.round(100 * padding[this.block]);
    return (rho ? ` rho with SM^X of this utterance, as measured: ${fixed(rho[this.block])}.` : "") +
      (padding ? ` ${share} % of this attention falls on the padding beyond the recording.` : "");
  }

  // Draw everything that depends on the token, the attribution, the head and the deletion.
  refresh() {
    const { record, attribution, token } = this, { values, starts, ends, cells } = attribution, columns = ends.length;
    const [from, to] = this.stretch(), name = [attribution.title, this.headName()].filter(Boolean).join(", ");
    const first = this.block * record.tokens.length * columns;
    this.rows.source = { rows: record.tokens.length, starts, ends, colours: MAP,
      steps: (row) => attribution.steps[this.rowOf(row)],
      level: (row, column) => values[first + row * columns + column] };
    this.title.textContent = `${name}: tokens against time`;
    this.caption.textContent = [views.length > 1 && `${name}.`, ...attribution.facts, this.headFacts().trim(),
      "Each row is coloured from its lowest (dark) to its highest value (light)."].filter(Boolean).join(" ");
    const row = values.subarray(first + token * columns, first + (token + 1) * columns);
    const peak = row.indexOf(Math.max(...row)), highest = seconds((starts[peak] + ends[peak]) / 2);
    this.rows.canvas.setAttribute("aria-label", `${name}, ${record.tokens.length} tokens. ` +
      `Token ${record.tokens[token]} is highest at ${highest}; the stretch of the ` +
      `${this.word === null ? "token" : "word"} is ${seconds(from)} to ${seconds(to)}.`);
    this.cellBox.hidden = !cells;
    this.cells.source = cells && this.cellSource(cells);
    this.cellsTitle.textContent = `${attribution.title}: cells of the token ${record.tokens[token]}`;
    this.cells.canvas.setAttribute("aria-label", `${this.cellsTitle.textContent}, bands against time`);
    for (const [i, button] of [...this.tokens.children].entries()) button.setAttribute("aria-pressed", i === token);
    for (const [i, word] of record.words.entries()) {
      const chosen = word.tokens.includes(token), button = this.words.children[i + 1];
      button.classList.toggle("chosen", chosen);
      button.setAttribute("aria-pressed", chosen);
    }
    for (const button of this.heads.querySelectorAll("button")) {
      const chosen = button.dataset.head === this.headInTable.join(" ");
      button.setAttribute("aria-pressed", chosen);
      button.tabIndex = chosen ? 0 : -1;
    }
    this.showDeletion();
    this.draw();
  }

  cellSource({ values, which, steps }) {
    const [frames, bands] = which.shape, distinct = values.shape[1];
    return { rows: bands, ...this.columnsOf(frames), upward: true, colours: MAP, steps: () => steps[this.token],
      level: (band, frame) => values[this.token * distinct + which[frame * bands + band]] };
  }

  // Start and end of each frame, in seconds
  columnsOf(frames) {
    const [first, end] = this.record.span, hop = (end - first) / frames;
    const starts = Float64Array.from({ length: frames }, (_, i) => first + i * hop);
    return { starts, ends: starts.map((start) => start + hop) };
  }

  showDeletion() {
    const curve = this.record.deletions[this.curve];
    this.deleted = "";
    if (curve) {
      const percent = curve.percent[this.percent];
      this.slider.max = curve.percent.length - 1;
      this.slider.value = this.percent;
      this.share.textContent = `${percent} %`;
      this.slider.setAttribute("aria-valuetext", `${percent} % of the cells by ${curve.kind}`);
      this.written.replaceChildren("The model writes: ", ...marked(curve.texts[this.percent]));
      if (percent) this.deleted = `; the top ${percent} % of the cells by ${curve.kind} are deleted and hatched`;
    }
    this.spectrogramTitle.textContent = `Spectrogram, as the model gets it${this.deleted}`;
  }

  draw() {
    if (!this.record) return;
    this.spectrogram.canvas.setAttribute("aria-label",
      `Spectrogram from ${seconds(range.from)} to ${seconds(range.to)}${this.deleted}`);
    const [from, to] = this.stretch();
    for (const panel of this.panels) {
      panel.paint();
      panel.mark(panel.stretch, from, to);
    }
    const height = 100 / this.record.tokens.length;
    const marked = this.word === null ? [this.token] : this.record.words[this.word].content;
    Object.assign(this.rows.stretch.style,
      { top: `${height * marked[0]}%`, height: `${height * (marked.at(-1) - marked[0] + 1)}%` });
    const span = range.to - range.from, least = (span * 64) / Math.max(1, this.rows.canvas.clientWidth);
    const power = 10 ** Math.floor(Math.log10(least));
    const step = power * [1, 2, 5, 10].find((each) => each * power >= least);
    const digits = Math.max(0, -Math.floor(Math.log10(step))), ticks = [];
    for (let i = Math.ceil(range.from / step); i * step <= range.to; i++) {
      const place = (100 * (i * step - range.from)) / span;
      if (place > 2 && place < 96) ticks.push(make("span", { style: `left: ${place}%` }, fixed(i * step, digits)));
    }
    this.axis.replaceChildren(...ticks, make("span", { style: "left: 100%; transform: translateX(-100%)" }, "s"));
    moveCursor(drawnAt);
  }

  // What the pointer is on. Values are dequantised as Python's docstring says.

  featureAt({ time, row, column }) {
    const { values, low, high, colours } = this.record.spectrogram, level = values[column * values.shape[1] + row];
    const value = low + (level / (colours.length - 1)) * (high - low);
    return `${seconds(time)}, ${this.bandName(row)}, log-mel feature ${number(value)}`;
  }

  valueAt({ time, row, column }) {
    const value = valueOf(this.attribution, this.rowOf(row), this.rows.source.level(row, column));
    return `${seconds(time)}, ${this.record.tokens[row]}, ${number(value)} ${this.attribution.unit}`;
  }

  cellAt({ time, row, column }) {
    const value = valueOf(this.attribution.cells, this.token, this.cells.source.level(row, column));
    return `${seconds(time)}, ${this.bandName(row)}, ${number(value)} ${this.attribution.unit}`;
  }
}

const valueOf = ({ low, high, steps }, row, level) => low[row] + (level / steps[row]) * (high[row] - low[row]);

// Words with signs: removed ones are struck out, new ones underlined.
function marked(words) {
  return words.flatMap(([sign, word]) => [sign ? make(sign === "-" ? "del" : "ins", {}, word) : word, " "]);
}

// The page

const range = { from: 0, to: 1 };
const views = [];
let active, chosenUtterance = 0;

const utterance = () => INDEX.utterances[chosenUtterance];
const say = (text) => { live.textContent = text; };
const full = () => {
  const spans = views.filter((view) => view.record).map((view) => view.record.span);
  return [Math.min(...spans.map(([from]) => from)), Math.max(...spans.map(([, to]) => to))];
};

function setRange(from, to) {
  const [first, last] = full(), span = Math.min(to - from, last - first);
  range.from = Math.min(Math.max(from, first), last - span);
  range.to = range.from + span;
  for (const view of views) view.draw();
}

function zoomTo(from, to) { setRange(from, Math.max(to, from + 0.1)); }

function zoom(factor, centre = (range.from + range.to) / 2) {
  const span = Math.max(0.1, (range.to - range.from) / factor);
  const from = centre - ((centre - range.from) / (range.to - range.from)) * span;
  setRange(from, from + span);
}

function shift(share) {
  const by = share * (range.to - range.from);
  setRange(range.from + by, range.to + by);
}

function activate(view) {
  active = view;
  for (const each of views) each.node.classList.toggle("active", each === view);
}

// Two views show the spectrogram, and the words of one condition, once. Lower rows keep both maps on the screen.
function arrange() {
  const two = views.length > 1, { row, bands } = two ? HEIGHTS.two : HEIGHTS.one;
  page.classList.toggle("two", two);
  comparison.setAttribute("aria-pressed", two);
  for (const view of views.filter(({ record }) => record)) {
    view.rows.height(Math.max(60, row * view.record.tokens.length));
    view.spectrogram.height(bands);
    const repeated = view !== views[0] && view.condition === views[0].condition;
    view.words.hidden = repeated;
    view.reference.hidden = repeated || !view.record.reference.length;
    view.refresh();
  }
}

async function chooseUtterance(i) {
  chosenUtterance = i;
  sound.pause();
  URL.revokeObjectURL(sound.src);
  const { sound: name, start, message } = utterance();
  if (name) sound.src = URL.createObjectURL(new Blob([bytesOf(name)], { type: "audio/ogg" }));
  else sound.removeAttribute("src");
  [offset, drawnAt] = [start, start];
  silence.textContent = message;
  player.disabled = !name;
  await Promise.all(views.map((view) => view.load()));
  setRange(...full());
}

async function compare() {
  const on = views.length === 1;
  if (on) {
    const ofAttention = ({ title }) => title.startsWith("Cross-attention"), { attribution, record } = active;
    const other = record.attributions.find((each) => ofAttention(each) !== ofAttention(attribution)) ?? attribution;
    views.push(new View(active.condition, other.name));
    page.append(views[1].node);
    await views[1].load();
    active.select(active.token, false, active.word);
  } else {
    views.pop().node.remove();
    activate(views[0]);
    arrange();
    setRange(range.from, range.to);
  }
}

const clock = make("span", { class: "clock" });
const silence = make("span", { class: "silence" });
const live = make("div", { class: "hidden", role: "status", "aria-live": "polite" });
const player = make("button", { click: toggle, "aria-label": "Play or pause the recording" }, "▶ Play");
const comparison = make("button", { click: compare, "aria-pressed": "false" }, "Compare two");
const help = make("dialog", { "aria-label": "Keys" }, make("strong", {}, "Keys"),
  make("dl", {}, ...Object.entries(KEYS).flatMap(([keys, what]) =>
    [make("dt", {}, make("kbd", {}, keys)), make("dd", {}, what)])),
  make("p", {}, "Drag over a panel to zoom in on a stretch. Ctrl and the wheel zoom, too."),
  make("form", { method: "dialog" }, make("button", {}, "Close")));
const utterances = picker("Utterance", chooseUtterance);
const page = document.querySelector("main");
page.append(make("div", { class: "bar" }, utterances.node, player, clock, silence, make("span", { class: "gap" }),
  make("button", { click: () => zoom(1.5), "aria-label": "Zoom in" }, "+"),
  make("button", { click: () => zoom(1 / 1.5), "aria-label": "Zoom out" }, "−"),
  make("button", { click: () => setRange(...full()) }, "Whole recording"), comparison,
  make("button", { click: () => help.showModal(), "aria-label": "Keys" }, "?")), live, sound, help);
for (const kind of ["play", "pause"]) {
  sound.addEventListener(kind, () => { player.textContent = sound.paused ? "▶ Play" : "⏸ Pause"; });
}

// Keys. None of them leaves the page, so that a notebook around it does not take one for a command.

function moveHead(down, right) {
  const [layers, heads] = active.headed.values.shape, [layer, head] = active.headInTable;
  active.chooseHead(Math.min(Math.max(layer + down, 0), layers - 1), Math.min(Math.max(head + right, 0), heads - 1));
  active.heads.querySelector("[aria-pressed=true]").focus();
}

function moveToken(by) {
  active.select(Math.min(Math.max(active.token + by, 0), active.record.tokens.length - 1));
  active.tokens.children[active.token].focus({ preventScroll: true });
  active.tokens.children[active.token].scrollIntoView({ block: "nearest" });
}

function chooseNext(by) {
  const next = active.chosen + by;
  if (next >= 0 && next < active.record.attributions.length) active.choose(next);
}

function onKey(event) {
  const target = event.target, inHeads = target.closest(".heads");
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  if (target.matches("select, input") || !active.record) return;
  const arrows = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (arrows && event.shiftKey) shift(arrows[1] / 4);
  else if (arrows && inHeads) moveHead(...arrows);
  else if (arrows?.[1]) moveToken(arrows[1]);
  else if (arrows) chooseNext(arrows[0]);
  else if (event.key === "Enter" && !target.matches("button")) active.play();
  else if (event.key === " " && !ownSpace(target)) toggle();
  else if (event.key === "+" || event.key === "=") zoom(1.5);
  else if (event.key === "-") zoom(1 / 1.5);
  else if (event.key === "Home") setRange(...full());
  else if (event.key === "?") help.showModal();
  else return;
  event.preventDefault();
}

// Buttons that are not part of a map are pressed with Space, as everywhere.
const ownSpace = (target) => target.matches("button") && !target.matches(".word, .token, .heads button");

document.addEventListener("keydown", onKey);
document.addEventListener("keyup", (event) => {
  if (event.key === " " && !ownSpace(event.target) && !help.open) event.preventDefault();
});
for (const kind of ["keydown", "keyup", "keypress"]) {
  document.addEventListener(kind, (event) => event.stopPropagation());
}

views.push(new View(0, "standardised_attention"));
page.append(views[0].node);
fill(utterances.select, INDEX.utterances.map((each) => each.id), 0);
activate(views[0]);
await chooseUtterance(0);
page.dataset.ready = "yes";
window.frameElement?.parentElement.querySelector("img")?.remove(); // it stands in for the page in an untrusted notebook
