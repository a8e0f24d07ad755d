// The page: one conversation of texts and pictures, asked of the server that sent this file. It keeps nothing.
"use strict";

const $ = (id) => document.getElementById(id);
const log = $("log"), prompt = $("prompt");
let model = null;
let messages = []; // the conversation as the API wants it
let shown = []; // attached pictures: {url, name}
let stopping = null; // the AbortController of what runs

const mode = () => document.querySelector("input[name=mode]:checked").value;
const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function headers(extra = {}) {
  return $("key").value ? { ...extra, Authorization: `Bearer ${$("key").value}` } : extra;
}

function say(text) {
  $("state").textContent = text;
}

// ---- what is seen ----

function turn(who, mine = false) {
  const words = element("p", { className: "words" });
  const box = element("article", { className: mine ? "turn mine" : "turn" }, element("p", { className: "who", textContent: who }), words);
  log.append(box);
  box.scrollIntoView({ block: "end" });
  return { box, words };
}

function picture(url, alt, actions) {
  const image = element("img", { src: url, alt });
  image.onload = () => {
    if (image.naturalWidth < 256) image.className = "small";
    log.scrollTop = log.scrollHeight;
  };
  const figure = element("figure", {}, image);
  if (actions) {
    const edit = element("button", { type: "button", textContent: "Edit this" });
    edit.onclick = () => {
      choose("edit");
      shown = [{ url, name: "picture.png" }];
      drawShown();
      prompt.focus();
    };
    const save = element("a", { href: url, download: "picture.png", textContent: "Save" });
    figure.append(element("figcaption", {}, edit, save, element("span", { textContent: actions })));
  }
  return figure;
}

function choose(value) {
  document.querySelector(`input[name=mode][value=${value}]`).checked = true;
  changed();
}

function changed() {
  prompt.placeholder = {
    chat: "Ask something. Enter sends, Shift+Enter starts a new line.",
    draw: "Say what the picture shows.",
    edit: "Add a picture and say what to change.",
  }[mode()];
}

function drawShown() {
  $("shown").replaceChildren(
    ...shown.map((one, place) => {
      const away = element("button", { type: "button", textContent: "×" });
      away.setAttribute("aria-label", `Remove ${one.name}`);
      away.onclick = () => {
        shown.splice(place, 1);
        drawShown();
      };
      return element("li", {}, element("img", { src: one.url, alt: one.name }), away);
    }),
  );
}

// ---- asking ----

function common() {
  return { model: model.id, seed: number("seed"), think: $("think").checked || undefined, stream: true };
}

function flow() {
  const [width, height] = [number("width"), number("height")];
  return {
    size: width && height ? `${width}x${height}` : undefined,
    num_timesteps: number("timesteps"),
    cfg_text_scale: number("text_scale"),
    cfg_img_scale: number("img_scale"),
  };
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").find((line) => line.startsWith("data: "));
      if (!data || data === "data: [DONE]") continue;
      const event = JSON.parse(data.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function post(address, body, type) {
  const answer = await fetch(address, { method: "POST", headers: headers(type ? { "Content-Type": type } : {}), body, signal: stopping.signal });
  if (answer.ok) return events(answer);
  const error = await answer.json().catch(() => null);
  throw new Error(error?.error?.message ?? `The server answered with status ${answer.status}.`);
}

async function chat(text, pictures) {
  const parts = [...pictures.map((one) => ({ type: "image_url", image_url: { url: one.url } }))];
  if (text) parts.push({ type: "text", text });
  const asked = [...messages, { role: "user", content: parts }];
  const { words } = turn(model.id);
  const body = { ...common(), messages: asked, max_tokens: number("tokens"), temperature: number("temperature") };
  for await (const event of await post("/v1/chat/completions", JSON.stringify(body), "application/json")) {
    words.textContent += event.choices[0]?.delta.content ?? "";
    log.scrollTop = log.scrollHeight;
  }
  messages = [...asked, { role: "assistant", content: words.textContent }];
  words.textContent ||= "(the model said nothing)";
}

async function draw(text, pictures) {
  const settings = { ...common(), ...flow(), prompt: text };
  const { box, words } = turn(model.id);
  const bar = element("progress", { max: 1 });
  bar.setAttribute("aria-label", "Flow steps done");
  box.append(bar);
  try {
    for await (const event of await ask(settings, pictures)) {
      if (event.type.endsWith(".progress")) {
        bar.max = event.steps;
        bar.value = event.step;
        continue;
      }
      words.textContent = event.revised_prompt ?? "";
      const url = `data:image/png;base64,${event.b64_json}`;
      box.append(picture(url, text, `${event.size.replace("x", " × ")} pixels, seed ${event.seed}`));
      messages.push({ role: "user", content: text }, { role: "assistant", images: [{ type: "image_url", image_url: { url } }] });
    }
  } finally {
    bar.remove();
  }
}

async function ask(settings, pictures) {
  if (!pictures.length) return post("/v1/images/generations", JSON.stringify(settings), "application/json");
  const form = new FormData();
  for (const [name, value] of Object.entries(settings)) if (value !== undefined) form.append(name, value);
  for (const one of pictures) form.append("image[]", bytes(one.url), one.name);
  return post("/v1/images/edits", form);
}

function bytes(url) {
  const coded = atob(url.slice(url.indexOf(",") + 1));
  return new Blob([Uint8Array.from(coded, (letter) => letter.charCodeAt(0))]);
}

async function send() {
  const text = prompt.value.trim(), pictures = mode() === "draw" ? [] : shown, what = mode();
  if (stopping || !model) return;
  if (what === "edit" && !pictures.length) return say("Add the picture to edit first.");
  if (what !== "chat" && !text) return say("Say first what the picture shall be.");
  if (!text && !pictures.length) return say("Write something first.");
  const { box, words } = turn("You", true);
  words.textContent = text;
  for (const one of pictures) box.append(picture(one.url, one.name));
  prompt.value = "";
  if (pictures.length) {
    shown = [];
    drawShown();
  }
  stopping = new AbortController();
  busy(true);
  try {
    await (what === "chat" ? chat : draw)(text, pictures);
    say("Ready.");
  } catch (error) {
    const said = error.name === "AbortError" ? "Stopped." : error.message;
    const last = log.lastElementChild;
    if (!last.classList.contains("mine") && !last.querySelector("img, .words:not(:empty)")) last.remove();
    const fault = turn("Not done");
    fault.box.classList.add("fault");
    fault.words.textContent = said;
    say(said);
  } finally {
    stopping = null;
    busy(false);
  }
}

function busy(is) {
  $("send").disabled = is;
  $("stop").disabled = !is;
  log.setAttribute("aria-busy", is);
  if (is) say("Working…");
}

// ---- the start ----

async function meet() {
  try {
    const answer = await fetch("/v1/models", { headers: headers() });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error.message);
    model = found.data[0];
  } catch (error) {
    return say(error.message);
  }
  say(`Ready: ${model.id}`);
  $("timesteps").max = model.limits.max_timesteps;
  $("timesteps").placeholder = model.defaults.num_timesteps;
  $("text_scale").placeholder = model.defaults.guidance.text_scale;
  $("img_scale").placeholder = model.defaults.guidance.image_scale;
  $("tokens").max = model.limits.max_tokens;
  for (const side of ["width", "height"]) Object.assign($(side), { min: model.sizes.step, max: model.sizes.largest, step: model.sizes.step });
  for (const input of document.querySelectorAll("input[name=mode]")) input.disabled = !model.draws && input.value !== "chat";
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
$("attach").addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    $("files").click();
  }
});
$("files").addEventListener("change", () => {
  for (const file of $("files").files) {
    const reader = new FileReader();
    reader.onload = () => {
      shown.push({ url: reader.result, name: file.name });
      drawShown();
    };
    reader.readAsDataURL(file);
  }
  $("files").value = "";
});
$("stop").addEventListener("click", () => stopping?.abort());
$("clear").addEventListener("click", () => {
  messages = [];
  log.replaceChildren();
  prompt.focus();
});
$("key").addEventListener("change", meet);
for (const input of document.querySelectorAll("input[name=mode]")) input.addEventListener("change", changed);
meet();
