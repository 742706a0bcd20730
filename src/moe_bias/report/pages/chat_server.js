// What the chat page asks of its server.
"use strict";
const Server = (() => {
  class Refusal extends Error {}

  let key = "";

  async function asked(path, body, options = {}) {
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    const request = body === undefined ? { headers }
      : { method: "POST", headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify(body) };
    const response = await fetch(path, { ...request, ...options });
    if (!response.ok) throw new Refusal(await refusal(response));
    return response;
  }

  async function refusal(response) {
    try {
      const { error, detail } = await response.json();
      return error?.message ?? detail ?? `The server answered ${response.status}.`;
    } catch {
      return `The server answered ${response.status}.`;
    }
  }

  const json = async (path, body) => (await asked(path, body)).json();

  // Each chunk of a streamed answer, as it comes.
  async function* chunks(body, signal) {
    const response = await asked("/v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, { signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      held += value;
      const events = held.split("\n\n");
      held = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Refusal(chunk.error.message);
        yield chunk;
      }
    }
  }

  // Sent with every request from now on, and kept nowhere.
  const useKey = (given) => { key = given.trim(); };

  return { json, chunks, useKey };
})();
