/**
 * An agent as a program that builds on the Agent SDK runs one, in a process of its own: what it is given stands in its
 * only argument, and what happens in its output, a line of JSON each. SIGTERM aborts it.
 */

import { query } from "@anthropic-ai/claude-agent-sdk";
import { Gateway } from "@incus-gateway/client";
import { claudeOptions } from "@incus-gateway/client/claude";

const { url, token, tenant, session, prompts, live, interrupt, person, options } = JSON.parse(
  process.argv[2] ?? "{}",
);
const say = (told) => process.stdout.write(`${JSON.stringify(told)}\n`);
const shop = new Gateway(url, { token: () => token }).tenant(tenant, session ? { session } : {});
const ending = new AbortController();
process.on("SIGTERM", () => ending.abort());

let answered = () => {};
async function* asked() {
  for (const prompt of prompts) {
    const over = new Promise((resolve) => {
      answered = resolve;
    });
    yield { type: "user", message: { role: "user", content: prompt }, parent_tool_use_id: null };
    await over;
  }
}
const onOutput = async ({ call, stream, data }) => {
  const text = new TextDecoder().decode(data);
  say({ type: "output", call, stream, text });
  if (interrupt && text.includes(interrupt)) await agent.interrupt();
  if (text.includes("go on")) await shop.run("touch ~/go");
};
/** Whom the agent asks: `person` has the tools that may be used, and what is answered beside that. */
const canUseTool = async (name, input, { suggestions }) => {
  say({ type: "asked", name, input, suggestions });
  const answer = person[name];
  if (!answer) return { behavior: "deny", message: "the person said no" };
  return { behavior: "allow", updatedInput: input, ...answer };
};
const agent = query({
  prompt: asked(),
  options: claudeOptions(shop, {
    ...options,
    abortController: ending,
    ...(live ? { onOutput } : {}),
    ...(person ? { canUseTool } : {}),
  }),
});
try {
  for await (const message of agent) {
    if (message.type === "system" || message.type === "result") say(message);
    if (message.type === "result") answered();
  }
} catch (error) {
  say({ type: "error", name: error.name, message: error.message });
} finally {
  shop.close();
}
