/** Formats a document with the site's own Prettier, if the site has and configures one. */

import { type Tenant, unique } from "@incus-gateway/client";
import type { Doc } from "../state/doc.js";
import script from "./prettier.sh?raw";
import { LANGUAGE_SERVER } from "./served.js";

/** Milliseconds that a save waits for Prettier. */
const PATIENCE = 8000;
/** The exit code if there is no Prettier for this file. */
const NONE = 69;

/** Returns the formatted text, or null if Prettier does not apply. Throws Prettier's message, such as a syntax error. */
export async function prettier(tenant: Tenant, doc: Doc): Promise<string | null> {
  const argv = ["/bin/sh", "-c", 'eval "$SCRIPT"', "prettier", doc.path];
  const exec = await tenant.exec(argv, {
    env: { SCRIPT: script },
    execId: `${LANGUAGE_SERVER}prettier-${unique()}`,
    stdin: true,
    timeoutMs: PATIENCE,
    lingerMs: 0,
    helper: true,
  });
  // a missing program reads no input
  await exec.write(doc.text).catch(() => {});
  await exec.closeStdin().catch(() => {});
  const texts = { stdout: "", stderr: "" };
  const decoders = { stdout: new TextDecoder(), stderr: new TextDecoder() };
  // a formatted text is at most a few times as long
  const most = 10_000 + doc.text.length * 8;
  for await (const { stream, data } of exec.output()) {
    texts[stream] += decoders[stream].decode(data, { stream: true });
    if (texts[stream].length <= most) continue;
    await exec.cancel(0).catch(() => {});
    throw new Error("It printed far more than the file.");
  }
  const { code, reason } = await exec.exit;
  if (code === NONE) return null;
  if (code !== 0)
    throw new Error(reason === "timeout" ? "It took too long." : (texts.stderr.trim().split("\n")[0] ?? ""));
  return texts.stdout;
}
