"""The documentation's snippets: found, and run as a reader would, on small stand-ins.

Blocks run in the order of their page: Python in one namespace for each section, so that models of
one section do not live on in the next; shell commands in a folder that the whole page shares.
Nothing is fetched: models of the Hub are exchanged for small ones, and then GB become MB, which is
about the proportion. What cannot run here has its options parsed by the real parser instead, so
that a renamed option fails.

What a fence says after its language: `python signature` is not run, `text output` is what the block
before it prints.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import io
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import markdown_it
import mlx.core as mx
from conftest import remove_patches
from serving import serving

from mlx_streamexperts import CheckpointError

ROOT = Path(__file__).parent.parent
_SCRIPTS = re.search(
    r"\[project\.scripts\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S
)

STAND_INS = {
    "./my-model": "copy",
    "./original": "original",
    "mlx-community/Kimi-K2.5": "demo",
    "mlx-community/Qwen3-30B-A3B-4bit": "demo",
    "mlx-community/Qwen3-235B-A22B-4bit": "demo",
    "mlx-community/Qwen3.5-397B-A17B-4bit": "demo",
}
"""Models that the documentation names: "demo" is the embedded one, "copy" a
copy that commands may change, "original" a tiny unconverted
checkpoint with experts one by one."""

PARSED_ONLY = {
    "chat": "asks at a terminal",
    "report": "measures for minutes; test_report.py runs a shorter one",
    "run": "another program, which may need anything",
    "server": "serves until it is stopped",
}
"""Our commands that are not run, and why. Their options are parsed."""

NOT_OURS = {
    "brew": "macOS", "cd": "a folder's name", "curl": "needs a server", "deactivate": "shell",
    "diskutil": "macOS", "docker": "network", "export": "shell", "git": "network",
    "hf": "network", "kill": "shell", "mdutil": "macOS", "memory_pressure": "macOS",
    "open-webui": "serves", "source": "shell", "sysctl": "macOS", "system_profiler": "macOS",
    "tmutil": "macOS", "vm_stat": "macOS",
}  # fmt: skip
"""Programs that are not run, and why. JSON that `curl` sends is parsed."""

SHORTER = {
    "bench": ["-p", "16", "-g", "4", "-n", "1"],
    "doctor": ["--drive-seconds", "0.01"],
    "generate": ["--max-tokens", "20"],
    "quality": ["--tokens", "40", "--window", "40", "--task-items", "1", "--try", "1"],
    "tune": ["--tokens", "4", "--warm-up", "2", "--trials", "1"],
}
"""What our commands get at their end, where the last of an option counts: less to wait for."""

_SEPARATORS = set("&|;\n")
_SIZE = re.compile(r"(memory ?= ?)?(\"?)\b(\d+(?:\.\d+)?) ?G(i?B)\b")
_LEAST_MEMORY_MB = 90  # of the embedded model with the default options, so that it streams


@dataclass(frozen=True)
class Snippet:
    """One fenced block.

    Attributes:
        file, line: where its fence is.
        section: headings before it in the page.
        language, info: what the fence says: the first word, and the rest.
        text: its content.
    """

    file: Path
    line: int
    section: int
    language: str
    info: str
    text: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def parse(file: Path) -> list[Any]:
    """A page's Markdown tokens."""
    return markdown_it.MarkdownIt("commonmark").enable("table").parse(file.read_text())


def snippets(file: Path) -> list[Snippet]:
    """A page's fenced blocks in order."""
    found, section = [], 0
    for token in parse(file):
        section += token.type == "heading_open"
        if token.type == "fence":
            language, _, info = token.info.strip().partition(" ")
            found.append(Snippet(file, token.map[0] + 1, section, language, info, token.content))
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a shell block, as words, without comments and redirections."""
    text = re.sub(r"(^|\s)#( .*)?$", r"\1", text.replace("\\\n", " "), flags=re.M)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="&|;<>\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    redirected = False
    for word in [*lexer, "\n"]:
        if set(word) <= _SEPARATORS:
            if words:
                yield words
            words, redirected = [], False
        elif set(word) <= {"<", ">"}:
            redirected = True
        elif redirected:
            redirected = False
        elif words or not re.fullmatch(r"\w+=.*", word):  # not a variable for the command
            words.append(word)


_ADDRESS = "127.0.0.1:8080"
"""Of the server in snippets; a running one takes its place."""


@dataclass
class Page:
    """The blocks of one page, run one after the other in the current folder.

    Attributes:
        models: what stands in for which kind of model.
    """

    models: dict[str, Path]
    namespace: dict[str, Any] = field(default_factory=dict)
    section: int = -1
    printed: str = ""

    def leave_section(self) -> None:
        """Let go of its models, and of mlx-lm."""
        remove_patches()
        if self.namespace:
            self.namespace = {}
            gc.collect()
            mx.clear_cache()

    def run(self, snippet: Snippet) -> None:
        """Run a block, or check what can be checked of it."""
        if snippet.info == "signature":
            return
        if snippet.info == "output":
            assert self.printed.strip() == snippet.text.strip(), f"{snippet}: prints otherwise"
            return
        run: Callable[[Snippet], None] | None = {
            "python": self._python,
            "bash": self._shell,
            "sh": self._shell,
            "json": lambda s: json.loads(s.text),
            "text": lambda _: None,
            "": lambda _: None,
        }.get(snippet.language)
        assert run is not None, f"{snippet}: how are blocks of {snippet.language!r} checked?"
        if snippet.section != self.section:
            self.leave_section()
            self.section = snippet.section
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                run(snippet)
        except CheckpointError as e:
            raise AssertionError(f"{snippet}: no stand-in in tests/snippets.py? {e}") from e
        self.printed = out.getvalue()

    def _python(self, snippet: Snippet) -> None:
        text, named = snippet.text, False
        for name, kind in STAND_INS.items():
            if f'"{name}"' in text:
                text, named = text.replace(f'"{name}"', repr(str(self.models[kind]))), True
        if named:
            text = _scaled(text)
        # As many lines before it as in the page: tracebacks then name the page's lines.
        with contextlib.ExitStack() as running:
            if _ADDRESS in text:  # a client, then
                port = running.enter_context(serving("--cache", "10MB")).port
                text = text.replace(_ADDRESS, f"127.0.0.1:{port}")
            code = compile("\n" * snippet.line + text, snippet.file, "exec")
            self.namespace.setdefault("__name__", "snippet")
            exec(code, self.namespace)

    def _shell(self, snippet: Snippet) -> None:
        for words in commands(snippet.text):
            try:
                self._command(self._mapped(words))
            except SystemExit as e:
                assert not e.code, f"{snippet}: {shlex.join(words)}: exit status {e.code}"

    def _mapped(self, words: list[str]) -> list[str]:
        mapped = [str(self.models[STAND_INS[w]]) if w in STAND_INS else w for w in words]
        if mapped == words:
            return words
        before = ["", *mapped]
        return [
            _scaled(f"memory={w}").removeprefix("memory=") if flag == "--memory" else _scaled(w)
            for flag, w in zip(before, mapped, strict=False)
        ]

    def _command(self, words: list[str]) -> None:
        if words[0] in ("sudo", "caffeinate"):
            words = words[2:] if words[1] == "-i" else words[1:]
        program, arguments = Path(words[0]).name, words[1:]
        if program in ("pip", "pip3"):
            check_requirements(arguments)
        elif program in ("python", "python3"):
            python(arguments, run=True)
        elif _SCRIPTS is not None and re.search(rf"^{program} *=", _SCRIPTS[1], re.M):
            if arguments and not arguments[0].startswith("-"):
                ours(arguments[0], arguments[1:], run=True)
        elif program == "mlx.launch":
            check_launched(arguments)
        else:
            assert program in NOT_OURS, f"no rule for {shlex.join(words)}: see tests/snippets.py"
            for word in words if program == "curl" else ():
                if word.startswith("{"):
                    json.loads(word)


def _scaled(text: str) -> str:
    """Sizes in GB as MB."""

    def scale(match: re.Match[str]) -> str:
        memory, quote, number, unit = match.groups()
        if memory and float(number) < _LEAST_MEMORY_MB:
            number = str(_LEAST_MEMORY_MB)
        return f"{memory or ''}{quote}{number}M{unit}"

    return _SIZE.sub(scale, text)


def python(arguments: list[str], run: bool) -> None:
    """`python ...`: our modules run, others' and scripts must be there."""
    if arguments[0] == "-c":
        compile(arguments[1], "-c", "exec")
        return
    if arguments[0] == "-m":
        package, _, command = arguments[1].partition(".")
        if package == "mlx_streamexperts" and command:
            ours(command, arguments[2:], run)
        else:
            assert importlib.util.find_spec(arguments[1]), f"no module {arguments[1]}"
        return
    script = ROOT / arguments[0]
    assert script.is_file(), f"no script {arguments[0]}"
    check_options(script, arguments[1:])


def ours(command: str, arguments: list[str], run: bool) -> None:
    """One of our commands, run in this process unless that cannot be."""
    module = importlib.import_module(f"mlx_streamexperts.{command}")
    shows = "--image" in arguments  # needs a model that sees; test_vlm_generation.py has some
    fetches = command == "pack" and not arguments[0].startswith("-")  # test_from_hub.py has a Hub
    if run and command not in PARSED_ONLY and not shows and not fetches:
        arguments = [*arguments, *SHORTER.get(command, ())]
        status = module.main(arguments)
        assert not status, f"{command} {shlex.join(arguments)}: exit status {status}"
    else:
        module.setup_arg_parser().parse_args(arguments)


def check_launched(arguments: list[str]) -> None:
    """What `mlx.launch` starts elsewhere: the options of the module or script in it."""
    start = next(i for i, w in enumerate(arguments) if w.endswith(".py") or w == "-m")
    python(arguments[start:], run=False)


def check_options(script: Path, arguments: list[str]) -> None:
    """A script's options are there: named in its text or in that of what it imports beside it."""
    text = script.read_text()
    for other in re.findall(r"^(?:import|from) (\w+)", text, re.M):
        if (beside := script.with_name(f"{other}.py")).is_file():
            text += beside.read_text()
    for word in arguments:
        if word.startswith("--"):
            option = word.partition("=")[0]
            assert re.search(rf'"{option}"', text), f"{script.name} has no option {option}"


def check_requirements(arguments: list[str]) -> None:
    """Extras in `pip install '.[cpu]'` and `'mlx-streamexperts[pack]'` are ours."""
    known = re.search(
        r"\[project\.optional-dependencies\]\n(.*?)\n\[",
        (ROOT / "pyproject.toml").read_text(),
        re.S,
    )
    assert known is not None
    extras = re.findall(r"^(\w+) *=", known[1], re.M)
    for word in arguments:
        if match := re.fullmatch(r"(?:\.|mlx-streamexperts)\[(.*)\]", word):
            for extra in match[1].split(","):
                assert extra in extras, f"pyproject.toml has no extra {extra!r}"


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept: str = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def anchors(file: Path) -> set[str]:
    """All anchors of a page."""
    found: dict[str, int] = {}
    tokens = parse(file)
    for opening, content in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(t.content for t in content.children if t.type in ("text", "code_inline"))
            name, again = slug(text), found.get(slug(text), 0)
            found[name] = again + 1
            if again:
                found[f"{name}-{again}"] = 1
    return set(found)


def links(file: Path) -> Iterator[str]:
    """Where a page's links and pictures lead."""
    for token in parse(file):
        for child in token.children or ():
            if target := child.attrs.get("href") or child.attrs.get("src"):
                yield str(target)


def inline_code(file: Path) -> Iterator[str]:
    """What a page's prose and tables have between backquotes."""
    for token in parse(file):
        yield from (t.content for t in token.children or () if t.type == "code_inline")
