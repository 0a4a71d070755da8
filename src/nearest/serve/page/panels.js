// The side of the page: the chosen token, the documents, copied passages, and a document's text.

import { get } from "./api.js";
import { decided, element, ofText, percent, shown, word } from "./answer.js";

const SHOWN = 6; // documents, before the rest is folded away
const $ = (id) => document.getElementById(id);
const KINDS = { dense: "a similar state", pointers: "following a passage", suffix: "the same words before" };
const probability = (logprob) => (logprob === null ? 0 : Math.exp(logprob));

const bar = (share, memory) =>
  element("div", { className: memory ? "bar memory" : "bar", aria: { hidden: "true" } }, element("i", { style: { "--p": share.toFixed(4) } }));

function fact(name, share, memory) {
  return [element("dt", {}, name), bar(share, memory), element("dd", {}, percent(share))];
}

function candidates(title, list, chosen, memory) {
  const items = list.map((one) =>
    element("li", { className: one.id === chosen ? "chosen" : "" },
      element("code", {}, shown(one.token)), bar(probability(one.logprob), memory),
      element("small", {}, percent(probability(one.logprob)))));
  return element("div", {}, element("h3", {}, title), element("ol", {}, ...items));
}

const tag = (text, strong = false) => element("span", { className: strong ? "tag strong" : "tag" }, text);
const button = (text, onclick) => element("button", { type: "button", className: "small", onclick }, text);

function snippet(source) {
  return element("p", { className: "snippet" }, `…${source.before}`, element("mark", {}, source.value), `${source.after}…`);
}

// What the memory did to one token.
export function showToken(token, actions) {
  const card = $("token-card");
  if (token.logprob === null) {
    card.replaceChildren(element("p", { className: "empty" }, "The first token of a text is not predicted."));
    return;
  }
  const alone = token.base_alternatives[0];
  const verdict = element("p", { className: "verdict" });
  if (alone && alone.id !== token.id) {
    verdict.append("The model alone would have said ", element("b", {}, `“${word(alone.token)}”`), ` (${percent(probability(alone.logprob))}).`);
  } else if (decided(token) > 0) {
    verdict.append("The model alone would have said the same.");
  } else {
    verdict.append(ofText(token) ? "The memory had no part in this token; earlier places of this text had." : "The memory had no part in this token.");
  }
  const sources = token.sources.map((source) =>
    element("li", {},
      element("button", { type: "button", className: "name", onclick: () => actions.open(source) }, source.title),
      snippet(source),
      element("div", { className: "row" },
        tag(`${percent(source.weight)} of the memory's say`, true), tag(KINDS[source.kind] ?? source.kind),
        ...(source.kind === "dense" ? [tag(`distance ${source.distance.toFixed(2)}`)] : []),
        ...(source.match_length ? [tag(`${source.match_length} tokens alike`)] : []),
        ...(source.licence ? [tag(source.licence)] : []))));
  card.replaceChildren(
    element("div", { className: "row" }, element("h2", {}, "Token"), element("span", { className: "token-name" }, word(token.token))),
    verdict,
    element("dl", { className: "facts" },
      ...fact("with memory", probability(token.logprob), true),
      ...fact("model alone", probability(token.base_logprob), false),
      ...fact("decided by memory", decided(token), true),
      ...(token.passage_weight ? fact("… by what it read", token.passage_weight, true) : []),
      ...(ofText(token) ? fact("decided by this text", ofText(token), false) : []),
      ...fact("decided by the model", Math.max(0, 1 - decided(token) - ofText(token)), false)),
    element("div", { className: "pairs" },
      candidates("With memory", token.alternatives, token.id, true),
      candidates("Model alone", token.base_alternatives, token.id, false)),
    ...(sources.length ? [element("h3", {}, "Where it stands"), element("ul", { className: "list" }, ...sources)] : []));
}

// Documents by what they carried of an answer.
export function showDocuments(summary, actions, what) {
  const panel = $("documents");
  const documents = summary?.documents ?? [];
  if (!documents.length) {
    panel.replaceChildren(element("h2", {}, "Documents"), element("p", { className: "empty" }, `No document spoke for this ${what}: it is the model's alone.`));
    return;
  }
  const strongest = Math.max(...documents.map((one) => one.weight));
  const items = documents.map((one, n) => {
    const number = element("span", { className: "number", aria: { hidden: "true" } }, String(n + 1));
    const name = element("button", { type: "button", className: "name", aria: { pressed: "false" } }, one.title);
    name.addEventListener("click", () => {
      const on = name.getAttribute("aria-pressed") !== "true";
      panel.querySelectorAll(".name").forEach((other) => other.setAttribute("aria-pressed", "false"));
      name.setAttribute("aria-pressed", String(on));
      actions.mark(on ? one : null);
    });
    return element("li", { data: { document: one.document, memory: one.memory } },
      element("div", { className: "row heading" }, number, name, element("span", { className: "space" }),
        element("span", { className: "share" }, percent(one.weight), element("span", { className: "sr" }, ` of the ${what}`))),
      bar(one.weight / strongest, true),
      element("div", { className: "row" }, tag(`spoke for ${one.tokens} ${one.tokens === 1 ? "token" : "tokens"}`),
        ...(one.licence ? [tag(one.licence)] : []), element("span", { className: "space" }),
        button("Open", () => actions.open(one)), button("Without it", () => actions.leaveOut(one))));
  });
  panel.replaceChildren(
    element("h2", {}, `Documents (${documents.length})`),
    element("p", { className: "quiet" }, `Each document's share of the ${what}. Choose a name to outline its tokens; “Without it” runs again as if it were not there.`),
    element("ul", { className: "list" }, ...items.slice(0, SHOWN)),
    ...(items.length > SHOWN
      ? [element("details", {}, element("summary", {}, `${items.length - SHOWN} more, which carried little`), element("ul", { className: "list" }, ...items.slice(SHOWN)))]
      : []));
}

export function showVerbatim(summary, actions) {
  const panel = $("verbatim");
  const runs = summary?.verbatim ?? [];
  panel.hidden = !runs.length;
  panel.replaceChildren(
    element("h2", {}, "Copied word for word"),
    element("ul", { className: "list" }, ...runs.map((run) =>
      element("li", {},
        element("button", { type: "button", className: "name", onclick: () => actions.open({ ...run, length: run.tokens }) }, run.title),
        element("p", { className: "snippet" }, element("mark", {}, actions.text(run))),
        element("div", { className: "row" }, tag(`${run.tokens} tokens in a row`, true), tag(run.licence ?? "licence not stated"))))));
}

// What the model read beside the text: under each piece of it, the passages that were found for it.
export function showReads(answer, text, actions) {
  const panel = $("reads");
  panel.hidden = !answer.reads.length;
  const words = ` ${(text.match(WORDS) ?? []).join(" ").toLowerCase()} `;
  panel.replaceChildren(
    element("h2", {}, "Read beside the text"),
    element("p", { className: "quiet" }, "Under each piece of the text, the passages that were found for it, which the model read before it went on. Words that it also has are marked."),
    ...answer.reads.map((read, n) => element("details", { data: { n } },
      element("summary", {}, element("q", {}, read.query.trim())),
      element("ul", { className: "list" }, ...read.passages.map((passage) =>
        element("li", {},
          element("button", { type: "button", className: "name", onclick: () => actions.open(passage) }, passage.title),
          element("p", { className: "snippet" }, ...alike(passage.text, words), ...(passage.after ? [element("b", { className: "sr" }, " goes on: "), element("span", { className: "after" }, ...alike(passage.after, words))] : [])),
          element("div", { className: "row" },
            ...(passage.distance === null ? [] : [tag(`distance ${passage.distance.toFixed(2)}`)]),
            ...(passage.licence ? [tag(passage.licence)] : []))))))));
}

// Open what a token was predicted with.
export function openRead(number) {
  for (const one of document.querySelectorAll("#reads details")) one.open = Number(one.dataset.n) === number;
}

const WORDS = /[\p{L}\p{N}]+/gu;
const ALIKE = 3; // words in a row

// A text, with runs of words marked that stand in another.
function alike(text, words) {
  const found = [...text.matchAll(WORDS)];
  const marked = new Set();
  for (let n = 0; n + ALIKE <= found.length; n++) {
    const run = found.slice(n, n + ALIKE).map((one) => one[0].toLowerCase()).join(" ");
    if (words.includes(` ${run} `)) for (let i = n; i < n + ALIKE; i++) marked.add(i);
  }
  const parts = [];
  let at = 0;
  for (let n = 0; n < found.length; n++) {
    if (!marked.has(n)) continue;
    let last = n;
    while (marked.has(last + 1)) last++;
    const end = found[last].index + found[last][0].length;
    parts.push(text.slice(at, found[n].index), element("mark", {}, text.slice(found[n].index, end)));
    at = end;
    n = last;
  }
  return [...parts, text.slice(at)];
}

// A whole document, at the place where it spoke.
export async function openDocument(place) {
  const path = `/v1/nearest/documents/${encodeURIComponent(place.memory)}?id=${encodeURIComponent(place.document)}`;
  const whole = await get(path);
  $("document-title").textContent = whole.title;
  const about = { memory: `${whole.memory}, version ${whole.version}`, id: whole.id, ...whole.metadata };
  $("document-about").replaceChildren(...Object.entries(about).map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, typeof value === "string" ? value : JSON.stringify(value)))));
  const text = $("document-text");
  if (place.position === undefined) {
    text.replaceChildren(whole.text);
  } else {
    const first = place.length ? place.position : place.position + 1;
    const last = first + (place.length ?? 1);
    const mark = element("mark", {}, whole.pieces.slice(first, last).join(""));
    text.replaceChildren(whole.pieces.slice(0, first).join(""), mark, whole.pieces.slice(last).join(""));
    requestAnimationFrame(() => mark.scrollIntoView({ block: "center" }));
  }
  $("document-cite").onclick = () => navigator.clipboard?.writeText(`${whole.title} (${whole.id}), ${whole.memory}, version ${whole.version}`);
  $("document").showModal();
}

$("document-close").addEventListener("click", () => $("document").close());
