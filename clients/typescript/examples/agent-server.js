/** Runs Claude for the prompt box of the browser editor; docs/agents.md has the contract and says how to start it. */

import { randomUUID } from "node:crypto";
import { once } from "node:events";
import { createServer } from "node:http";
import { json } from "node:stream/consumers";
import { query } from "@anthropic-ai/claude-agent-sdk";
import { Gateway } from "@incus-gateway/client";
import { claudeOptions } from "@incus-gateway/client/claude";

const { GATEWAY_URL, EDITOR_ORIGIN, PORT = "8090", AGENT_OPTIONS = "{}" } = process.env;
const SDK = JSON.parse(AGENT_OPTIONS); // more options of the SDK: model, maxTurns, maxBudgetUsd…
const [LONGEST, MOST] = [1 << 20, 8]; // bytes of a request; agents that work at a time
const conversations = new Map(); // by the SDK's session: whose it is, and the name of its tool session
let working = 0;

async function work(request, response, abortController) {
  if (!(Number(request.headers["content-length"]) <= LONGEST)) throw new Error("The prompt is too long.");
  if (working > MOST) throw new Error("Too many agents work just now. Try again soon.");
  const { tenant, prompt, session } = await json(request);
  const token = request.headers.authorization?.replace("Bearer ", "");
  const gateway = new Gateway(GATEWAY_URL, { token });
  const { subject, tenants } = await gateway.session(); // refuses whatever is no token of the gateway
  const whose = JSON.stringify([subject, tenant]);
  const known = session ? conversations.get(session) : { whose, tools: randomUUID() };
  if (!tenants.includes(tenant) || known?.whose !== whose)
    throw new Error("This conversation is not known here any more. Begin a new one.");
  const shop = gateway.tenant(tenant, { session: known.tools });
  const options = { ...SDK, abortController, includePartialMessages: true, persistSession: true };
  if (session) options.resume = session;
  try {
    await shop.history.begin(prompt); // the title of the turn
    response.writeHead(200, { "Content-Type": "application/x-ndjson", "Cache-Control": "no-store" });
    for await (const message of query({ prompt, options: claudeOptions(shop, options) })) {
      if (message.subtype === "init") conversations.set(message.session_id, known);
      const taken = response.write(`${JSON.stringify(message)}\n`);
      if (!taken) await once(response, "drain", { signal: abortController.signal });
    }
  } finally {
    await shop.history.end().finally(() => shop.close());
  }
}

createServer(async (request, response) => {
  response.setHeader("Access-Control-Allow-Origin", EDITOR_ORIGIN);
  response.setHeader("Access-Control-Allow-Headers", "Authorization, Content-Type");
  if (request.method !== "POST") return response.writeHead(request.method === "OPTIONS" ? 204 : 405).end();
  const ending = new AbortController();
  response.on("close", () => ending.abort()).on("error", () => {}); // by closing, the editor stops an agent
  working++;
  await work(request, response, ending).catch(({ message }) => {
    if (ending.signal.aborted) return;
    if (!response.headersSent) response.writeHead(400, { "Content-Type": "application/json" });
    const failed = { type: "result", subtype: "error_during_execution", is_error: true, errors: [message] };
    response.write(`${JSON.stringify({ ...failed, detail: message })}\n`);
  });
  working--;
  response.end();
}).listen(Number(PORT), "127.0.0.1");
