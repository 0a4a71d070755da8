// The documents of the memories: a list, and adding and removing where the server allows it.

import { get, send } from "./api.js";
import { element } from "./answer.js";

const $ = (id) => document.getElementById(id);
let start = 0;
let ready = false;

export async function startLibrary(about, actions, refresh) {
  const select = $("library-memory");
  if (!ready) {
    ready = true;
    select.replaceChildren(...about.memories.map((memory) => element("option", { value: memory.name }, memory.name)));
    select.addEventListener("change", () => { start = 0; list(about, actions, refresh); });
    $("earlier").addEventListener("click", () => { start = Math.max(0, start - 100); list(about, actions, refresh); });
    $("later").addEventListener("click", () => { start += 100; list(about, actions, refresh); });
    $("add").hidden = !about.writable;
    $("add").addEventListener("submit", async (event) => {
      event.preventDefault();
      const told = ["title", "url", "licence"].map((name) => [name, $(`add-${name}`).value.trim()]);
      const metadata = Object.fromEntries(told.filter(([, value]) => value));
      const body = { documents: [{ id: $("add-id").value, text: $("add-text").value, metadata }] };
      if (await changed("POST", `/v1/nearest/documents/${encodeURIComponent(select.value)}`, body)) {
        event.target.reset();
        await refresh();
        list(about, actions, refresh);
      }
    });
  }
  list(about, actions, refresh);
}

// Whether it went well; else the page says why not.
async function tried(action) {
  $("library-problem").hidden = true;
  try {
    await action();
    return true;
  } catch (error) {
    $("library-problem").textContent = error.message;
    $("library-problem").hidden = false;
    return false;
  }
}

const changed = (method, path, body) => tried(() => send(method, path, body));

const list = (...shown) => tried(() => show(...shown));

async function show(about, actions, refresh) {
  const name = $("library-memory").value;
  const path = `/v1/nearest/documents/${encodeURIComponent(name)}`;
  const page = await get(`${path}?start=${start}`);
  $("library-count").textContent = page.total ? `${start + 1}–${start + page.documents.length} of ${page.total.toLocaleString("en")}, version ${page.version}` : "no documents: the memory is empty";
  $("earlier").disabled = start === 0;
  $("later").disabled = start + page.documents.length >= page.total;
  $("library-list").replaceChildren(...page.documents.map((one) => {
    const row = element("div", { className: "row" },
      element("button", { type: "button", className: "name", onclick: () => actions.open({ memory: name, document: one.id }) }, one.title),
      element("span", { className: "tag" }, one.id), element("span", { className: "tag" }, `${one.characters.toLocaleString("en")} characters`),
      element("span", { className: "space" }));
    if (about.writable) {
      const remove = element("button", { type: "button", className: "small", aria: { label: `Remove ${one.title}` } }, "Remove");
      remove.addEventListener("click", async () => {
        if (remove.textContent === "Remove") { remove.textContent = "Really remove?"; return; }
        if (await changed("DELETE", `${path}?id=${encodeURIComponent(one.id)}`)) { await refresh(); list(about, actions, refresh); }
      });
      row.append(remove);
    }
    return element("li", {}, row);
  }));
}
