// Starts a program, and starts it anew whenever a source file of the folder changes.
// `node -e "$(cat watch.js)" -- PROGRAM ARGUMENT…`. It ends as the program does; where an edit just made the
// program end, it waits a while for the next edit.
const { spawn } = require("node:child_process");
const { existsSync, readdirSync, watch } = require("node:fs");
const { join } = require("node:path");

const SOURCE = /\.(?:[mc]?[jt]sx?|py)$/;
const OTHERS = /^(?:\.|node_modules$|__pycache__$|dist$|build$)/;
const FOLDERS = 1000; // that are watched
// what bundlers write beside their configuration, to load it: vite.config.ts.timestamp-….mjs, tsup.config.bundled_….mjs
const PASSING = /\.timestamp-|\.bundled_/;
const REST = 50; // milliseconds without another change
const NEW = 1000; // of a file that was not there: one that is gone by then restarts nothing
const PATIENCE = 2000; // until a program that does not end is killed
const MENDING = 10000; // until it ends with a program that an edit broke

const watched = new Map();
const known = new Set(); // source files
let child, timer, killing;
let edited = false, again = false, ending = false;

function end(code, signal) {
  if (signal) process.kill(process.pid, signal);
  else process.exit(code);
}

function start() {
  // a group of its own, so that what a script of npm starts ends with it
  child = spawn("/usr/bin/env", process.argv.slice(1), { stdio: "inherit", detached: true });
  child.on("exit", (code, signal) => {
    child = undefined;
    clearTimeout(killing);
    if (again && !ending) start();
    else if (edited && !ending) timer = setTimeout(end, MENDING, code, signal);
    else end(code, signal);
    again = false;
  });
}

function kill(signal) {
  try {
    process.kill(-child.pid, signal);
  } catch {}
}

function changed() {
  edited = true;
  if (!child) return start();
  again = true;
  kill("SIGTERM");
  clearTimeout(killing);
  killing = setTimeout(kill, PATIENCE, "SIGKILL");
}

function soon() {
  clearTimeout(timer);
  timer = setTimeout(changed, REST);
}

function appeared(path) {
  if (known.has(path) || !existsSync(path)) return;
  known.add(path);
  soon();
}

function look(folder) {
  if (watched.has(folder) || watched.size >= FOLDERS) return;
  try {
    const watcher = watch(folder, (_, name) => {
      if (!name || OTHERS.test(name)) return;
      if (!SOURCE.test(name)) return look(join(folder, name));
      if (PASSING.test(name)) return;
      const path = join(folder, name);
      if (known.has(path)) soon();
      else setTimeout(appeared, NEW, path);
    });
    watcher.on("error", () => {});
    watched.set(folder, watcher);
    for (const entry of readdirSync(folder, { withFileTypes: true }))
      if (OTHERS.test(entry.name)) continue;
      else if (entry.isDirectory()) look(join(folder, entry.name));
      else if (SOURCE.test(entry.name)) known.add(join(folder, entry.name));
  } catch {
    watched.get(folder)?.close();
    watched.delete(folder);
  }
}

for (const signal of ["SIGTERM", "SIGINT", "SIGHUP"])
  process.on(signal, () => {
    ending = true;
    if (child) kill(signal);
    else process.exit(0);
  });
look(".");
start();
