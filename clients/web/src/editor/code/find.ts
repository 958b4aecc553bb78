/** The panel that finds and replaces in one file, with how many places there are. */

import {
  closeSearchPanel,
  findNext,
  findPrevious,
  getSearchQuery,
  replaceAll,
  replaceNext,
  SearchQuery,
  selectMatches,
  setSearchQuery,
} from "@codemirror/search";
import { type EditorView, type Panel, runScopeHandlers, type ViewUpdate } from "@codemirror/view";

/** More matches are not counted: it would take longer than a key may. */
const MOST = 2000;

export function findPanel(view: EditorView): Panel {
  const dom = element("div", { class: "find", role: "search", "aria-label": "Find in this file" });
  const find = field("Find", "Find");
  find.setAttribute("main-field", "true");
  const replace = field("Replace with", "Replace with");
  const count = element("output", { class: "count", "aria-live": "polite" });
  const toggles = {
    caseSensitive: toggle("Aa", "Match case"),
    wholeWord: toggle("ab|", "Whole words"),
    regexp: toggle(".*", "Regular expression"),
  };
  const step = (label: string, shown: string, act: (view: EditorView) => boolean) =>
    button(label, shown, () => act(view));
  const close = button("Close", "×", () => {
    closeSearchPanel(view);
    view.focus();
  });
  const first = element("div", { class: "row" });
  first.append(
    find,
    ...Object.values(toggles),
    count,
    step("Previous match", "↑", findPrevious),
    step("Next match", "↓", findNext),
    step("Select all matches", "all", selectMatches),
    close,
  );
  const second = element("div", { class: "row" });
  second.append(
    replace,
    step("Replace this match", "Replace", replaceNext),
    step("Replace all matches", "Replace all", replaceAll),
  );
  dom.append(first);
  if (!view.state.readOnly) dom.append(second);

  const commit = () => {
    const query = new SearchQuery({
      search: find.value,
      replace: replace.value,
      caseSensitive: pressed(toggles.caseSensitive),
      wholeWord: pressed(toggles.wholeWord),
      regexp: pressed(toggles.regexp),
    });
    if (!query.eq(getSearchQuery(view.state))) view.dispatch({ effects: setSearchQuery.of(query) });
  };
  const show = () => {
    const query = getSearchQuery(view.state);
    if (find.value !== query.search) find.value = query.search;
    if (replace.value !== query.replace) replace.value = query.replace;
    for (const [name, one] of Object.entries(toggles))
      one.setAttribute("aria-pressed", String(query[name as keyof typeof toggles]));
    const said = counted(view, query);
    count.textContent = said;
    find.setAttribute("aria-invalid", String(query.search !== "" && (!query.valid || said === "None")));
  };
  find.addEventListener("input", commit);
  replace.addEventListener("input", commit);
  for (const one of Object.values(toggles))
    one.addEventListener("click", () => {
      one.setAttribute("aria-pressed", String(!pressed(one)));
      commit();
    });
  dom.addEventListener("keydown", (event) => {
    if (runScopeHandlers(view, event, "search-panel")) event.preventDefault();
    else if (event.key === "Enter" && event.target === find) {
      event.preventDefault();
      (event.shiftKey ? findPrevious : findNext)(view);
    } else if (event.key === "Enter" && event.target === replace) {
      event.preventDefault();
      replaceNext(view);
    }
  });
  show();
  return {
    dom,
    top: true,
    mount: () => find.select(),
    update: (update: ViewUpdate) => {
      const asked = update.transactions.some((one) =>
        one.effects.some((effect) => effect.is(setSearchQuery)),
      );
      if (asked || update.docChanged || update.selectionSet) show();
    },
  };
}

/** Returns "3 of 12", or what there is to say instead. */
function counted(view: EditorView, query: SearchQuery): string {
  if (query.search === "") return "";
  if (!query.valid) return "No pattern";
  const { main } = view.state.selection;
  let [count, at] = [0, 0];
  const cursor = query.getCursor(view.state);
  for (let next = cursor.next(); !next.done && count < MOST; next = cursor.next()) {
    count += 1;
    if (next.value.from === main.from && next.value.to === main.to) at = count;
  }
  if (count === 0) return "None";
  const all = count === MOST ? `${MOST} or more` : String(count);
  return at > 0 ? `${at} of ${all}` : all;
}

function pressed(button: HTMLElement): boolean {
  return button.getAttribute("aria-pressed") === "true";
}

function element<Tag extends keyof HTMLElementTagNameMap>(
  tag: Tag,
  attributes: Readonly<Record<string, string>>,
): HTMLElementTagNameMap[Tag] {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function field(label: string, placeholder: string): HTMLInputElement {
  return element("input", { "aria-label": label, placeholder, spellcheck: "false", autocomplete: "off" });
}

function button(label: string, shown: string, act: () => void): HTMLButtonElement {
  // drawn by the style sheet: no part of what the button is called
  const made = element("button", { type: "button", "aria-label": label, title: label, "data-glyph": shown });
  made.addEventListener("click", act);
  return made;
}

function toggle(shown: string, label: string): HTMLButtonElement {
  const made = button(label, shown, () => {});
  made.setAttribute("aria-pressed", "false");
  return made;
}
