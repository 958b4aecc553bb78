/** What runs in an edge runtime: each way that the client has of talking to a gateway. */

import { Gateway } from "@incus-gateway/client";

/** Returns what each way gave, as JSON can carry it. */
export async function used(url, token) {
  const gateway = new Gateway(url, { token });
  const demo = gateway.tenant("demo");
  try {
    await demo.connect();
    await demo.write("hello.txt", "Hello ✓\n");
    const command = await demo.exec(["sh", "-c", "cat; echo behind >&2; exit 3"], { stdin: true });
    await command.write("as typed");
    await command.closeStdin();
    let stdout = "";
    const reader = command.stdout.readable.pipeThrough(new TextDecoderStream()).getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) stdout += part.value;
    const exit = await command.exit;
    const stopped = AbortSignal.timeout(200);
    const slow = await demo.bash("sleep 60", { signal: stopped }).catch((error) => error.code);
    const events = [];
    for await (const event of gateway.events({ tenants: ["demo"], lastEventId: "0" })) {
      events.push(event.type);
      if (event.type === "tool.finished") break;
    }
    let size = 0;
    const body = new Blob(["x".repeat(1 << 20)]).stream();
    await demo.files.upload("large", body);
    for await (const part of await demo.files.download("large")) size += part.length;
    return {
      read: (await demo.read("hello.txt")).text,
      stdout,
      exit: exit.code,
      slow,
      event: events.at(-1),
      size,
      tenants: (await gateway.tenants()).map(({ name }) => name),
      ran: (await demo.run("echo by HTTP")).stdout,
    };
  } finally {
    demo.close();
  }
}
