/** The tenant's tools for Vercel's package `ai`: `generateText({ model, tools: await aiTools(tenant), … })`. */

import { dynamicTool, jsonSchema, type Tool } from "ai";
import type { Tenant } from "./tenant.js";
import type { ToolResult } from "./tools.js";

export interface AiOptions {
  /** How long a call outlives this process or its connection; default 5 000. */
  readonly lingerMs?: number | undefined;
}

type ModelOutput = Awaited<ReturnType<NonNullable<Tool["toModelOutput"]>>>;

/**
 * Returns the tenant's eight tools, under the names that the model knows. Each call uses the model's id for it, and an
 * `abortSignal` ends it with all that it runs. A failure of the tool itself is an error for the model.
 */
export async function aiTools(
  tenant: Tenant,
  { lingerMs = 5_000 }: AiOptions = {},
): Promise<Record<string, Tool>> {
  const entries = (await tenant.tools()).map(({ name, description, inputSchema }) => {
    const tool = dynamicTool({
      description,
      inputSchema: jsonSchema(inputSchema),
      execute: (input, { toolCallId, abortSignal }) =>
        tenant.tool(name, input as object, { callId: toolCallId, signal: abortSignal, lingerMs }),
      toModelOutput: ({ output }) => shown(output as ToolResult),
    });
    return [name, tool] as const;
  });
  return Object.fromEntries(entries);
}

/** A stored conversation is plain JSON, so `output` may be that instead of our object. */
function shown({ content, isError }: Pick<ToolResult, "content" | "isError">): ModelOutput {
  const texts = content.flatMap((part) => (part.type === "text" ? [part.text] : []));
  if (isError) return { type: "error-text", value: texts.join("\n") };
  if (texts.length === content.length) return { type: "text", value: texts.join("\n") };
  const value = content.map((part) => {
    if (part.type === "text") return part;
    const { blob = "", mimeType = "application/octet-stream" } =
      part.type === "image" ? { blob: part.data, mimeType: part.mimeType } : part.resource;
    return { type: "file" as const, mediaType: mimeType, data: { type: "data" as const, data: blob } };
  });
  return { type: "content", value };
}
