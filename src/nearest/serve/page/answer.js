// One answer on the page: its tokens, which of them is chosen, and what is marked in it.

export function element(tag, properties = {}, ...children) {
  const { style, data, aria, ...rest } = properties;
  const made = Object.assign(document.createElement(tag), rest);
  for (const [name, value] of Object.entries(style ?? {})) made.style.setProperty(name, value);
  for (const [name, value] of Object.entries(data ?? {})) made.dataset[name] = value;
  for (const [name, value] of Object.entries(aria ?? {})) made.setAttribute(name === "role" ? name : `aria-${name}`, value);
  made.append(...children);
  return made;
}

export const percent = (share) => (share > 0 && share < 0.005 ? "<1 %" : `${Math.round(100 * share)} %`);

// Without the space that begins most words' tokens; white space alone as it is.
export const word = (text) => shown(text).trim() || shown(text);

export const shown = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");

const CITED = 3; // tokens of a passage that gets its document's number

// The share of a token's probability that entries of the memory, or passages that were read, gave.
export const decided = (token) => token.memory_weight + token.passage_weight;

// The mean share of tokens that `share` names; 0 of none.
export const mean = (tokens, share) => tokens.reduce((sum, token) => sum + share(token), 0) / Math.max(1, tokens.length);

// The share of a token's probability that earlier places of the text itself gave.
export const ofText = (token) => token.text_weight;

const key = (one) => `${one.memory}\u0000${one.document}`;

export class Answer {
  // `onChoose(answer, token)` is called when a token is chosen.
  constructor(title, onChoose) {
    this.title = title;
    this.onChoose = onChoose;
    this.tokens = [];
    this.reads = []; // what the model read beside the text
    this.summary = null;
    this.text = "";
    this.chosen = -1;
    this.cited = new Map(); // what outlines the passage that ends with a token
    this.name = element("h2", {}, title);
    this.box = element("div", {
      className: "tokens busy",
      tabIndex: 0,
      aria: { role: "listbox", label: `${title}, token by token` },
    });
    this.flow = element("div", { className: "flow" }, this.box);
    this.node = element("article", { className: "answer" }, this.name, this.flow);
    this.box.addEventListener("click", (event) => {
      const node = event.target.closest(".t");
      if (event.target.closest(".cite")) this.cited.get(node)();
      if (node) this.choose(Number(node.dataset.n));
    });
    this.box.addEventListener("keydown", (event) => this.#key(event));
  }

  // The passages that the model had read when it predicted a token.
  passages(token) { return token.read === null ? [] : this.reads[token.read].passages; }

  // The documents that had a part in a token.
  documents(token) {
    return token.passage_weight > 0 ? [...token.sources, ...this.passages(token)] : token.sources;
  }

  context(text) {
    this.flow.prepend(element("span", { className: "prompt" }, text));
  }

  add(told, compared = false) {
    for (const token of told) {
      const n = this.tokens.push(token) - 1;
      this.text += token.text;
      const weight = compared ? difference(token) : decided(token);
      const node = element("span", {
        className: compared && weight < 0 ? "t worse" : "t",
        id: `${this.id}-${n}`,
        style: { "--w": Math.min(1, Math.abs(weight)).toFixed(3) },
        data: { n },
        aria: { role: "option", selected: "false" },
        title: compared ? surprise(token) : shares(decided(token), ofText(token)),
      }, token.text);
      token.node = node;
      this.box.append(node);
    }
  }

  get id() { return (this.given ??= `a${Math.random().toString(36).slice(2, 8)}`); }

  end(summary) {
    this.summary = summary;
    this.box.classList.remove("busy");
    const generated = this.tokens.filter((t) => !t.prompt);
    for (const run of summary?.verbatim ?? []) {
      for (const token of generated.slice(run.first_token, run.first_token + run.tokens)) token.node.classList.add("copied");
    }
    for (const span of (summary?.spans ?? []).filter((one) => one.tokens >= CITED)) {
      const number = summary.documents.findIndex((one) => key(one) === key(span)) + 1;
      let last = span.first_token + span.tokens - 1;
      while (/^\p{L}/u.test(generated[last + 1]?.text ?? "")) last++; // to the end of the word
      this.#cite(generated[last], number, span, generated.slice(span.first_token, last + 1));
    }
    if (generated.length) {
      const [memory, text] = [mean(generated, decided), mean(generated, ofText)];
      this.name.append(element("span", { className: "tag" }, `${generated.length} tokens`));
      if (summary && summary.method !== "base") {
        this.name.append(element("span", { className: "tag strong" }, memory || text ? shares(memory, text) : "the model alone: no memory was used"));
      }
    }
  }

  // The number of a passage's document, behind its last token: a click there, or Enter, outlines it.
  #cite(token, number, span, tokens) {
    const { node } = token;
    node.append(element("span", { className: "cite", title: span.title, data: { number } }));
    node.setAttribute("aria-label", `${word(token.text)}, end of a passage of document ${number}, ${span.title}; Enter outlines it`);
    this.cited.set(node, () => {
      const on = !node.classList.contains("cited");
      this.mark(null);
      node.classList.toggle("cited", on);
      for (const one of tokens) one.node.classList.toggle("of", on);
    });
  }

  choose(n, scroll = true) {
    if (!this.tokens.length) return;
    n = Math.max(0, Math.min(this.tokens.length - 1, n));
    this.tokens[this.chosen]?.node.setAttribute("aria-selected", "false");
    this.chosen = n;
    const { node } = this.tokens[n];
    node.setAttribute("aria-selected", "true");
    this.box.setAttribute("aria-activedescendant", node.id);
    if (scroll) node.scrollIntoView({ block: "nearest" });
    this.onChoose(this, this.tokens[n]);
  }

  // The token that says most about the memory: a word that it decided against the model.
  get telling() {
    const worth = this.tokens.map((token) => {
      if (token.prompt) return 0;
      const other = token.base_alternatives[0]?.id !== token.id ? 1 : 0.3;
      return decided(token) * other * (/\p{L}{3}/u.test(token.text) ? 1 : 0.3);
    });
    const most = Math.max(0, ...worth);
    return most ? worth.indexOf(most) : -1;
  }

  release() {
    this.tokens[this.chosen]?.node.setAttribute("aria-selected", "false");
    this.chosen = -1;
    this.box.removeAttribute("aria-activedescendant");
  }

  // Outline the tokens that a document spoke for.
  mark(document) {
    for (const token of this.tokens) {
      token.node.classList.toggle("of", Boolean(document) && this.documents(token).some((s) => key(s) === key(document)));
      token.node.classList.remove("cited");
    }
  }

  // Underline the tokens that differ from another answer's, unless most of them do.
  compare(other) {
    const same = common(this.tokens.map((t) => t.id), other.tokens.map((t) => t.id));
    const few = same.size > 0.4 * this.tokens.length;
    this.tokens.forEach((token, n) => token.node.classList.toggle("changed", few && !same.has(n)));
    return this.tokens.length - same.size;
  }

  #key(event) {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    let to = null;
    if (event.key in steps) to = this.chosen < 0 ? 0 : this.chosen + steps[event.key];
    if (event.key === "Home") to = 0;
    const outline = this.cited.get(this.tokens[this.chosen]?.node);
    if (event.key === "Enter" && outline) { event.preventDefault(); outline(); }
    if (event.key === "End") to = this.tokens.length - 1;
    if (to === null) return;
    event.preventDefault();
    this.choose(to);
  }
}

// What the memory gave, and earlier places of the text itself where they gave something.
const shares = (memory, text) => `memory ${percent(memory)}${text ? `, this text ${percent(text)}` : ""}`;

// How much better (or worse, below 0) the memory predicted a token, −1 to 1: ±1 is ±3 nats.
export function difference(token) {
  if (token.logprob === null) return 0;
  return Math.max(-1, Math.min(1, (token.logprob - token.base_logprob) / 3));
}

function surprise(token) {
  if (token.logprob === null) return "not predicted";
  const bits = (p) => (-p / Math.LN2).toFixed(1);
  return `${bits(token.base_logprob)} bits alone, ${bits(token.logprob)} with memory`;
}

// The positions in `a` of a longest common subsequence with `b`.
function common(a, b) {
  const table = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      table[i][j] = a[i] === b[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
    }
  }
  const same = new Set();
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) { same.add(i++); j++; } else if (table[i + 1][j] >= table[i][j + 1]) i++; else j++;
  }
  return same;
}
