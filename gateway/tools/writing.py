"""Claude Code's Write and Edit; texts and quirks are those of version 2.1.331."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from zlib import crc32

from gateway.errors import Conflict, GatewayError, OutsideWorkspace, TooLarge
from gateway.rootfs.paths import show
from gateway.rootfs.root import FOLDER, Made, etag, refusal
from gateway.tools.call import Call, Seen, ToolAnswer, ToolFailure, failure, meant, missing, outside, text
from gateway.tools.texts import STALE, FileText, decode, replaced, trimmed

_CURRENT = " (file state is current in your context — no need to Read it back)"
_CHANGED = (
    " (note: the file had been modified on disk since you last read it — the edit applied cleanly, but the "
    "file contains other changes not in your context. Read it before edits that depend on surrounding "
    "content.)"
)
_KEPT_FORM = (
    ". These tools write UTF-8 (or UTF-16LE behind its byte-order mark) and never convert a file's "
    "encoding on their own, so nothing was written. If the file is text, make the change with a shell "
    "command that reads and writes it in its own encoding (iconv, or PowerShell Get-Content/Set-Content "
    "-Encoding), or ask the user whether to convert it to UTF-8 first. To replace the whole file with new"
    " UTF-8 text anyway, delete it first, then Write it."
)
_UNREAD = "File has not been read yet. Read it first before writing to it."
_ATTEMPTS = 5  # tries of an edit while the tenant keeps changing the file
_PLAIN = FileText("", b"", "utf-8", False, True, False)


class _EditTarget:
    """The location of a file: its open folder, its name, and the existing regular file, if any."""

    def __init__(self, call: Call, path: str, *, create: bool, made: list[Made]) -> None:
        self.call = call
        self.path = path
        self.directory, self.name = call.root.parent(path, create=create, made=made)
        self.old: os.stat_result | None = None
        try:
            self.old = self._look()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self.directory)

    def _look(self) -> os.stat_result | None:
        try:
            status = os.stat(self.name, dir_fd=self.directory, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise refusal(error) from None
        if stat.S_ISLNK(status.st_mode):
            raise self._link()
        if stat.S_ISDIR(status.st_mode):
            raise _Directory
        if not stat.S_ISREG(status.st_mode):
            shown = self.call.absolute(self.path)
            raise ToolFailure(
                "not_a_file",
                f"Refusing to write {shown}: this is a FIFO, socket or device, not a regular file.",
                tagged=False,
            )
        return status

    def _link(self) -> Exception:
        """Return the refusal for a link, which depends on its target."""
        call, shown = self.call, self.call.absolute(self.path)
        try:
            os.close(call.root.open(self.path, FOLDER))
            return _Directory()
        except GatewayError as error:
            match error.facts.get("reason"):
                case "loop":
                    words = f"ELOOP: too many symbolic links encountered, stat '{shown}'"
                    return ToolFailure("not_a_file", f"Error calling tool ({call.tool}): {words}")
                case "missing" if call.given.get("old_string"):
                    return ToolFailure("not_found", missing(call, self.path))
                case _:
                    pass
        target = call.root.link_target(self.path)
        if target is None:
            hint = "Its target is outside the workspace."
        else:
            hint = f"Write to the link's target path instead: {call.absolute(target)}."
        words = f"Refusing to write {shown}: it is a symbolic link. {hint}"
        return ToolFailure("not_a_file", words, tagged=False)

    def read(self) -> bytes:
        """Return the content of the existing file."""
        assert self.old is not None
        limit = self.call.limits.write_max
        if self.old.st_size > limit:
            words = f"the file has {self.old.st_size} bytes, more than the {limit} that can be edited"
            raise failure(self.call.tool, TooLarge(words, size=self.old.st_size, limit=limit))
        data, status = self.call.root.read_file(self.path, limit)
        if etag(status) != etag(self.old):
            raise Conflict("the file changed meanwhile", reason="changed")
        return data

    def put(self, data: bytes, *, expected: os.stat_result | None) -> os.stat_result:
        limit = self.call.limits.write_max
        if len(data) > limit:
            words = f"Content ({len(data)} bytes) exceeds maximum allowed size ({limit} bytes)."
            raise ToolFailure("too_large", words, size=len(data), limit=limit)
        mode = self.old.st_mode if self.old is not None else 0o644
        return self.call.root.replace(self.directory, self.name, data, mode, expected=expected)


class _Directory(Exception):
    """The name is that of a folder."""


def _modified(call: Call, now: os.stat_result, data: bytes | None) -> bool:
    """Return whether the file's content has changed since the session saw it."""
    seen = call.seen
    if seen is None or seen.etag == etag(now):
        return False
    return data is None or not seen.whole or crc32(data) != seen.checksum


def _refuse_binary(form: FileText, *, tagged: bool) -> None:
    if form.flaw:
        raise ToolFailure("binary_file", form.flaw + _KEPT_FORM, tagged=tagged)


def _located(call: Call, given: str) -> str:
    try:
        if meant(given).startswith("~/"):  # a home folder; do not create a folder named ~
            raise OutsideWorkspace("the path leads out of the workspace", reason="outside")
        return call.locate(given)
    except GatewayError as error:
        raise outside(call, "write", given, error) from None


def write(call: Call) -> ToolAnswer:
    given: str = call.given["file_path"]
    content: str = call.given["content"]
    path = _located(call, given)
    if not path:
        raise _is_directory(call, given)
    if len(content) > call.limits.write_max:
        words = f"Content exceeds maximum allowed size ({call.limits.write_max} bytes)."
        raise ToolFailure("too_large", words, size=len(content), limit=call.limits.write_max)
    content = trimmed(given, content)
    return _attempted(call, given, path, lambda made: _write(call, given, path, content, made))


def _attempted(call: Call, given: str, path: str, change: Callable[[list[Made]], ToolAnswer]) -> ToolAnswer:
    """Change a file, and try again if somebody else changes it at the same time. Raises `ToolFailure`."""
    for attempt in range(_ATTEMPTS):
        try:
            with call.root.taking_back() as made:
                return change(made)
        except _Directory:
            raise _is_directory(call, given) from None
        except Conflict as error:
            if error.facts.get("reason") != "changed" or attempt == _ATTEMPTS - 1:
                raise _refused(call, given, path, error) from None
        except GatewayError as error:
            raise _refused(call, given, path, error) from None
    raise AssertionError("unreachable")


def _is_directory(call: Call, given: str) -> ToolFailure:
    if call.tool == "Edit":
        words = "Error calling tool (Edit): EISDIR: illegal operation on a directory, read"
        return ToolFailure("is_a_directory", words)
    return ToolFailure(
        "is_a_directory",
        f"{show(given)} is a directory, not a file. To create a file inside it, include the file name in "
        "file_path.",
    )


def _write(call: Call, given: str, path: str, content: str, made: list[Made]) -> ToolAnswer:
    target = _EditTarget(call, path, create=True, made=made)
    try:
        form = _PLAIN
        old = target.old
        if old is not None:
            # A notebook must always be read first, since Read shows it in another form than is written.
            if call.seen is None and (call.read_first or path.endswith(".ipynb")):
                raise ToolFailure("stale_read", _UNREAD)
            # The existing file decides the encoding and line ends, unless it is too large to read.
            data = target.read() if old.st_size <= call.limits.write_max else None
            if _modified(call, old, data):
                raise ToolFailure("stale_read", STALE)
            if data is not None:
                form = decode(data)
                _refuse_binary(form, tagged=False)
        mark = b"" if content.startswith("\ufeff") else form.mark
        encoded = mark + content.encode(form.encoding)
        status = target.put(encoded, expected=old if call.seen else None)
    finally:
        target.close()
    seen = Seen(etag(status), crc32(encoded), True)
    facts = {
        "path": call.absolute(path),
        "type": "create" if old is None else "update",
        "bytes": len(encoded),
        "etag": etag(status),
    }
    if old is None or not old.st_size:
        return text(f"File created successfully at: {show(given)}{_CURRENT}", facts, seen=seen)
    return text(f"The file {show(given)} has been updated successfully.{_CURRENT}", facts, seen=seen)


def edit(call: Call) -> ToolAnswer:
    given: str = call.given["file_path"]
    old: str = call.given["old_string"]
    new: str = call.given["new_string"]
    shorter = trimmed(given, new)
    if old == (shorter if old else new):
        raise ToolFailure(
            "invalid_params", "No changes to make: old_string and new_string are exactly the same."
        )
    path = _located(call, given)
    if not path:
        raise _is_directory(call, given)
    if len(old) > call.limits.write_max or len(new) > call.limits.write_max:
        words = f"The strings exceed the maximum allowed size ({call.limits.write_max} bytes)."
        raise ToolFailure("too_large", words, limit=call.limits.write_max)
    return _attempted(call, given, path, lambda made: _edit(call, given, path, old, new, shorter, made))


def _edit(
    call: Call, given: str, path: str, old: str, new: str, shorter: str, made: list[Made]
) -> ToolAnswer:
    target = _EditTarget(call, path, create=not old, made=made)
    try:
        before = target.old
        if before is None:
            if old:
                raise ToolFailure("not_found", missing(call, path))
            data, form = b"", _PLAIN
        else:
            if path.endswith(".ipynb") and old:
                words = "File is a Jupyter Notebook. Use the NotebookEdit to edit this file."
                raise ToolFailure("not_a_file", words)
            data = target.read()
            form = decode(data)
            if not old and form.text.strip():
                words = "Cannot create new file - file already exists."
                raise ToolFailure("conflict", words)
            if call.read_first and call.seen is None:
                raise ToolFailure("stale_read", _UNREAD, tagged=bool(old))
            _refuse_binary(form, tagged=True)
        modified = before is not None and _modified(call, before, data)
        if before is None:
            result, count = new, 1
        else:
            result, count = replaced(call, form, old, shorter, modified=modified)
        encoded = form.encode(result)
        status = target.put(encoded, expected=before)
    finally:
        target.close()
    known = before is None or (call.seen is not None and call.seen.whole and not modified)
    note = _CHANGED if modified else _CURRENT if known else ""
    done = "." if not call.given.get("replace_all") else ". All occurrences were successfully replaced."
    words = f"The file {show(given)} has been updated{' successfully' if done == '.' else ''}{done}{note}"
    facts = {"path": call.absolute(path), "replaced": count, "bytes": len(encoded), "etag": etag(status)}
    seen = None
    if known or call.seen is not None:
        seen = Seen(etag(status), crc32(encoded), known)
    return text(words, facts, seen=seen)


def _refused(call: Call, given: str, path: str, error: GatewayError) -> ToolFailure:
    tool = call.tool
    match error.facts.get("reason"):
        case "missing":
            return ToolFailure("not_found", missing(call, path), tagged=tool == "Edit")
        case "directory":
            return _is_directory(call, given)
        case "through_file":
            words = f"Error calling tool ({tool}): ENOTDIR: not a directory, stat '{call.absolute(path)}'"
            return ToolFailure("not_a_file", words)
        case "outside" | "loop":
            return outside(call, "write", given, error)
        case "denied":
            words = f"Error calling tool ({tool}): EACCES: permission denied, open '{call.absolute(path)}'"
            return ToolFailure("forbidden", words)
        case "changed":
            return ToolFailure("conflict", "The file keeps changing on disk. Read it again, then try again.")
        case _:
            return failure(tool, error)
