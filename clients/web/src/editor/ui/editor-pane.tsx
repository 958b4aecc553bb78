/** Tabs, the editor view, and the notices above it. */

import type { Extension } from "@codemirror/state";
import type { EditorView } from "@codemirror/view";
import { effect, signal } from "@preact/signals";
import { useEffect, useRef, useState } from "preact/hooks";
import type { Doc } from "../state/doc.js";
import type { Stage as Shown } from "../state/documents.js";
import { load } from "../state/network.js";
import { parent } from "../state/paths.js";
import { keys, tabWidth, wrap } from "../state/settings.js";
import type { Pane } from "../state/tabs.js";
import { complain } from "../state/toasts.js";
import type { Workspace } from "../state/workspace.js";
import { Interruption, Stopped } from "./connection.js";
import { Instead, Told, Welcome } from "./instead.js";
import { Looks, PAGES } from "./looks.js";
import { type MenuItem, showMenu } from "./menu.js";
import { copy, Dialog, FileIcon, Icon, IconButton, scrollAcross } from "./parts.js";
import { caret, view } from "./view.js";

export const closing = signal<Doc | null>(null);

export function EditorPane({ current }: { current: Workspace }) {
  const { documents } = current;
  const doc = documents.tabs.active.value;
  const beside = documents.tabs.beside.value;
  return (
    <section class="editor" aria-label="Editor">
      <Tabs current={current} />
      <Interruption />
      <Stopped current={current} />
      <div class="panes">
        <Body pane="main" doc={doc} current={current} />
        {beside !== null && <Body pane="beside" doc={beside} current={current} />}
      </div>
      {closing.value !== null && <Closing doc={closing.value} current={current} />}
    </section>
  );
}

/** One of the places where a document is shown. A tab that is dropped there is shown there. */
function Body({ pane, doc, current }: { pane: Pane; doc: Doc | null; current: Workspace }) {
  const { tabs } = current.documents;
  const [taking, setTaking] = useState<Pane | null>(null);
  /** Where a tab would be shown: as long as there is one place, its right half is the other one. */
  const place = ({ clientX, currentTarget }: DragEvent): Pane => {
    if (tabs.beside.value !== null) return pane;
    const { left, width } = (currentTarget as Element).getBoundingClientRect();
    return clientX > left + width / 2 ? "beside" : "main";
  };
  return (
    // biome-ignore lint/a11y/noStaticElementInteractions: what is dropped here has its keys and its menu, too
    <div
      class="pane"
      data-taking={taking === null ? undefined : taking === pane ? "here" : "half"}
      onDragOver={(event) => {
        if (!event.dataTransfer?.types.includes(TAB)) return;
        event.preventDefault();
        setTaking(place(event));
      }}
      onDragLeave={(event) => {
        if (!event.currentTarget.contains(event.relatedTarget as Node | null)) setTaking(null);
      }}
      onDrop={(event) => {
        setTaking(null);
        const moved = tabs.find(event.dataTransfer?.getData(TAB) ?? "");
        if (moved === undefined) return;
        event.preventDefault();
        tabs.place(moved, place(event));
      }}
    >
      {pane === "beside" && doc !== null && (
        <header class="beside">
          <FileIcon path={doc.path} />
          <span class="name">{doc.name}</span>
          <span class="where">{parent(doc.path) === "." ? "" : parent(doc.path)}</span>
          <span class="grow" />
          <IconButton
            icon="x"
            size={13}
            label="Show one file alone"
            onClick={() => current.documents.tabs.join()}
          />
        </header>
      )}
      {doc !== null && <Told doc={doc} current={current} />}
      <div class="editor-body">
        <Stage current={current} pane={pane} />
        {doc === null ? <Welcome /> : <Instead doc={doc} current={current} />}
        {doc !== null && doc.phase.value === "ready" && PAGES.test(doc.path) && <Looks doc={doc} />}
      </div>
    </div>
  );
}

export function closeDoc(current: Workspace, doc: Doc): void {
  if (doc.dirty.value && doc.phase.value === "ready") closing.value = doc;
  else current.documents.close(doc);
}

/** The kind of what is dragged: a tab of this window. */
const TAB = "application/x-gateway-tab";

function tabMenu(current: Workspace, doc: Doc): readonly MenuItem[] {
  const { documents } = current;
  const others = documents.tabs.open.value.filter((other) => other !== doc);
  // one that is unsaved stays open
  const closeAll = (docs: readonly Doc[]) => {
    for (const one of docs) if (!one.dirty.value) documents.close(one);
  };
  return [
    { label: "Close", icon: "x", run: () => closeDoc(current, doc) },
    { label: "Close the others", icon: "x", run: () => closeAll(others) },
    { label: "Close all that are saved", icon: "x", run: () => closeAll(documents.tabs.open.value) },
    documents.tabs.beside.value === doc
      ? { label: "Back to the others", icon: "panel-right", run: () => documents.tabs.place(doc, "main") }
      : { label: "Open beside", icon: "panel-right", run: () => documents.tabs.split(doc) },
    { label: "Show in the tree", icon: "locate", run: () => void current.tree.reveal(doc.path) },
    { label: "Copy the path", icon: "copy", run: () => copy(doc.path) },
  ];
}

function Tabs({ current }: { current: Workspace }) {
  const { documents } = current;
  const strip = useRef<HTMLDivElement>(null);
  const active = documents.tabs.current.value;
  useEffect(() => {
    strip.current
      ?.querySelector('[aria-selected="true"]')
      ?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }, [active]);
  if (documents.tabs.open.value.length === 0) return null;
  const names = documents.tabs.open.value.map(({ name }) => name);
  return (
    <div class="tabs" role="tablist" aria-label="Open files" ref={strip} onWheel={scrollAcross}>
      {documents.tabs.open.value.map((doc) => {
        const twin = names.filter((name) => name === doc.name).length > 1;
        const state =
          doc.theirs.value !== null ? "conflict" : doc.gone.value ? "gone" : doc.dirty.value ? "dirty" : "";
        return (
          <div
            key={doc.path}
            class={`tab ${active === doc ? "active" : ""} ${state}`}
            role="tab"
            tabIndex={active === doc ? 0 : -1}
            aria-selected={active === doc}
            title={doc.path}
            onMouseDown={(event) => {
              if (event.button === 1) event.preventDefault();
            }}
            draggable
            onDragStart={(event) => event.dataTransfer?.setData(TAB, doc.path)}
            onDragOver={(event) => event.dataTransfer?.types.includes(TAB) && event.preventDefault()}
            onDrop={(event) => {
              const moved = documents.tabs.find(event.dataTransfer?.getData(TAB) ?? "");
              if (moved === undefined) return;
              event.preventDefault();
              documents.tabs.reorder(moved, doc);
            }}
            onContextMenu={(event) => showMenu(event, doc.name, tabMenu(current, doc))}
            onAuxClick={(event) => event.button === 1 && closeDoc(current, doc)}
            onClick={() => documents.tabs.activate(doc)}
            onKeyDown={(event) => {
              if (event.key === "ArrowRight") documents.tabs.step(1);
              else if (event.key === "ArrowLeft") documents.tabs.step(-1);
              else if (event.key === "Enter") view.current?.focus();
              else if (event.key === "Delete") closeDoc(current, doc);
            }}
          >
            <FileIcon path={doc.path} />
            <span class="name">{doc.name}</span>
            {twin && <span class="where">{parent(doc.path)}</span>}
            <button
              type="button"
              class="close"
              tabIndex={-1}
              aria-label={state === "" ? `Close ${doc.name}` : `Close ${doc.name}, which has unsaved changes`}
              onClick={(event) => {
                event.stopPropagation();
                closeDoc(current, doc);
              }}
            >
              <span class="dot" />
              <Icon name="x" size={13} />
            </button>
          </div>
        );
      })}
    </div>
  );
}

/** The keys of the text that are loaded. */
const liked: { name: string; keys: Extension } = { name: "default", keys: [] };

async function likeKeys(): Promise<void> {
  const name = keys.peek();
  liked.keys = name === "default" ? [] : await (await load(() => import("../code/keys.js"))).keysOf(name);
  liked.name = name;
}

/** The host of CodeMirror: made when the first file is there, and kept. */
function Stage({ current, pane }: { current: Workspace; pane: Pane }) {
  const host = useRef<HTMLDivElement>(null);
  const { documents } = current;
  const place = pane === "main" ? documents.tabs.active : documents.tabs.beside;
  useEffect(() => {
    let made: EditorView | null = null;
    let shown: Doc | null = null;
    let turn = 0;
    const leave = () => {
      if (made !== null && shown !== null) shown.scroll = made.scrollSnapshot();
      shown = null;
    };
    const stop = effect(() => {
      const doc = place.value;
      const ready = doc?.phase.value === "ready";
      const mine = ++turn;
      void (async () => {
        if (doc === null || !ready || doc.state === null || host.current === null) {
          leave();
          caret.value = null;
          return;
        }
        const code = await load(() => import("../code/editor.js"));
        // until other keys are loaded, the default ones work
        if (liked.name !== keys.peek()) await likeKeys().catch(() => {});
        if (mine !== turn || host.current === null || doc.state === null) return;
        if (made === null) {
          made = code.makeView(host.current);
          const used = made;
          made.dom.addEventListener("focusin", () => {
            documents.tabs.pane.value = pane;
            view.current = used;
            caret.value = code.caretOf(used.state);
          });
        }
        if (view.current === null || documents.tabs.pane.peek() === pane) view.current = made;
        if (shown !== doc) {
          leave();
          shown = doc;
          code.showState(made, doc.state, (state) => {
            const changed = doc.state?.doc !== state.doc;
            documents.updated(doc, state);
            if (changed) current.saveSoon();
            caret.value = code.caretOf(state);
            current.keepSoon();
          });
          code.like(made, { wrap: wrap.peek(), tabWidth: tabWidth.peek(), keys: liked.keys });
          if (doc.scroll !== null)
            made.dispatch({ effects: doc.scroll as ReturnType<EditorView["scrollSnapshot"]> });
          caret.value = code.caretOf(doc.state);
        }
        if (doc.goTo !== null) {
          if ("line" in doc.goTo) code.goTo(made, doc.goTo.line, doc.goTo.column);
          else code.goBack(made, doc.goTo.anchor, doc.goTo.head);
          doc.goTo = null;
        }
        const focuses = doc.focuses;
        doc.focuses = true;
        if (!focuses) made.contentDOM.blur();
        else if (
          !matchMedia("(pointer: coarse)").matches &&
          document.activeElement?.closest(".tree, .panel") === null &&
          documents.tabs.pane.peek() === pane
        ) {
          made.focus();
        }
      })().catch(complain);
    });
    const liking = effect(() => {
      void [wrap.value, tabWidth.value, keys.value];
      if (made === null || shown === null) return;
      void Promise.all([load(() => import("../code/editor.js")), likeKeys()]).then(
        ([{ like }]) =>
          made && like(made, { wrap: wrap.peek(), tabWidth: tabWidth.peek(), keys: liked.keys }),
        () => {}, // `missing` is told
      );
    });
    const stage: Shown = {
      pane,
      get doc() {
        return shown;
      },
      get focused() {
        return made?.hasFocus === true;
      },
      dispatch: (spec) => made?.dispatch(spec),
    };
    documents.stages.add(stage);
    return () => {
      stop();
      liking();
      documents.stages.delete(stage);
      leave();
      if (view.current === made) view.current = null;
      made?.destroy();
    };
  }, [documents, current, place, pane]);
  const doc = place.value;
  return <div class="stage" ref={host} hidden={doc === null || doc.phase.value !== "ready"} />;
}

function Closing({ doc, current }: { doc: Doc; current: Workspace }) {
  const end = () => {
    closing.value = null;
  };
  return (
    <Dialog label="Unsaved changes" class="small" onClose={end}>
      <h2>Save {doc.name}?</h2>
      <p>Its changes exist only in this window.</p>
      <footer>
        <button type="button" onClick={end}>
          Keep editing
        </button>
        <button
          type="button"
          class="danger"
          onClick={() => {
            end();
            current.documents.close(doc);
          }}
        >
          Discard
        </button>
        <button
          type="button"
          class="primary"
          onClick={async () => {
            end();
            if (await current.documents.save(doc)) current.documents.close(doc);
          }}
        >
          Save
        </button>
      </footer>
    </Dialog>
  );
}
