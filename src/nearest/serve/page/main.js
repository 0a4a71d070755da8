// The page's state: what is asked, how, and what came back.

import { Failure, get, send, stream } from "./api.js";
import { Answer, decided, difference, element, mean, ofText, percent } from "./answer.js";
import { openDocument, openRead, showDocuments, showReads, showToken, showVerbatim } from "./panels.js";
import { startLibrary } from "./library.js";
import { decoded, encoded, save, savePage } from "./keeping.js";

const $ = (id) => document.getElementById(id);
const state = { about: null, mode: "prompt", turns: [], without: [], answers: [], running: null, asked: null };

// --- settings ---------------------------------------------------------------------------------

const SLIDERS = ["lam", "neighbours"]; // settings of methods
const chosenMemories = () => [...document.querySelectorAll("#memories input:checked")].map((box) => box.value);

function options(method = $("method").value) {
  const made = { version: 1, method, sources: true, alternatives: 6 };
  if (method === "base") return made;
  const names = chosenMemories();
  if (names.length && names.length < state.about.memories.length) made.memories = names.map((name) => ({ name }));
  const settings = state.about.settings[method];
  const moved = SLIDERS.filter((name) => name in settings && Number($(name).value) !== settings[name]);
  if (moved.length) made.settings = { ...settings, ...Object.fromEntries(moved.map((name) => [name, Number($(name).value)])) };
  if (state.without.length) made.without = state.without.map(({ memory, document }) => ({ memory, id: document }));
  return made;
}

function showSettings() {
  const settings = state.about.settings[$("method").value] ?? {};
  for (const name of SLIDERS) {
    $(`${name}-field`).hidden = !(name in settings);
    if (name in settings) $(name).value = settings[name];
  }
  showNumbers();
}

function showNumbers() {
  for (const name of [...SLIDERS, "temperature", "tokens"]) $(`${name}-shown`).textContent = $(name).value;
}

// --- running ----------------------------------------------------------------------------------

function request(method) {
  const body = { model: state.about.model, temperature: Number($("temperature").value), seed: 0, nearest: options(method) };
  if (state.mode === "chat") return ["/v1/chat/completions", { ...body, messages: state.turns, max_tokens: Number($("tokens").value) }];
  if (state.mode === "text") return ["/v1/completions", { ...body, prompt: state.asked, max_tokens: 0, echo: true }];
  return ["/v1/completions", { ...body, prompt: state.asked, max_tokens: Number($("tokens").value) }];
}

async function fill(answer, method, signal) {
  const [path, body] = request(method);
  let summary = null;
  try {
    for await (const event of stream(path, body, signal)) {
      const choice = event.choices[0];
      if (!choice?.nearest) continue;
      const { tokens, reads, ...rest } = choice.nearest;
      answer.reads.push(...reads);
      answer.add(state.mode === "text" ? tokens.filter((t) => t.token !== "" && (t.text || t.logprob !== null)) : tokens, state.mode === "text");
      if (choice.finish_reason) summary = rest;
    }
  } finally {
    answer.end(summary);
  }
  return answer;
}

async function run(previous = null) {
  state.running?.abort();
  const control = (state.running = new AbortController());
  $("problem").hidden = true;
  $("stop").hidden = false;
  $("run").disabled = true;
  const method = $("method").value;
  const title = method === "base" ? "Model alone" : `With memory: ${method}`;
  const answers = [new Answer(title, choose)];
  if (previous) answers[0].name.prepend(element("span", { className: "tag when" }, "now"));
  if ($("compare").checked && method !== "base" && state.mode !== "text") answers.push(new Answer("Model alone", choose));
  if (state.mode === "prompt") answers.forEach((answer) => answer.context(state.asked));
  const said = state.mode === "chat" ? state.turns.map((turn) => element("article", { className: "answer said" }, element("h2", {}, turn.role), element("p", { className: "tokens" }, turn.content))) : [];
  $("output").replaceChildren(...said, ...answers.map((answer) => answer.node), ...(previous ? [previous.node] : []));
  state.answers = answers;
  $("examples").hidden = true;
  $("story").hidden = true;
  try {
    await Promise.all(answers.map((answer, n) => fill(answer, n ? "base" : method, control.signal)));
    finished(answers, previous);
  } catch (error) {
    if (state.running === control) unfinished(answers[0]);
    if (error.name === "AbortError") return;
    if (!(error instanceof Failure)) throw error;
    $("problem").replaceChildren(error.message);
    $("problem").hidden = false;
  } finally {
    if (state.running === control) {
      state.running = null;
      $("stop").hidden = true;
      $("run").disabled = false;
    }
  }
}

function finished(answers, previous) {
  const [answer, other] = answers;
  showDocuments(answer.summary, actions, state.mode === "text" ? "text" : "answer");
  showVerbatim(answer.summary, actions);
  showReads(answer, `${state.asked ?? ""} ${answer.text}`, actions);
  $("tools").hidden = false;
  $("legend-text").hidden = state.mode !== "text";
  $("legend-answer").hidden = state.mode === "text";
  const against = previous ?? other;
  let note = `Answer complete: ${answer.text}`;
  if (against && against.tokens.length < 2000) {
    const count = answer.compare(against);
    against.compare(answer);
    note += ` ${count} tokens differ from ${previous ? "before" : "the model alone"}.`;
    answer.name.append(element("span", { className: "tag" }, count ? `${count} tokens differ` : "the same words"));
  }
  if (state.mode === "text") textFigures(answer);
  else tellStory(answer);
  if (state.mode === "chat") {
    state.turns.push({ role: "assistant", content: answer.text });
    $("new-chat").hidden = false;
  }
  $("announce").textContent = note;
  history.replaceState(null, "", permalink());
}

// In a sentence: how much the memory decided, where most of it stands, and what it changed.
function tellStory(answer) {
  const generated = answer.tokens.filter((token) => !token.prompt);
  const [memory, text] = [mean(generated, decided), mean(generated, ofText)];
  const story = $("story");
  story.hidden = answer.summary?.method === "base" || !generated.length;
  if (story.hidden) return;
  if (!memory) {
    story.replaceChildren("The memory had no part in this answer: ", text ? `the model wrote it, helped by earlier places of this text (${percent(text)}).` : "the model wrote it alone.");
    return;
  }
  const other = generated.filter((token) => token.base_alternatives[0] && token.base_alternatives[0].id !== token.id).length;
  const first = answer.summary.documents[0];
  story.replaceChildren(
    element("b", { className: "key" }, `The memory decided ${percent(memory)}`), " of this answer, most of it from ",
    element("b", {}, first.title), text ? `; earlier places of this text decided ${percent(text)}. ` : ". ", `At ${other} of ${generated.length} tokens the model alone would have said something else.`);
  if (answer.chosen < 0 && document.activeElement !== answer.box) answer.choose(answer.telling, false);
}

// Perplexity with and without memory, of a text that was read.
function textFigures(answer) {
  const scored = answer.tokens.filter((token) => token.logprob !== null);
  if (!scored.length) return;
  const perplexity = (name) => Math.exp(-scored.reduce((sum, token) => sum + token[name], 0) / scored.length);
  const [alone, together] = [perplexity("base_logprob"), perplexity("logprob")];
  answer.name.append(
    element("span", { className: "tag" }, `perplexity ${alone.toFixed(2)} alone`),
    element("span", { className: "tag strong" }, `${together.toFixed(2)} with memory`));
  const likelier = scored.filter((token) => token.logprob > token.base_logprob).length;
  $("story").hidden = answer.summary?.method === "base";
  $("story").replaceChildren(
    element("b", { className: "key" }, together < alone ? "The memory expects this text" : "The memory does not expect this text"),
    together < alone
      ? `: with it a token is ${(alone / together).toFixed(1)} times as likely as under the model alone, on average; `
      : " better than the model alone does; ",
    `${likelier} of ${scored.length} tokens are likelier with it.`);
  if (answer.chosen < 0) answer.choose(answer.tokens.reduce((best, token, n, all) => (difference(token) > difference(all[best]) ? n : best), 0), false);
}

function choose(answer, token) {
  state.answers.filter((other) => other !== answer).forEach((other) => other.release());
  showToken(token, actions);
  openRead(token.read);
  document.querySelectorAll("#documents .list > li").forEach((item) => {
    const used = answer.documents(token).some((s) => s.document === item.dataset.document && s.memory === item.dataset.memory);
    const name = item.querySelector(".name");
    if (used) name.setAttribute("aria-current", "true");
    else name.removeAttribute("aria-current");
  });
}

const actions = {
  open: (place) => openDocument(place).catch(report),
  mark: (one) => state.answers.forEach((answer) => answer.mark(one)),
  text: (run) => [...state.answers[0].text].slice(run.start, run.end).join(""), // by code points
  leaveOut(one) {
    state.without.push({ memory: one.memory, document: one.document, title: one.title });
    again();
  },
};

// Whether there is something to answer: of a chat, a message that was not answered, or was once.
function awaitsAnswer() {
  if (state.mode !== "chat") return true;
  while (state.turns.at(-1)?.role === "assistant") state.turns.pop();
  return state.turns.length > 0;
}

// After a stop what has come is the answer; a message without any can be sent again.
function unfinished(answer) {
  if (state.mode !== "chat") return;
  if (answer.text) {
    state.turns.push({ role: "assistant", content: answer.text });
  } else {
    state.turns.pop();
    $("input").value ||= state.asked;
  }
}

// Run what was asked once more, and compare with what came before.
function again() {
  showWithout();
  if (state.asked === null) return;
  if (!awaitsAnswer()) return;
  const before = state.answers[0];
  before.name.querySelector(".when")?.remove();
  before.name.prepend(element("span", { className: "tag when" }, "before"));
  run(before);
}

function showWithout() {
  const notice = $("without");
  notice.hidden = !state.without.length;
  const chips = state.without.map((one) =>
    element("button", {
      type: "button", className: "small",
      aria: { label: `Use ${one.title} again` },
      onclick: () => { state.without = state.without.filter((other) => other !== one); again(); },
    }, `${one.title} ✕`));
  notice.replaceChildren("Left out of the prediction: ", ...chips);
}

function report(error) {
  $("problem").replaceChildren(error.message);
  $("problem").hidden = false;
}

// --- links and files --------------------------------------------------------------------------

const permalink = () => encoded({
  mode: state.mode, asked: state.asked, turns: state.mode === "chat" ? state.turns.slice(0, -1) : undefined,
  options: options(), temperature: $("temperature").value, tokens: $("tokens").value, without: state.without,
  compare: $("compare").checked,
  versions: Object.fromEntries(state.about.memories.map((memory) => [memory.name, memory.version])),
});

function fromLink() {
  if (location.hash.length < 2 || document.getElementById(location.hash.slice(1))) return false; // a place on the page
  try {
    const kept = decoded(location.hash);
    setMode(kept.mode);
    $("method").value = kept.options.method;
    showSettings();
    for (const name of SLIDERS) if (kept.options.settings?.[name] !== undefined) $(name).value = kept.options.settings[name];
    $("temperature").value = kept.temperature;
    $("tokens").value = kept.tokens;
    $("compare").checked = Boolean(kept.compare);
    const names = kept.options.memories?.map((memory) => memory.name);
    for (const box of document.querySelectorAll("#memories input")) box.checked = !names || names.includes(box.value);
    state.without = kept.without ?? [];
    state.turns = kept.turns ?? [];
    state.asked = kept.asked;
    $("input").value = kept.asked ?? "";
    const moved = state.about.memories.filter((memory) => kept.versions?.[memory.name] !== memory.version);
    $("outdated").hidden = !moved.length;
    $("outdated").textContent = `This link was made with another version of ${moved.map((m) => m.name).join(", ")}: the answer may differ.`;
    showNumbers();
    showWithout();
    if (state.asked !== null) run();
  } catch {
    report(new Failure("This link cannot be read: it was cut or changed."));
  }
  return true;
}

const asJson = () => JSON.stringify({
  version: 1, model: state.about.model, mode: state.mode, asked: state.asked, options: options(),
  answers: state.answers.map((a) => ({ title: a.title, text: a.text, ...a.summary, reads: a.reads, tokens: a.tokens.map(({ node, ...token }) => token) })),
}, null, 2);

// A few beginnings from the documents, so that nobody has to think of a first prompt.
async function showExamples() {
  const memory = state.about.memories[0].name;
  const path = `/v1/nearest/documents/${encodeURIComponent(memory)}`;
  const { documents } = await get(path);
  const some = [0.2, 0.5, 0.8].map((share) => documents[Math.floor(share * documents.length)]);
  const texts = await Promise.all([...new Set(some)].map((one) => get(`${path}?id=${encodeURIComponent(one.id)}`)));
  const beginnings = texts.map((one) => beginning(one.text)).filter(Boolean);
  if (!beginnings.length || state.asked !== null) return;
  $("examples").append(...beginnings.map((text) =>
    element("button", { type: "button", onclick: () => { setMode("prompt"); $("input").value = text; ask(); } }, text)));
  $("examples").hidden = false;
}

// The first words of the first line that reads like a sentence.
function beginning(text) {
  const line = text.split("\n").map((one) => one.trim()).find((one) => one.split(" ").length > 6) ?? text.trim();
  return line.split(" ").slice(0, 4).join(" ");
}

// --- the page ---------------------------------------------------------------------------------

function setMode(mode) {
  state.mode = mode;
  document.querySelectorAll("[data-mode]").forEach((one) => one.setAttribute("aria-pressed", String(one.dataset.mode === mode)));
  const words = {
    prompt: ["Prompt", "Type a prompt, and see which documents decide how it goes on …", "Run"],
    chat: ["Message", "Ask something …", "Send"],
    text: ["Text", "Paste a text, and see which words the memory would have expected …", "Read"],
  }[mode];
  $("input-label").textContent = words[0];
  $("input").placeholder = words[1];
  $("run").textContent = words[2];
  $("new-chat").hidden = mode !== "chat" || !state.turns.length;
  $("compare-field").hidden = mode === "text";
}

function ask() {
  const text = $("input").value;
  if (!text.trim()) return $("input").focus();
  state.asked = text;
  if (state.mode === "chat") {
    state.turns.push({ role: "user", content: text });
    $("input").value = "";
  }
  run();
}

function soon(action, wait = 250) {
  let timer;
  return () => { clearTimeout(timer); timer = setTimeout(action, wait); };
}

const rerun = soon(() => {
  if (state.asked === null || !state.answers.length) return;
  if (awaitsAnswer()) run();
});

function startControls() {
  $("form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  $("input").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask(); }
  });
  $("stop").addEventListener("click", () => state.running?.abort());
  $("compare").addEventListener("change", rerun);
  $("method").addEventListener("change", () => { showSettings(); rerun(); });
  for (const name of [...SLIDERS, "temperature", "tokens"]) $(name).addEventListener("input", () => { showNumbers(); rerun(); });
  $("memories").addEventListener("change", (event) => {
    if (!chosenMemories().length) event.target.checked = true;
    rerun();
  });
  document.querySelectorAll("[data-mode]").forEach((one) => one.addEventListener("click", () => {
    state.turns = []; state.asked = null; setMode(one.dataset.mode);
  }));
  $("new-chat").addEventListener("click", () => { state.turns = []; state.answers = []; state.asked = null; $("output").replaceChildren(); $("story").hidden = true; setMode("chat"); });
  $("link").addEventListener("click", async () => {
    history.replaceState(null, "", permalink());
    await navigator.clipboard?.writeText(location.href).catch(() => {});
    $("link").textContent = "Link copied";
    setTimeout(() => { $("link").textContent = "Copy link"; }, 1500);
  });
  $("save-json").addEventListener("click", () => save("answer.json", "application/json", asJson()));
  $("save-html").addEventListener("click", savePage);
  for (const view of ["ask", "library"]) {
    $(`view-${view}`).addEventListener("click", () => {
      for (const other of ["ask", "library"]) {
        $(other).hidden = other !== view;
        $(`view-${other}`).setAttribute("aria-pressed", String(other === view));
      }
      if (view === "library") startLibrary(state.about, actions, refresh);
    });
  }
}

function showServing() {
  const { model, memories } = state.about;
  $("serving").textContent = `${model} · ${memories.map((m) => `${m.name} (${m.documents.toLocaleString("en")} documents, version ${m.version})`).join(" · ")}`;
}

async function refresh() {
  state.about = await get("/v1/nearest");
  showServing();
}

async function start() {
  startControls();
  try {
    await refresh();
  } catch (error) {
    $("serving").textContent = "";
    return report(error);
  }
  const { methods, method, memories, chat } = state.about;
  $("method").replaceChildren(...methods.map((one) => element("option", { value: one }, one === "base" ? "base (the model alone)" : one)));
  $("method").value = method;
  $("memories").append(...memories.map((memory) => element("label", { className: "check" }, element("input", { type: "checkbox", value: memory.name, checked: true }), `${memory.name}`)));
  document.querySelector('[data-mode="chat"]').hidden = !chat;
  setMode(chat ? "chat" : "prompt");
  showSettings();
  if (!fromLink()) showExamples().catch(report);
  window.addEventListener("hashchange", fromLink);
}

start();
