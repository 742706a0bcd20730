// The token inspector: builds itself from the JSON in each .inspector. Text goes into the page by textContent alone,
// so that nothing a model wrote is ever read as HTML.
"use strict";
(() => {
  const MODES = { entropy: "base entropy", bias: "|bias|", expert: "expert", flip: "flips" };
  const { element, visible, nats, percent, round, turn, spelled, dot, list, facts, ramp, nextFor } = Tokens;

  const largest = (tokens, key) => Math.max(...tokens.map((token) => token[key]), 1e-9);

  class Inspector {
    constructor(root) {
      this.root = root;
      this.data = JSON.parse(root.querySelector("script").textContent);
      this.tokens = [];
      this.pinned = false;
      const shown = this.data.parts.flatMap((part) => part.tokens);
      this.limits = { entropy: largest(shown, "entropy"), bias: largest(shown, "bias") };
      this.panel = element("aside", { class: "panel", "aria-label": "Details of a token", "aria-live": "polite" });
      this.legend = element("div", { class: "legend" });
      const reading = element("div", { class: "reading" }, this.controls(), this.answers());
      root.append(reading, this.panel, this.numbers());
      this.colourBy("entropy");
      this.listen(reading);
      if (this.tokens.length) this.choose(this.firstToShow());
    }

    firstToShow() {
      return Math.max(this.tokens.findIndex(({ token }) => token.fork), 0);
    }

    controls() {
      const modes = element("fieldset", { class: "modes" }, element("legend", { text: "Colour by" }));
      for (const [mode, label] of Object.entries(MODES)) {
        const input = element("input", { type: "radio", name: `mode-${this.root.id}`, value: mode });
        input.checked = mode === "entropy";
        input.addEventListener("change", () => this.colourBy(mode));
        modes.append(element("label", {}, input, label));
      }
      return element("div", { class: "controls" }, modes, this.legend);
    }

    answers() {
      const answers = element("div", { class: "answers" });
      for (const part of this.data.parts) {
        const tokens = element("div", { class: "tokens", role: "group", "aria-label": part.title });
        part.tokens.forEach((token, index) => tokens.append(...this.span(token, part, index)));
        const shape = part.shared ? "answer shared" : "answer";
        answers.append(element("section", { class: shape }, element("h3", { text: part.title }), tokens));
      }
      return answers;
    }

    span(token, part, index) {
      const expert = token.experts.length ? token.experts[0][0] : 0;
      const label = `${visible(token.text)}, entropy ${nats(token.entropy)}${token.flip ? ", flipped" : ""}`;
      const span = element("span", {
        class: ["token", turn(expert)].filter(Boolean).join(" "),
        tabindex: this.tokens.length ? "-1" : "0",
        "data-token": this.tokens.length,
        "data-expert": expert,
        "aria-label": label,
        role: "button",
        style: { "--expert": round(expert) },
      });
      span.classList.toggle("fork", token.fork);
      span.classList.toggle("flip", token.flip);
      span.classList.toggle("first-difference", index === 0 && !part.shared && part.start > 0);
      const before = this.tokens.at(-1)?.token.experts[0]?.[0];
      span.classList.toggle("as-before", index > 0 && before === expert);
      const ends = spelled(span, token.text);
      this.tokens.push({ token, span, part, position: part.start + index });
      return [span, ends];
    }

    colourBy(mode) {
      this.root.dataset.mode = mode;
      for (const { token, span } of this.tokens) {
        const limit = this.limits[mode];
        span.style.setProperty("--level", limit ? (token[mode] / limit).toFixed(3) : 0);
      }
      this.legend.replaceChildren(...this.legendOf(mode));
    }

    legendOf(mode) {
      if (mode === "expert") return this.expertLegend();
      if (mode === "flip") {
        const flips = this.tokens.filter(({ token }) => token.flip).length;
        return [
          element("span", { class: "flip-key", text: "flip" }),
          `the likeliest token is another one: ${flips} of ${this.tokens.length} tokens`,
        ];
      }
      const note = mode === "entropy"
        ? `underlined: from ${nats(this.data.threshold)}, the top ${+(100 * this.data.rho).toFixed(1)}% of these tokens`
        : "largest |bias| on a token of the support";
      return [...ramp(nats(this.limits[mode])), element("span", { text: note })];
    }

    expertLegend() {
      const counts = new Map();
      for (const { token } of this.tokens) {
        if (token.experts.length) counts.set(token.experts[0][0], (counts.get(token.experts[0][0]) ?? 0) + 1);
      }
      const sorted = [...counts].sort((one, other) => one[0] - other[0]);
      return sorted.map(([expert, count]) => element(
        "span", { class: "chip" }, dot(expert), `${expert}: ${percent(count / this.tokens.length)}`,
      ));
    }

    choose(number) {
      const before = this.tokens[this.chosen];
      if (before) {
        before.span.classList.remove("chosen");
        before.span.tabIndex = -1;
      }
      this.chosen = number;
      const { span } = this.tokens[number];
      span.classList.add("chosen");
      span.tabIndex = 0;
      this.panel.replaceChildren(...this.details(this.tokens[number]));
    }

    details({ token, position }) {
      const experts = token.experts.map(([expert, share]) => [[dot(expert), `expert ${expert}`], share, round(expert), false]);
      const choices = (rows) => rows.map(([text, share]) => [[visible(text)], share, null, text === token.text]);
      return [
        element("h3", { class: "token-text", text: visible(token.text) }),
        element("div", { class: "muted", text: `token ${position + 1}, id ${token.id}; entropies and KL in nats` }),
        this.facts(token),
        element("div", { class: "lists" },
          list("Base model", choices(token.base)),
          list("With the adapter", choices(token.adapted), "var(--accent)"),
          list("Routed to", experts)),
        element("p", { class: "keys" }, element("kbd", { text: "←" }), " ", element("kbd", { text: "→" }),
          " next token, ", element("kbd", { text: "↑" }), " ", element("kbd", { text: "↓" }), " next line, ",
          element("kbd", { text: "Enter" }), this.pinned ? " lets go" : " holds it"),
      ];
    }

    facts(token) {
      return facts([
        ["base entropy", token.entropy.toFixed(3)],
        ["adapted entropy", token.adapted_entropy.toFixed(3)],
        ["gate w", token.weight.toFixed(3)],
        ["largest |bias|", token.bias.toFixed(3)],
        ["KL to the base", token.kl.toFixed(3)],
        ["flip", token.flip ? "yes" : "no"],
      ]);
    }

    listen(reading) {
      const numberOf = (event) => {
        const span = event.target.closest(".token");
        return span ? Number(span.dataset.token) : null;
      };
      reading.addEventListener("mouseover", (event) => {
        const number = numberOf(event);
        if (number !== null && !this.pinned) this.choose(number);
      });
      reading.addEventListener("focusin", (event) => {
        const number = numberOf(event);
        if (number !== null && number !== this.chosen) this.choose(number);
      });
      reading.addEventListener("click", (event) => {
        const number = numberOf(event);
        if (number !== null) this.pin(number, !(this.pinned && number === this.chosen));
      });
      reading.addEventListener("keydown", (event) => {
        const number = numberOf(event);
        if (number !== null && this.press(event.key, number)) event.preventDefault();
      });
    }

    pin(number, held) {
      this.pinned = held;
      this.choose(number);
    }

    press(key, number) {
      if (key === "Enter" || key === " ") this.pin(number, !this.pinned);
      else if (key === "Escape") this.pin(number, false);
      else {
        const next = nextFor(key, this.tokens.map(({ span }) => span), number);
        if (next === null) return false;
        this.tokens[next].span.focus();
      }
      return true;
    }

    numbers() {
      const body = element("div", { class: "wide" });
      const details = element("details", { class: "numbers" }, element("summary", { text: "All numbers as a table" }), body);
      details.addEventListener("toggle", () => { if (!body.childElementCount) body.append(this.table()); });
      return details;
    }

    table() {
      const headings = ["", "token", "id", "base entropy", "adapted entropy", "gate w", "|bias|", "KL", "experts", "base's likeliest", "adapter's likeliest"];
      const head = element("tr", {}, ...headings.map((text) => element("th", { text, scope: "col" })));
      const rows = this.tokens.map(({ token, position, part }) => {
        const likeliest = (rows) => (rows.length ? `${visible(rows[0][0])} ${percent(rows[0][1])}` : "");
        const experts = token.experts.map(([expert, share]) => `${expert} (${percent(share)})`).join(", ");
        const cells = [`${part.name} ${position + 1}`, visible(token.text), token.id, token.entropy.toFixed(3), token.adapted_entropy.toFixed(3),
          token.weight.toFixed(3), token.bias.toFixed(3), token.kl.toFixed(3), experts, likeliest(token.base), likeliest(token.adapted)];
        return element("tr", {}, ...cells.map((text) => element("td", { text: String(text) })));
      });
      return element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
    }
  }

  document.querySelectorAll(".inspector").forEach((root) => new Inspector(root));
})();
