// One answer on the chat page: its tokens as they come, what may be done with it, and what came of that.
"use strict";
const Answers = (() => {
  const { element, visible, nats, round, turn, spelled, dot, list, facts } = Tokens;

  // The expert with the largest share, of whichever adapter is first.
  const firstExpert = (token) => token.adapters[0]?.experts[0]?.[0];

  class Answer {
    // `column` is "base" or "adapted"; `strengths` are those that it began with, by adapter.
    constructor(column, adapters, page) {
      this.column = column;
      this.adapters = adapters;
      this.page = page;
      this.id = null;
      this.text = "";
      this.ids = [];
      this.tokens = [];
      this.begun = performance.now();
      this.isRunning = true;
      const name = column === "base" ? "base" : adapters.join(" + ");
      this.body = element("div", { class: "tokens", role: "group", "aria-label": `Answer of ${name}` });
      this.foot = element("p", { class: "foot muted" });
      this.actions = element("div", { class: "actions" });
      this.news = element("p", { class: "news", role: "status" });
      this.root = element("section", { class: `answer ${column}`, "aria-busy": "true" },
        element("h3", { text: name }), this.body, this.foot, this.actions, this.news);
    }

    add(chunk) {
      this.id = chunk.id;
      if (chunk.usage) this.usage = chunk.usage;
      const choice = chunk.choices[0];
      if (!choice) return;
      const text = choice.delta.content ?? "";
      this.text += text;
      if (chunk.moe_bias) this.addToken({ text, ...chunk.moe_bias });
      else if (text) this.body.append(text);
      if (choice.finish_reason) this.reason = choice.finish_reason;
    }

    addToken(token) {
      this.ids.push(token.id);
      if (token.text === "") return; // a part of a letter; the token that completes it shows it
      const first = firstExpert(token), expert = first ?? 0;
      const span = element("span", {
        class: ["token", turn(expert)].filter(Boolean).join(" "),
        tabindex: "-1",
        role: "button",
        "data-expert": expert,
        "aria-label": `${visible(token.text)}, entropy ${nats(token.entropy)}${token.flip ? ", flipped" : ""}`,
        style: { "--expert": round(expert) },
      });
      span.classList.toggle("flip", token.flip);
      span.classList.toggle("of-none", first === undefined);
      span.classList.toggle("as-before", this.tokens.length > 0 && firstExpert(this.tokens.at(-1).token) === first);
      const ends = spelled(span, token.text);
      this.tokens.push({ token, span, answer: this, place: this.ids.length - 1 });
      this.body.append(span, ends);
      if (this.tokens.length === 1) this.stopAt(span);
    }

    // The token that the tab key comes to; the arrow keys go on from it.
    stopAt(span) {
      if (this.stop) this.stop.tabIndex = -1;
      this.stop = span;
      span.tabIndex = 0;
    }

    // Marks the first token that is another one than the other answer's.
    compare(other) {
      const place = this.ids.findIndex((id, index) => index < other.ids.length && other.ids[index] !== id);
      for (const each of this.tokens) each.span.classList.toggle("first-difference", each.place === place);
    }

    end() {
      this.isRunning = false;
      this.root.setAttribute("aria-busy", "false");
      const seconds = (performance.now() - this.begun) / 1000;
      const parts = [];
      if (this.usage) {
        const { completion_tokens: written, prompt_tokens: prompt, prompt_tokens_details: details } = this.usage;
        parts.push(`${written} ${written === 1 ? "token" : "tokens"} in ${seconds.toFixed(1)} s`);
        parts.push(`${details.cached_tokens} of ${prompt} prompt tokens were there already`);
      }
      if (this.reason === "length") parts.push("cut at the limit");
      if (!this.reason) parts.push("stopped");
      this.foot.textContent = parts.join("; ");
      this.page.offer(this);
    }

    fail(sentence) {
      this.isRunning = false;
      this.root.setAttribute("aria-busy", "false");
      this.root.classList.add("failed");
      this.foot.textContent = sentence;
    }

    // The answer's text as a field to change, and what is done with the changed one.
    edit(learn) {
      const field = element("textarea", { class: "edited", "aria-label": "The answer as it should have been" });
      field.value = this.text;
      const done = () => {
        form.replaceWith(this.body);
        this.actions.hidden = false;
      };
      const cancel = element("button", { type: "button", class: "quiet", text: "Cancel" });
      cancel.addEventListener("click", () => { done(); this.actions.querySelector("button")?.focus(); });
      const form = element("form", { class: "editing" }, field, element("button", { type: "submit", text: "Learn from this" }), cancel);
      form.addEventListener("submit", (event) => { event.preventDefault(); done(); learn(field.value); });
      form.addEventListener("keydown", (event) => { if (event.key === "Escape") cancel.click(); });
      this.body.replaceWith(form);
      this.actions.hidden = true;
      field.style.setProperty("height", `${field.scrollHeight + 2}px`);
      field.focus();
    }
  }

  // What the panel shows of a token.
  function details({ token, place }) {
    const choices = (rows) => rows.map(([text, share]) => [[visible(text)], share, null, text === token.text]);
    const experts = (adapter) => adapter.experts.map(([expert, share]) => [[dot(expert), `expert ${expert}`], share, round(expert), false]);
    const rows = [["base entropy", token.entropy.toFixed(3)]];
    if (token.adapters.length) {
      rows.push(["adapted entropy", token.adapted_entropy.toFixed(3)], ["largest move", token.move.toFixed(3)],
        ["KL to the base", token.kl.toFixed(3)], ["flip", token.flip ? "yes" : "no"]);
    }
    const several = token.adapters.length > 1;
    for (const { name, strength, weight } of token.adapters) {
      const whose = several ? ` of ${name}` : "";
      rows.push([`strength${whose}`, strength.toFixed(2)], [`gate w${whose}`, weight.toFixed(3)]);
    }
    const lists = [list("Base model", choices(token.base))];
    if (token.adapters.length) lists.push(list("With the adapter", choices(token.adapted), "var(--accent)"));
    for (const adapter of token.adapters) lists.push(list(several ? `Routed to by ${adapter.name}` : "Routed to", experts(adapter)));
    return [
      element("h3", { class: "token-text", text: visible(token.text) }),
      element("div", { class: "muted", text: `token ${place + 1}, id ${token.id}; entropies and KL in nats` }),
      facts(rows),
      element("div", { class: "lists" }, ...lists),
    ];
  }

  // What is said of a piece of feedback; numbers that it does not have are left out.
  function learned(result) {
    if (!result.applied) return `Not learned: ${result.reason || "nothing would have changed"}.`;
    const parts = [
      result.milliseconds == null ? "Learned" : `Learned in ${result.milliseconds.toFixed(0)} ms`,
      result.kl_step == null ? null : `moved ${nats(result.kl_step)}`,
      result.kl_base == null ? null : `now ${nats(result.kl_base)} from the base`,
      result.published ? `published as version ${result.version}` : `not published${result.reason ? `: ${result.reason}` : ""}`,
    ];
    return `${parts.filter(Boolean).join("; ")}.`;
  }

  return { Answer, details, firstExpert, learned };
})();
