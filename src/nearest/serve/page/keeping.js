// Links that hold all that was asked, and files to keep.

import { element } from "./answer.js";

export function encoded(kept) {
  const bytes = new TextEncoder().encode(JSON.stringify(kept));
  return `#${btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join("")).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "")}`;
}

export function decoded(hash) {
  const binary = atob(hash.slice(1).replaceAll("-", "+").replaceAll("_", "/"));
  return JSON.parse(new TextDecoder().decode(Uint8Array.from(binary, (letter) => letter.charCodeAt(0))));
}

export function save(name, type, content) {
  const link = element("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// The page as it stands, in one file without scripts.
export function savePage() {
  const copy = document.documentElement.cloneNode(true);
  copy.querySelectorAll("button.name").forEach((node) => node.replaceWith(element("b", {}, node.textContent)));
  copy.querySelectorAll("script, link, form, nav, dialog, .skip, #library, #tools, #examples, button").forEach((node) => node.remove());
  save("answer.html", "text/html", `<!doctype html>\n${copy.outerHTML}`);
}
