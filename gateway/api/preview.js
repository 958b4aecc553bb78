// Tells the editor, whose preview this page is shown in, what goes wrong in it and where it is. The gateway puts it
// first into a page that the editor asks for so; see preview.py. It has no secret, and what it says is not trusted.
(() => {
  document.currentScript?.remove();
  const own = location.href.replace(/([?&])__gateway_preview=[^&#]*(&?)/, (_, before, after) => (after ? before : ""));
  history.replaceState(history.state, "", own);
  if (window.parent === window) return;
  let left = 200;
  const tell = (kind, text) => {
    if (left-- > 0)
      window.parent.postMessage(
        { gatewayPreview: kind, text: String(text).slice(0, 2000), url: location.href.slice(0, 2000) },
        EDITOR,
      );
  };
  const words = (value) => {
    if (value instanceof Error) return value.stack || String(value);
    if (typeof value !== "object" || value === null) return String(value);
    try {
      return JSON.stringify(value).slice(0, 2000);
    } catch {
      return String(value);
    }
  };
  // as a console does it: the first value may say where the others go
  const sentence = ([first, ...rest]) => {
    if (typeof first !== "string") return [first, ...rest].map(words).join(" ");
    const text = first.replace(/%([%sdifoOcj])/g, (mark, kind) => {
      if (kind === "%") return "%";
      if (rest.length === 0) return mark;
      const value = rest.shift();
      if (kind === "c") return "";
      return kind === "d" || kind === "i" ? String(Math.trunc(Number(value))) : words(value);
    });
    return [text, ...rest.map(words)].join(" ");
  };
  tell("page", "");
  try {
    if (!window.localStorage || !navigator.cookieEnabled) throw new Error("refused");
  } catch {
    tell(
      "warning",
      "This browser refuses storage and cookies to a page that another site shows. Open it in a new tab to use them.",
    );
  }
  addEventListener("load", () => tell("title", document.title));
  addEventListener(
    "error",
    (event) => {
      const { target } = event;
      if (event instanceof ErrorEvent) {
        const place = event.filename ? ` (${event.filename}:${event.lineno}:${event.colno})` : "";
        tell("error", `${event.message}${place}`);
      } else if (target instanceof Element) tell("error", `not loaded: ${target.src || target.href || target.tagName}`);
    },
    true,
  );
  addEventListener("unhandledrejection", ({ reason }) => tell("error", `not handled: ${words(reason)}`));
  addEventListener("securitypolicyviolation", (event) =>
    tell("error", `refused by ${event.effectiveDirective}: ${event.blockedURI}`),
  );
  for (const [name, kind] of [
    ["error", "error"],
    ["warn", "warning"],
  ]) {
    const said = console[name];
    console[name] = (...values) => {
      try {
        tell(kind, sentence(values.slice(0, 10)));
      } catch {
        // a value that has no text
      }
      said.apply(console, values);
    };
  }
  for (const name of ["pushState", "replaceState"]) {
    const done = history[name];
    history[name] = (...values) => {
      done.apply(history, values);
      tell("moved", "");
    };
  }
  for (const name of ["popstate", "hashchange"]) addEventListener(name, () => tell("moved", ""));
  // where a link leads: the editor has that page come with this script too
  window.navigation?.addEventListener("navigate", ({ destination, formData }) => {
    if (!destination.sameDocument && formData === null) tell("going", destination.url);
  });
})();
