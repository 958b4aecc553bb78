/** An open file that is an image. */

import type { Tenant } from "@incus-gateway/client";
import type { Doc } from "./doc.js";

/** What is shown as an image by its name. SVG is text, which can be looked at as one. */
export const IMAGE = /\.(png|jpe?g|gif|webp|avif|ico)$/i;

export async function loadImage(tenant: Tenant, doc: Doc): Promise<void> {
  const content = await tenant.files.read(doc.path);
  const bytes = Uint8Array.from(atob(content.data ?? ""), (char) => char.charCodeAt(0));
  if (doc.image.value !== null) URL.revokeObjectURL(doc.image.value);
  const extension = doc.path.split(".").pop()?.toLowerCase() ?? "";
  const type = `image/${{ jpg: "jpeg", ico: "x-icon" }[extension] ?? extension}`;
  doc.image.value = URL.createObjectURL(new Blob([bytes], { type }));
  doc.size.value = content.size;
  doc.etag = content.etag;
  doc.phase.value = "image";
}
