"use strict";
(() => {
  // What is known of a latent that has no card: packed by cards.py, a byte of density and a bit for dead.
  const known = document.getElementById("latents").dataset;
  const unpack = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const total = document.querySelectorAll(".card").length;
  const unshown = document.getElementById("unshown");
  const describe = (number) => {
    const size = Number(known.dSae);
    if (number >= size) return `There is no latent ${number}: this SAE has the latents 0 to ${size - 1}.`;
    const level = unpack(known.density)[number];
    const share = 100 * 10 ** (Number(known.low) + (level - 1) * Number(known.step));
    const text = share < 0.001 ? share.toExponential(1) : String(Number(share.toPrecision(2)));
    const active = level ? `It is active on about ${text}% of ${known.sample}.` : `It was not active on ${known.sample}.`;
    const dead = unpack(known.dead);
    const isDead = (dead[number >> 3] >> (number & 7)) & 1;
    const state = dead.length ? ` At the end of training it was ${isDead ? "dead" : "alive"}.` : "";
    return `Latent ${number} has no card; ${total} of the ${size} latents have one. ${active}${state}`;
  };
  const named = (text) => (/^#?(latent-)?\d{1,15}$/.test(text) ? Number(text.match(/\d+/)[0]) : null);
  const visit = () => {
    unshown.hidden = true;
    if (!location.hash.startsWith("#latent-")) return null;
    const number = named(location.hash);
    const card = document.getElementById(`latent-${number}`);
    if (card) return card;
    unshown.textContent = number === null ? `There is no latent ${location.hash.slice(8)}.` : describe(number);
    unshown.hidden = false;
    unshown.scrollIntoView({ block: "center" });
    unshown.focus({ preventScroll: true });
    return null;
  };
  const query = document.getElementById("query");
  if (!query) {
    window.addEventListener("hashchange", visit);
    visit();
    return;
  }
  const cards = document.getElementById("cards");
  const sort = document.getElementById("sort");
  const count = document.getElementById("count");
  const empty = document.getElementById("empty");
  const tools = query.form;
  const opened = []; // by the search, to be closed again after it
  tools.hidden = false;

  const fold = (text) => text.toLowerCase().replace(/\s+/g, " ");
  const latents = [...cards.children].map((card) => ({
    card,
    texts: [...card.querySelectorAll(".text, .tokens li")].map((node) => [node, fold(node.textContent)]),
  }));

  // Ranges of a needle in a paragraph, across the spans that it is cut into.
  const ranges = (node, needle) => {
    const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
    const parts = [];
    let text = "";
    while (walker.nextNode()) {
      parts.push([text.length, walker.currentNode]);
      text += walker.currentNode.data;
    }
    const place = (at) => {
      const [from, part] = parts.filter(([start]) => start <= at).at(-1);
      return [part, at - from];
    };
    const found = [];
    const lower = text.toLowerCase();
    if (lower.length !== text.length) return found;
    for (let at = lower.indexOf(needle); at >= 0; at = lower.indexOf(needle, at + needle.length)) {
      const range = new Range();
      const [last, offset] = place(at + needle.length - 1);
      range.setStart(...place(at));
      range.setEnd(last, offset + 1);
      found.push(range);
    }
    return found;
  };

  const filter = () => {
    const needle = fold(query.value.trim());
    const number = needle.replace(/^#/, "");
    const marks = [];
    let shown = 0;
    for (const details of opened.splice(0)) details.open = false;
    for (const { card, texts } of latents) {
      const hits = needle ? texts.filter(([, text]) => text.includes(needle)) : [];
      const byNumber = /^\d+$/.test(number) && card.dataset.index.startsWith(number);
      card.hidden = needle !== "" && !hits.length && !byNumber;
      if (card.hidden) continue;
      shown += 1;
      for (const [node] of hits) {
        marks.push(...ranges(node, needle));
        const details = node.closest("details");
        if (details && !details.open) {
          details.open = true;
          opened.push(details);
        }
      }
    }
    if (window.Highlight && CSS.highlights) CSS.highlights.set("found", new Highlight(...marks));
    count.textContent = needle ? `${shown} of ${total} latents` : `${total} latents`;
    empty.hidden = shown > 0;
    empty.querySelector("q").textContent = query.value.trim();
    const asked = named(needle);
    const about = asked === null || document.getElementById(`latent-${asked}`) ? "" : describe(asked);
    unshown.textContent = about;
    unshown.hidden = about === "";
  };

  const order = () => {
    const key = sort.value;
    const sign = key === "index" ? 1 : -1;
    latents.sort((a, b) => sign * (a.card.dataset[key] - b.card.dataset[key]) || a.card.dataset.index - b.card.dataset.index);
    cards.append(...latents.map(({ card }) => card));
  };

  const clear = () => {
    query.value = "";
    filter();
    query.focus();
  };

  query.addEventListener("input", () => {
    filter();
    // The list may now end above the window.
    if (tools.getBoundingClientRect().top <= 0) cards.scrollIntoView({ behavior: "instant" });
  });
  query.addEventListener("keydown", (event) => event.key === "Escape" && clear());
  sort.addEventListener("change", order);
  tools.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("clear").addEventListener("click", clear);
  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName);
    if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    tools.scrollIntoView({ behavior: "instant" });
    query.focus({ preventScroll: true });
    query.select();
  });
  // A dot on the map leads to its card even while a search hides it; a latent without a card is spoken of.
  const arrive = () => {
    const card = visit();
    if (!card || (!card.hidden && location.hash === `#${card.id}`)) return; // the browser goes there itself
    if (card.hidden) clear();
    card.scrollIntoView();
  };
  window.addEventListener("hashchange", arrive);
  order();
  filter();
  arrive();
})();
