// Draws how a model reads a text: surprisal, the likeliest next tokens, attention, the logit lens.
// Everything from a model or a text gets into the page as textContent only.
"use strict";

function element(name, attributes = {}, ...children) {
  const svg = ["svg", "line", "text"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function bytesOf(packed) {
  return Uint8Array.from(atob(packed), (sign) => sign.charCodeAt(0));
}

// A token in a line of its own: blanks and line breaks are signs.
function asSigns(token) {
  return token.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
}

function heat(part) { // part: 0 to 1
  return `color-mix(in srgb, var(--heat) ${Math.round(75 * Math.min(1, Math.max(0, part)))}%, transparent)`;
}

function counted(n, what) {
  return `${n} ${what}${n === 1 ? "" : "s"}`;
}

function percent(p) {
  return p >= 0.0995 ? `${Math.round(100 * p)} %` : p >= 0.0001 ? `${(100 * p).toPrecision(2)} %` : "< 0.01 %";
}

// What the sampler would draw from, as in generation/sampling.py: top-k, then temperature, then top-p.
// Returns [{id, p, kept}] for the likeliest ids, with p among what is kept.
function nextTokens(data, position, temperature, topK, topP, shown) {
  const from = position * data.nTop;
  const n = data.nTop, largest = data.logits[from];
  const t = Math.max(temperature, 1e-6);
  const weight = (logit) => Math.exp((logit - largest) / t);
  const k = temperature === 0 ? 1 : Math.min(topK || Infinity, data.vocabSize);
  let total = 0;
  for (let i = 0; i < Math.min(n, k); i++) total += weight(data.logits[from + i]);
  if (k > n) for (const [logit, count] of data.tails[position]) total += count * weight(logit);
  let before = 0, keptTotal = 0;
  const found = [];
  for (let i = 0; i < n; i++) {
    const p = i < k ? weight(data.logits[from + i]) / total : 0;
    const kept = i < k && (topP >= 1 || before < topP);
    if (kept) keptTotal += p;
    before += p;
    found.push({ id: data.ids[from + i], p, kept });
  }
  // Of the tail, as much is kept as top-p needs.
  if (k > n && before < topP) keptTotal = Math.min(1, topP);
  for (const each of found) each.p = each.kept ? each.p / keptTotal : 0;
  return found.slice(0, shown);
}

function slider(label, id, min, max, step, value, write, changed) {
  const output = element("output", { for: id }, write(value));
  const input = element("input", { type: "range", id, min, max, step, value });
  input.addEventListener("input", () => {
    output.textContent = write(Number(input.value));
    changed();
  });
  return { input, box: element("div", {}, element("label", { for: id }, label, " ", output), input) };
}

function showInside(place, data) {
  data.ids = new Uint32Array(bytesOf(data.topIds).buffer);
  data.logits = new Float32Array(bytesOf(data.topLogits).buffer);
  const lensIds = new Uint32Array(bytesOf(data.lensIds).buffer), lensP = bytesOf(data.lensP);
  const attention = bytesOf(data.attention);
  const n = data.tokens.length, triangle = n * (n + 1) / 2;
  const word = (id) => data.text[id];
  let chosen = n - 1, layer = data.nLayer - 1, head = 0;

  const weightOf = (l, h, query, key) => {
    const root = attention[(l * data.nHead + h) * triangle + query * (query + 1) / 2 + key] / 255;
    return root * root;
  };

  // ---------------------------------------------------------------- the text

  const tokens = element("div", { class: "text tokens", "aria-label": "the text, token by token" });
  data.tokens.forEach((id, i) => {
    const bits = data.surprisal[i];
    const span = element("span", { title: bits === null ? "the first token" : `${bits.toFixed(2)} bits`, onclick: () => choose(i) });
    span.textContent = word(id).includes("\n") ? word(id).replaceAll("\n", "⏎\n") : word(id);
    if (bits !== null) span.style.background = heat(bits / 8);
    tokens.append(span);
  });
  const known = data.surprisal.filter((bits) => bits !== null);
  const mean = known.reduce((sum, bits) => sum + bits, 0) / Math.max(1, known.length);
  const notes = [counted(n, "token")];
  if (known.length) notes[0] += `, ${mean.toFixed(2)} bits each on average`;
  if (data.nGiven > data.nRead) notes.push(`The model reads the last ${data.nRead} of ${data.nGiven}`);
  if (data.nRead > n) notes.push(`The last ${n} are shown`);

  // ---------------------------------------------------------------- what comes next

  const whatNext = element("h3");
  const bars = element("div", { class: "bars" });
  const position = slider("position", "inside-position", 0, n - 1, 1, chosen, (i) => `${i + 1} of ${n}`, () => choose(Number(position.input.value)));
  const temperature = slider("temperature", "inside-temperature", 0, 2, 0.05, 1, (t) => t.toFixed(2), drawNext);
  const most = Math.min(data.vocabSize, data.nTop);
  const topK = slider("top-k", "inside-top-k", 0, most, 1, 0, (k) => k === 0 ? "off" : String(k), drawNext);
  const topP = slider("top-p", "inside-top-p", 0.05, 1, 0.01, 1, (p) => p === 1 ? "off" : p.toFixed(2), drawNext);

  function drawNext() {
    const values = [temperature, topK, topP].map(({ input }) => Number(input.value));
    const found = nextTokens(data, chosen, ...values, 10);
    bars.replaceChildren(...found.flatMap(({ id, p, kept }) => {
      const bar = element("i");
      bar.style.width = `${100 * p}%`;
      const name = element("code", kept ? {} : { class: "dropped" });
      name.textContent = asSigns(word(id));
      return [name, bar, element("span", kept ? {} : { class: "dropped" }, kept ? percent(p) : "dropped")];
    }));
    whatNext.textContent = `After “${asSigns(word(data.tokens[chosen]))}”`;
    if (chosen + 1 < n) whatNext.append(` came “${asSigns(word(data.tokens[chosen + 1]))}”, ${data.surprisal[chosen + 1].toFixed(2)} bits`);
  }

  // ---------------------------------------------------------------- attention

  const paintHead = (canvas, l, h) => {
    canvas.width = canvas.height = n;
    const context = canvas.getContext("2d");
    const image = context.createImageData(n, n);
    const [r, g, b] = getComputedStyle(document.documentElement).getPropertyValue("--heat").trim().match(/[0-9a-f]{2}/gi)
      .map((pair) => parseInt(pair, 16));
    const start = (l * data.nHead + h) * triangle;
    for (let query = 0; query < n; query++) {
      for (let key = 0; key <= query; key++) {
        const at = 4 * (query * n + key);
        image.data.set([r, g, b, attention[start + query * (query + 1) / 2 + key]], at);
      }
    }
    context.putImageData(image, 0, 0);
  };
  const heads = element("div", { class: "heads", role: "group", "aria-label": "attention heads" });
  heads.style.gridTemplateColumns = `repeat(${data.nHead}, max-content)`;
  for (let l = 0; l < data.nLayer; l++) {
    for (let h = 0; h < data.nHead; h++) {
      const canvas = element("canvas");
      paintHead(canvas, l, h);
      heads.append(element("button", { type: "button", "aria-label": `block ${l + 1}, head ${h + 1}`, "data-head": `${l}-${h}`,
        onclick: () => { layer = l; head = h; drawHead(); } }, canvas));
    }
  }
  const headName = element("h3");
  const large = element("canvas", { class: "large", role: "img" });
  const hovered = element("p", { class: "note" });
  const cellAt = (event) => {
    const box = large.getBoundingClientRect();
    const at = (value, size) => Math.min(n - 1, Math.max(0, Math.floor(n * value / size)));
    return [at(event.clientY - box.top, box.height), at(event.clientX - box.left, box.width)];
  };
  const help = "Each row is a token, and each column a token that it attends to. Point at a cell. A click chooses the row.";
  large.addEventListener("mousemove", (event) => {
    const [query, key] = cellAt(event);
    hovered.textContent = key > query ? help
      : `“${asSigns(word(data.tokens[query]))}” (${query + 1}) attends with ${percent(weightOf(layer, head, query, key))} to “${asSigns(word(data.tokens[key]))}” (${key + 1})`;
  });
  large.addEventListener("mouseleave", () => { hovered.textContent = help; });
  large.addEventListener("click", (event) => choose(cellAt(event)[0]));
  hovered.textContent = help;
  const lines = element("div", { class: "lines", tabindex: "0", "aria-label": "lines from each token to the tokens that it attends to" });

  function drawHead() {
    paintHead(large, layer, head);
    headName.textContent = `Block ${layer + 1}, head ${head + 1}`;
    large.setAttribute("aria-label", `attention of block ${layer + 1}, head ${head + 1}`);
    for (const button of heads.children) button.setAttribute("aria-pressed", String(button.dataset.head === `${layer}-${head}`));
    drawLines();
  }

  function drawLines() {
    const height = 17, width = 340, left = 120, right = 220;
    const svg = element("svg", { viewBox: `0 0 ${width} ${n * height + 6}` });
    const y = (i) => (i + 0.5) * height + 3;
    for (let query = 0; query < n; query++) {
      for (let key = 0; key <= query; key++) {
        const weight = weightOf(layer, head, query, key);
        const isChosen = query === chosen;
        if (weight < (isChosen ? 0.01 : 0.15)) continue;
        svg.append(element("line", { x1: left + 4, y1: y(query), x2: right - 4, y2: y(key), "stroke-width": isChosen ? 2.5 : 1,
          "stroke-opacity": isChosen ? Math.max(0.15, weight) : 0.13 * weight }));
      }
    }
    data.tokens.forEach((id, i) => {
      const label = asSigns(word(id)).slice(0, 14);
      const query = element("text", { x: left, y: y(i) + 4, "text-anchor": "end", onclick: () => choose(i) }, label);
      const key = element("text", { x: right, y: y(i) + 4, onclick: () => choose(i) }, label);
      if (i === chosen) query.setAttribute("class", "chosen");
      svg.append(query, key);
    });
    lines.replaceChildren(svg);
    lines.scrollTop = Math.max(0, (chosen / n) * lines.scrollHeight - lines.clientHeight / 2);
  }

  // ---------------------------------------------------------------- the logit lens

  const lensRows = [];
  const lens = element("table");
  for (let l = data.nLayer; l >= 0; l--) {
    const name = l === 0 ? "embedding" : `block ${l}`;
    const row = element("tr", {}, element("th", { scope: "row" }, name));
    for (let i = 0; i < n; i++) {
      const at = (l * n + i) * data.nLens;
      const cell = element("td", { onclick: () => choose(i) }, element("code", {}, asSigns(word(lensIds[at])).slice(0, 8)));
      cell.style.background = heat(lensP[at] / 255);
      cell.title = Array.from({ length: data.nLens }, (_, k) => `${asSigns(word(lensIds[at + k]))} ${percent(lensP[at + k] / 255)}`).join("\n");
      row.append(cell);
    }
    lensRows.push(row);
    lens.append(row);
  }
  const read = element("tr", {}, element("th", { scope: "row" }, "it read"));
  for (const id of data.tokens) read.append(element("td", {}, element("code", {}, asSigns(word(id)).slice(0, 8))));
  lens.append(read);
  const lensBox = element("div", { class: "lens" }, lens);

  function choose(i) {
    chosen = i;
    position.input.value = String(i);
    position.box.querySelector("output").textContent = `${i + 1} of ${n}`;
    [...tokens.children].forEach((span, at) => span.classList.toggle("chosen", at === i));
    for (const row of [...lensRows, read]) [...row.children].forEach((cell, at) => cell.classList.toggle("chosen", at === i + 1));
    const cell = read.children[i + 1];
    lensBox.scrollLeft = cell.offsetLeft - lensBox.clientWidth / 2;
    drawNext();
    drawLines();
  }

  place.replaceChildren(
    element("p", { class: "note" }, `${notes.join(". ")}. The stronger the colour of a token, the more it surprised the model (full colour: 8 bits or more). Choose a token.`),
    tokens,
    element("h2", {}, "What comes next"),
    element("div", { class: "two" },
      element("div", {}, whatNext, bars),
      element("div", { class: "controls" }, position.box, temperature.box, topK.box, topP.box)),
    element("h2", {}, "Attention"),
    element("p", { class: "note" }, `A row of heads for each block, the first block above. Choose a head.`),
    heads, headName,
    element("div", { class: "two" }, element("div", {}, large, hovered), lines),
    element("h2", {}, "The logit lens"),
    element("p", { class: "note" }, "What the model would have said after each block, if the blocks ended there: the likeliest next token at each position. The stronger the colour, the likelier."),
    lensBox,
  );
  drawHead();
  choose(chosen);
}
