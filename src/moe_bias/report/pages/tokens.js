// What the pages that show tokens share: how text, numbers, experts and shares look, and which token is below another.
// Text goes into a page by textContent alone, so that nothing a model wrote is ever read as HTML.
"use strict";
const Tokens = (() => {
  const EXPERT_COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#d6c400", "#0072b2", "#d55e00", "#cc79a7", "#8c8c8c"];
  const VISIBLE = { " ": "·", "\n": "↵", "\t": "⇥", "\r": "␍" };
  const STEPS = 24;

  const visible = (text) => text.replace(/[ \n\t\r]/g, (letter) => VISIBLE[letter]) || "(empty)";
  const nats = (value) => `${value.toFixed(3)} nats`;
  const percent = (share) => (share > 0 && share < 0.0005 ? "< 0.1%" : `${(100 * share).toFixed(1)}%`);
  const round = (number) => EXPERT_COLOURS[number % EXPERT_COLOURS.length];
  const turn = (number) => ["", "second", "third"][Math.floor(number / EXPERT_COLOURS.length) % 3];

  function element(tag, options = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(options)) {
      if (name === "style") for (const [key, part] of Object.entries(value)) made.style.setProperty(key, part);
      else if (name === "text") made.textContent = value;
      else made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null));
    return made;
  }

  // The text of a token, with a mark for each line that it ends, and those line ends themselves.
  function spelled(span, text) {
    const [, words, ends] = text.match(/^([^]*?)(\n*)$/);
    span.append(words, element("span", { class: "line-end", text: VISIBLE["\n"].repeat(ends.length) }));
    return ends;
  }

  function dot(expert) {
    return element("span", { class: `dot ${turn(expert)}`, style: { "--expert": round(expert) } });
  }

  // Rows of [label, share, colour, whether it is the written one], each with a bar as long as its share.
  function list(heading, rows, fill = "var(--muted)") {
    const grid = element("div", { class: "choices" });
    for (const [label, share, colour, written] of rows) {
      const bar = element("i", { style: { width: `${(100 * share).toFixed(2)}%`, "--fill": colour ?? fill } });
      const name = element("span", { class: written ? "token-text written" : "token-text" }, ...label);
      grid.append(name, element("span", { class: "meter" }, bar), element("span", { class: "number", text: percent(share) }));
    }
    return element("div", {}, element("h4", { text: heading }), grid);
  }

  function facts(rows) {
    const made = element("dl");
    for (const [name, value] of rows) made.append(element("dt", { text: name }), element("dd", { text: value }));
    return made;
  }

  function ramp(end) {
    const steps = Array.from({ length: STEPS }, (_, step) => element("i", { style: { "--level": step / (STEPS - 1) } }));
    return ["0", element("span", { class: "ramp" }, ...steps), end];
  }

  // The token that a key leads to from one of them, or null where the key is none of ours.
  function nextFor(key, spans, number) {
    const last = spans.length - 1;
    if (key === "ArrowRight") return Math.min(number + 1, last);
    if (key === "ArrowLeft") return Math.max(number - 1, 0);
    if (key === "Home") return 0;
    if (key === "End") return last;
    if (key === "ArrowDown") return nearestLine(spans, number, 1);
    if (key === "ArrowUp") return nearestLine(spans, number, -1);
    return null;
  }

  // The token of the next line in this direction that is nearest sideways, within the same column or across to another part.
  function nearestLine(spans, number, direction) {
    const from = spans[number].getClientRects()[0];
    let best = null;
    for (let other = 0; other < spans.length; other += 1) {
      const to = spans[other].getClientRects()[0];
      const down = to ? direction * (to.top - from.top) : 0;
      if (down > from.height / 2) {
        const distance = 4 * down + Math.abs(to.left - from.left);
        if (best === null || distance < best.distance) best = { other, distance };
      }
    }
    return best === null ? number : best.other;
  }

  return { element, visible, nats, percent, round, turn, spelled, dot, list, facts, ramp, nextFor };
})();
