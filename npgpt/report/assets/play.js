// The page to play with a model: asks the server for texts, and shows them while they are drawn.
// Everything from the model gets into the page as textContent only.
"use strict";

const model = JSON.parse(document.getElementById("settings").textContent).model;
const LONGEST_GIVEN = 400; // characters of the prompt that are repeated before a text
const byId = (id) => document.getElementById(id);
let running = null; // the AbortController of the request that is under way
let drawn = []; // of each sample: { tokens: [{ text, bits }], box, place }

for (const [id, write] of Object.entries({
  "temperature": (value) => value === 0 ? "0, the likeliest" : value.toFixed(2),
  "top-k": (value) => value === 0 ? "off" : String(value),
  "top-p": (value) => value === 1 ? "off" : value.toFixed(2),
  "max-tokens": String,
  "n": String,
})) {
  const show = () => { byId(`${id}-value`).textContent = write(Number(byId(id).value)); };
  byId(id).addEventListener("input", show);
  show();
}

function headers() {
  const key = byId("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function explain(response) {
  if (response.status === 401) {
    byId("key-box").hidden = false;
    return "This server needs a key. Enter it above.";
  }
  const body = await response.json().catch(() => null);
  return body?.error?.message || `The server answered ${response.status}.`;
}

function request() {
  const number = (id) => Number(byId(id).value);
  const asked = { model, prompt: byId("prompt").value, stream: true, logprobs: 0, max_tokens: number("max-tokens"), n: number("n"),
    temperature: number("temperature"), top_p: number("top-p") };
  if (number("top-k")) asked.top_k = number("top-k");
  if (byId("skip").checked) asked.unknown = "skip";
  if (byId("stop").value) asked.stop = [byId("stop").value.replaceAll("\\n", "\n")];
  if (byId("seed").value !== "" || byId("seed").validity.badInput) {
    const seed = number("seed");
    if (byId("seed").validity.badInput || !Number.isSafeInteger(seed) || seed < 0) throw new Error("The seed must be a whole number from 0 on.");
    asked.seed = seed;
  }
  return asked;
}

function startSample(index, prompt) {
  const place = element("div", { class: "text", "data-sample": String(index) });
  const inside = element("button", { type: "button", disabled: "disabled", onclick: () => lookInside(index) }, "Look inside");
  const given = element("span", { class: "given" });
  given.textContent = prompt.length > LONGEST_GIVEN ? `…${prompt.slice(-LONGEST_GIVEN)}` : prompt;
  place.append(given);
  const box = element("div", {}, place, inside);
  byId("texts").append(box);
  return { tokens: [], place, inside, prompt, text: "" };
}

// The text of each token. Tokens that are no whole characters are joined, and so are their bits.
function pieces(text, tokens) {
  const found = [];
  let at = 0, waiting = null;
  for (const token of tokens) {
    const isText = !token.text.startsWith("bytes:") && text.startsWith(token.text, at);
    if (isText && waiting === null) {
      found.push({ text: token.text, bits: token.bits });
      at += token.text.length;
      continue;
    }
    waiting = { bits: (waiting?.bits || 0) + token.bits };
    const next = tokens[tokens.indexOf(token) + 1];
    const end = next && !next.text.startsWith("bytes:") ? text.indexOf(next.text, at) : text.length;
    if (!next || !next.text.startsWith("bytes:")) {
      found.push({ text: text.slice(at, end < 0 ? text.length : end), bits: waiting.bits });
      at = end < 0 ? text.length : end;
      waiting = null;
    }
  }
  if (at < text.length) found.push({ text: text.slice(at), bits: null });
  return found;
}

function append(sample, text, tokens) {
  sample.text += text;
  for (const piece of pieces(text, tokens)) {
    const span = element("span");
    span.textContent = piece.text;
    sample.tokens.push({ span, bits: piece.bits });
    colour(sample.tokens.at(-1));
    sample.place.append(span);
  }
}

function colour({ span, bits }) {
  const wanted = byId("colour").checked && bits !== null;
  span.style.background = wanted ? heat(bits / 8) : "";
  span.title = wanted ? `${bits.toFixed(2)} bits` : "";
}

byId("colour").addEventListener("change", () => drawn.forEach((sample) => sample.tokens.forEach(colour)));

async function write() {
  byId("error").textContent = byId("status").textContent = "";
  running = new AbortController();
  byId("write").disabled = true;
  byId("stop-button").disabled = false;
  const started = performance.now();
  let count = 0;
  try {
    const asked = request();
    const response = await fetch("v1/completions", { method: "POST", headers: headers(), body: JSON.stringify(asked), signal: running.signal });
    if (!response.ok) throw new Error(await explain(response));
    byId("texts").replaceChildren();
    byId("inside").replaceChildren();
    drawn = Array.from({ length: asked.n }, (_, index) => startSample(index, asked.prompt));
    for await (const data of events(response.body)) {
      if (data.error) throw new Error(data.error.message);
      for (const { index, text, logprobs } of data.choices) {
        const tokens = logprobs.tokens.map((token, i) => ({ text: token, bits: -logprobs.token_logprobs[i] / Math.LN2 }));
        count += tokens.length;
        append(drawn[index], text, tokens);
      }
      const seconds = (performance.now() - started) / 1000;
      byId("status").textContent = `${counted(count, "token")}, ${Math.round(count / seconds)} a second`;
    }
  } catch (error) {
    if (error.name === "AbortError") byId("status").textContent += ", stopped";
    else byId("error").textContent = error instanceof TypeError ? "The server cannot be reached." : error.message;
  }
  for (const sample of drawn) sample.inside.disabled = sample.prompt + sample.text === "";
  byId("write").disabled = false;
  byId("stop-button").disabled = true;
  running = null;
}

// The data of server-sent events.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function lookInside(index) {
  const { prompt, text } = drawn[index];
  byId("error").textContent = "";
  try {
    const response = await fetch("inside", { method: "POST", headers: headers(), body: JSON.stringify({ prompt: prompt + text }) });
    if (!response.ok) throw new Error(await explain(response));
    const place = element("div");
    byId("inside").replaceChildren(element("h2", {}, `Inside: sample ${index + 1}`), place);
    showInside(place, await response.json());
    byId("inside").scrollIntoView({ behavior: "smooth" });
  } catch (error) {
    byId("error").textContent = error instanceof TypeError ? "The server cannot be reached." : error.message;
  }
}

byId("write").addEventListener("click", write);
byId("stop-button").addEventListener("click", () => running?.abort());
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) write();
});
