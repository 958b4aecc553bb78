"""The Messages API adapter alone: how results look there."""

from __future__ import annotations

from gateway_client import anthropic
from gateway_client.results import ToolResult


def test_a_whole_pdf_is_a_document_for_the_messages_api() -> None:
    """A gateway without the extra `pdf` answers with the file itself."""
    resource = {"uri": "file:///srv/site/a.pdf", "mimeType": "application/pdf", "blob": "JVBERi0="}
    said = {"type": "text", "text": "PDF file read: /srv/site/a.pdf (5 bytes)"}
    source = {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}
    result = ToolResult([said, {"type": "resource", "resource": resource}])
    assert anthropic._blocks(result) == [said, {"type": "document", "source": source}]
