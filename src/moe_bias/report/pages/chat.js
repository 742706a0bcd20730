// The chat page: what is said, to which adapters at which strengths, and how the answers are shown.
"use strict";
(() => {
  const { element, nats, percent, dot, ramp, nextFor } = Tokens;
  const { Answer, details, firstExpert, learned } = Answers;
  const COLOURS = { entropy: "entropy", bias: "move", expert: "expert", flip: "flips", none: "none" };
  const SHOW = { both: "both", adapted: "adapted", base: "base" };
  const HOTTEST = { entropy: "entropy", bias: "move" };
  const find = (selector) => document.querySelector(selector);
  const number = (selector) => find(selector).value === "" ? null : Number(find(selector).value);

  class Page {
    constructor() {
      this.root = find(".chat");
      this.model = JSON.parse(find(".settings-data").textContent).model;
      this.turns = [];
      this.mixed = new Map();
      this.mode = "entropy";
      this.learns = new Set();
      this.chosen = null;
      this.pinned = false;
      this.choices(find(".colours"), "colour", COLOURS, (mode) => this.colourBy(mode));
      this.choices(find(".show"), "show", SHOW, () => this.showColumns());
      find(".settings").open = matchMedia("(min-width: 60.01rem)").matches;
      this.listen();
      this.showColumns();
      this.readAdapters();
      find("#message").focus();
    }

    choices(fieldset, name, labels, changed) {
      Object.entries(labels).forEach(([value, label], place) => {
        const input = element("input", { type: "radio", name, value });
        input.checked = place === 0;
        input.addEventListener("change", () => changed(value));
        fieldset.append(element("label", {}, input, label));
      });
    }

    // --- adapters and their strengths

    async readAdapters() {
      try {
        const { learning, keyed, adapters } = await Server.json("/v1/adapters");
        find(".keyed").hidden = !keyed;
        this.learns = new Set(learning ? adapters.filter((adapter) => adapter.learns ?? true).map(({ name }) => name) : []);
        this.mix(adapters.map(({ name }) => name));
      } catch (error) {
        this.say(`The adapters could not be read: ${error.message}`);
      }
    }

    mix(names) {
      for (const name of this.mixed.keys()) if (!names.includes(name)) this.drop(name);
      find(".mixer .none")?.remove();
      if (!names.length) find(".mixer").append(element("p", { class: "muted none", text: "This server has none." }));
      for (const name of names) if (!this.mixed.has(name)) this.mixRow(name, this.mixed.size === 0);
      this.showColumns();
    }

    drop(name) {
      this.mixed.get(name).row.remove();
      this.mixed.delete(name);
    }

    mixRow(name, isOn) {
      const on = element("input", { type: "checkbox" });
      on.checked = isOn;
      const slider = element("input", { type: "range", min: "-1", max: "3", step: "0.05", value: "1", "aria-label": `Strength of ${name}` });
      const shown = element("output", { text: "own", title: "the adapter's own strength" });
      const row = element("div", { class: "mix" }, element("label", { title: name }, on, element("span", { text: name })), slider, shown);
      const mixed = { row, on, slider, strength: null, shown };
      on.addEventListener("change", () => this.showColumns());
      slider.addEventListener("input", () => {
        mixed.strength = Number(slider.value);
        shown.textContent = mixed.strength.toFixed(2);
        on.checked = true;
        this.showColumns();
        this.restrengthen(name, mixed.strength);
      });
      this.mixed.set(name, mixed);
      find(".mixer").append(row);
    }

    chosenAdapters() {
      return [...this.mixed].filter(([, { on }]) => on.checked).map(([name]) => name);
    }

    // What a request asks for: a name alone is at its own strength, and so are several that no slider was moved of.
    asked(names) {
      if (names.every((name) => this.mixed.get(name).strength === null)) return names.length === 1 ? names[0] : names.join("+");
      return Object.fromEntries(names.map((name) => [name, this.mixed.get(name).strength ?? Number(this.mixed.get(name).slider.value)]));
    }

    // Answers that are being written take the strength from their next token on.
    restrengthen(adapter, strength) {
      for (const answer of this.running()) {
        if (!answer.id || !answer.adapters.includes(adapter)) continue;
        Server.json("/chat/strength", { id: answer.id, adapter, strength }).catch(() => {}); // it ended meanwhile
      }
    }

    // --- columns

    columns() {
      const show = find("input[name=show]:checked").value;
      const wanted = show === "both" ? ["base", "adapted"] : [show];
      const there = this.chosenAdapters().length ? wanted : wanted.filter((column) => column === "base");
      return there.length ? there : ["base"];
    }

    showColumns() {
      const shown = this.columns();
      for (const { answers, root } of this.turns) {
        const some = shown.filter((column) => answers[column]);
        for (const [column, answer] of Object.entries(answers)) answer.root.hidden = some.length > 0 && !some.includes(column);
        root.classList.toggle("single", Object.values(answers).filter((answer) => !answer.root.hidden).length < 2);
      }
    }

    // --- asking

    running() {
      return this.turns.flatMap(({ answers }) => Object.values(answers)).filter((answer) => answer.isRunning);
    }

    send() {
      const text = find("#message").value.trim();
      if (!text || this.running().length) return;
      find("#message").value = "";
      this.fitMessage();
      find(".empty")?.remove();
      const root = element("article", { class: "turn" }, element("p", { class: "said", text }));
      this.turns.push({ said: text, answers: {}, root });
      find(".talk").append(root);
      this.answer(this.turns.at(-1));
    }

    again() {
      const turn = this.turns.at(-1);
      if (!turn || this.running().length) return;
      this.pin(null, false);
      turn.root.querySelector(".answers").remove();
      turn.before = turn.answers.adapted ?? turn.before;
      turn.answers = {};
      this.answer(turn);
    }

    async answer(turn) {
      find(".again")?.remove();
      const adapters = this.chosenAdapters();
      const seed = number(".seed") ?? Math.floor(Math.random() * 2 ** 31);
      for (const column of this.columns()) turn.answers[column] = new Answer(column, column === "base" ? [] : adapters, this);
      if (turn.answers.adapted && turn.before?.adapters.join() === adapters.join()) turn.answers.adapted.before = turn.before;
      turn.root.append(element("div", { class: "answers" }, ...Object.values(turn.answers).map(({ root }) => root)));
      this.showColumns();
      this.stopping = new AbortController();
      this.busy(true);
      this.follow(true);
      await Promise.all(Object.values(turn.answers).map((answer) => this.write(turn, answer, seed)));
      this.busy(false);
      const again = element("button", { class: "quiet again", type: "button", text: "Ask again" });
      again.addEventListener("click", () => this.again());
      turn.root.append(again);
      this.follow();
    }

    async write(turn, answer, seed) {
      const body = {
        model: this.model,
        messages: this.messages(turn, answer.column),
        temperature: number(".temperature") ?? 1,
        max_tokens: number(".limit") ?? 256,
        seed,
        moe_bias_numbers: true,
      };
      if (answer.adapters.length) body.moe_bias = this.asked(answer.adapters);
      try {
        for await (const chunk of Server.chunks(body, this.stopping.signal)) {
          answer.add(chunk);
          this.shown(turn, answer);
        }
        answer.end();
      } catch (error) {
        if (error.name === "AbortError") answer.end();
        else answer.fail(error.message);
      }
    }

    // A column goes on from its own answers, and where it had none from the other's.
    messages(turn, column) {
      const messages = [];
      for (const { said, answers } of this.turns) {
        messages.push({ role: "user", content: said });
        if (said === turn.said && answers === turn.answers) break;
        const answer = answers[column] ?? Object.values(answers)[0];
        messages.push({ role: "assistant", content: answer.edited ?? answer.text });
      }
      return messages;
    }

    shown(turn, answer) {
      const last = answer.tokens.at(-1);
      if (last) {
        this.colour(last);
        this.ownStrengths(last.token);
      }
      const { base, adapted } = turn.answers;
      if (base && adapted) for (const [one, other] of [[base, adapted], [adapted, base]]) one.compare(other);
      this.follow();
    }

    // Where no slider was moved the first token tells the adapter's own strength.
    ownStrengths(token) {
      for (const { name, strength } of token.adapters) {
        const mixed = this.mixed.get(name);
        if (mixed && mixed.strength === null) {
          mixed.slider.value = strength;
          mixed.shown.textContent = strength.toFixed(2);
        }
      }
    }

    busy(isBusy) {
      find(".send").hidden = isBusy;
      find(".stop").hidden = !isBusy;
      this.say(isBusy ? "Answering." : "Done.");
    }

    say(sentence) {
      find(".status").textContent = sentence;
    }

    // Keeps the end in sight, unless the reader has gone up.
    follow(always = false) {
      const height = document.documentElement.scrollHeight;
      if (always || this.atEnd) window.scrollTo({ top: height });
    }

    startAnew() {
      this.stopping?.abort();
      this.turns = [];
      find(".talk").replaceChildren();
      this.pin(null, false);
      this.say("");
      find("#message").focus();
    }

    // --- colours

    allTokens() {
      return this.turns.flatMap(({ answers }) => Object.values(answers)).flatMap((answer) => answer.tokens);
    }

    colourBy(mode) {
      this.mode = mode;
      this.root.dataset.mode = mode;
      this.colourAll();
    }

    colourAll() {
      const key = HOTTEST[this.mode];
      const tokens = this.allTokens();
      this.hottest = key ? Math.max(...tokens.map(({ token }) => token[key]), 1e-9) : 0;
      for (const { token, span } of tokens) if (key) span.style.setProperty("--level", (token[key] / this.hottest).toFixed(3));
      this.legend(tokens);
    }

    // A new token; all of them where it is the hottest so far, which the others are measured by.
    colour({ token, span }) {
      const key = HOTTEST[this.mode];
      if (!key || token[key] > this.hottest || !this.hottest) this.colourAll();
      else span.style.setProperty("--level", (token[key] / this.hottest).toFixed(3));
    }

    legend(tokens) {
      const legend = find(".legend");
      if (!tokens.length || this.mode === "none") legend.replaceChildren();
      else if (this.mode === "flip") {
        const flips = tokens.filter(({ token }) => token.flip).length;
        legend.replaceChildren(element("span", { class: "flip-key", text: "flip" }), `another token is the likeliest: ${flips} of ${tokens.length}`);
      } else if (this.mode === "expert") legend.replaceChildren(...this.expertLegend(tokens));
      else {
        const note = this.mode === "entropy" ? "entropy of the plain model" : "largest change of a logit";
        const end = this.mode === "entropy" ? nats(this.hottest) : this.hottest.toFixed(2);
        legend.replaceChildren(...ramp(end), element("span", { text: note }));
      }
    }

    expertLegend(tokens) {
      const counts = new Map();
      for (const { token } of tokens) {
        const expert = firstExpert(token);
        if (expert !== undefined) counts.set(expert, (counts.get(expert) ?? 0) + 1);
      }
      const total = [...counts.values()].reduce((sum, count) => sum + count, 0);
      const sorted = [...counts].sort((one, other) => one[0] - other[0]);
      return sorted.map(([expert, count]) => element("span", { class: "chip" }, dot(expert), `${expert}: ${percent(count / total)}`));
    }

    // --- one token in the panel

    choose(chosen) {
      this.chosen?.span.classList.remove("chosen");
      this.chosen = chosen;
      const panel = find(".panel");
      panel.hidden = chosen === null;
      if (chosen === null) return;
      chosen.span.classList.add("chosen");
      chosen.answer.stopAt(chosen.span);
      const close = element("button", { class: "quiet close", type: "button", text: "Close" });
      close.addEventListener("click", () => this.pin(null, false));
      panel.replaceChildren(...details(chosen), element("p", { class: "keys" }, "Arrow keys go to other tokens, Enter ",
        this.pinned ? "lets go" : "holds this one", ", Escape closes."), close);
    }

    pin(chosen, held) {
      this.pinned = held;
      this.choose(chosen);
      chosen?.span.scrollIntoView({ block: "nearest" }); // in a narrow window the panel covers a part of it
    }

    tokenOf(event) {
      const span = event.target.closest?.(".token");
      return span ? this.allTokens().find((each) => each.span === span) ?? null : null;
    }

    press(event, chosen) {
      if (event.key === "Enter" || event.key === " ") this.pin(chosen, !this.pinned);
      else if (event.key === "Escape") this.pin(null, false);
      else {
        const seen = this.allTokens().filter(({ span }) => span.offsetParent !== null);
        const next = nextFor(event.key, seen.map(({ span }) => span), seen.indexOf(chosen));
        if (next === null) return;
        seen[next].span.focus();
      }
      event.preventDefault();
    }

    // --- learning

    offer(answer) {
      if (answer.adapters.length !== 1 || !this.learns.has(answer.adapters[0]) || !answer.id) return;
      const actions = [
        ["Good", () => this.feedback(answer, { reward: 1 })],
        ["Bad", () => this.feedback(answer, { reward: -1 })],
        ["Edit", () => answer.edit((text) => { answer.edited = text; return this.feedback(answer, { edit: text }); })],
        ...(answer.before ? [["Better than before", () => this.feedback(answer, { id: answer.before.id, prefer: answer.id })]] : []),
        ["Undo", () => this.undo(answer)],
        ["History", () => this.history(answer.adapters[0])],
      ];
      answer.actions.replaceChildren(...actions.map(([text, act]) => {
        const button = element("button", { class: "quiet", type: "button", text });
        button.addEventListener("click", act);
        return button;
      }));
    }

    async feedback(answer, given) {
      await this.learn(answer, "/v1/feedback", { id: answer.id, ...given }, learned);
    }

    async undo(answer) {
      const path = `/v1/adapters/${encodeURIComponent(answer.adapters[0])}/undo`;
      await this.learn(answer, path, {}, ({ published, version, reason }) => (published
        ? `Undone: version ${version} is as it was before.` : `Not undone: ${reason}.`));
    }

    async learn(answer, path, body, said) {
      answer.news.textContent = "Learning.";
      try {
        answer.news.textContent = said(await Server.json(path, body));
      } catch (error) {
        answer.news.textContent = error.message;
      }
    }

    async history(adapter) {
      const dialog = find(".history");
      const shown = (value) => (typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(4) : String(value));
      try {
        const { events } = await Server.json(`/v1/adapters/${encodeURIComponent(adapter)}/history`);
        const rows = events.map((event) => element("li", {}, ...Object.entries(event)
          .filter(([, value]) => value !== null && value !== "" && typeof value !== "object")
          .map(([name, value]) => element("span", { class: "fact" }, element("b", { text: name.replaceAll("_", " ") }), ` ${shown(value)}`))));
        dialog.querySelector(".events").replaceChildren(element("h2", { text: `What ${adapter} learned` }),
          rows.length ? element("ol", {}, ...rows) : element("p", { class: "muted", text: "Nothing yet." }));
      } catch (error) {
        dialog.querySelector(".events").replaceChildren(element("p", { text: error.message }));
      }
      dialog.showModal();
    }

    // --- what the reader does

    fitMessage() {
      const field = find("#message");
      field.style.setProperty("height", "auto");
      field.style.setProperty("height", `${field.scrollHeight + 2}px`);
    }

    listen() {
      this.atEnd = true;
      window.addEventListener("scroll", () => {
        this.atEnd = window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 80;
      }, { passive: true });
      find(".composer").addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
      find(".stop").addEventListener("click", () => this.stopping.abort());
      find(".new").addEventListener("click", () => this.startAnew());
      find(".key").addEventListener("change", ({ target }) => { Server.useKey(target.value); this.readAdapters(); });
      find("#message").addEventListener("input", () => this.fitMessage());
      find("#message").addEventListener("keydown", (event) => {
        if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.send(); }
        if (event.key === "Escape") this.stopping?.abort();
      });
      const talk = find(".talk");
      talk.addEventListener("mouseover", (event) => { const chosen = this.tokenOf(event); if (chosen && !this.pinned) this.choose(chosen); });
      talk.addEventListener("focusin", (event) => { const chosen = this.tokenOf(event); if (chosen && chosen !== this.chosen) this.choose(chosen); });
      talk.addEventListener("click", (event) => { const chosen = this.tokenOf(event); if (chosen) this.pin(chosen, !(this.pinned && chosen === this.chosen)); });
      talk.addEventListener("keydown", (event) => { const chosen = this.tokenOf(event); if (chosen) this.press(event, chosen); });
      window.addEventListener("focus", () => this.readAdapters());
    }
  }

  window.chat = new Page();
})();
