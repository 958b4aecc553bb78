/** What the page has before its scripts: all test files share the modules that read it. */

document.head.innerHTML = '<meta name="agent-url" content="https://agents.example.com/run">';
