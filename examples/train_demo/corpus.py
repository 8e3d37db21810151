"""Collects the demo model's training text from Debian packages.

Downloads the packages named in `SOURCES`, unpacks them into a scratch folder
(nothing is installed), turns manual pages, HTML, dictionaries and source code
into plain text, removes repeats, and writes one train and one test file per
topic. A document is on the test side by a hash of its name, so a rerun gives
the same split; test text that also occurs in the training text is removed.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from multiprocessing import Pool
from pathlib import Path

TEST_PER_MILLE = 25
MIN_PARAGRAPH = 100  # shorter paragraphs are never treated as repeats
MAX_DOCUMENT_BYTES = 150_000  # longer files are mostly tables; keep their start


@dataclass(frozen=True)
class Document:
    """One file, chapter or group of entries; `name` decides its side of the split."""

    name: str
    text: str


@dataclass(frozen=True)
class Source:
    """A topic's packages, the reader that turns them into documents, and a size cap."""

    topic: str
    packages: tuple[str, ...]
    read: Callable[[Path], Iterator[Document]]
    cap_bytes: int
    licences: str


# --- text clean-up ---------------------------------------------------------


class _HtmlText(HTMLParser):
    """Plain text of a page: block tags become line breaks, <pre> is kept as it is."""

    BLOCKS = frozenset(
        ("p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "dt", "dd", "tr",
         "table", "pre", "section", "br", "li", "blockquote")
    )  # fmt: skip
    SKIPPED = frozenset(("script", "style", "head", "nav", "svg", "button", "select"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skip = 0
        self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.SKIPPED:
            self.skip += 1
        elif tag == "pre":
            self.pre += 1
            self.parts.append("\n\n")
        elif tag == "br":
            self.parts.append("\n")
        elif tag == "li":
            self.parts.append("\n- ")
        elif tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.SKIPPED:
            self.skip = max(0, self.skip - 1)
        elif tag == "pre":
            self.pre = max(0, self.pre - 1)
            self.parts.append("\n\n")
        elif tag in self.BLOCKS and tag != "li":
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.skip:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    parser = _HtmlText()
    parser.feed(page)
    return re.sub(r"[ \t]+\n", "\n", "".join(parser.parts))


def tidy(text: str) -> str:
    """Unix line ends, no trailing blanks, at most one empty line in a row."""
    text = text.replace("\r\n", "\n").replace("\xad", "")
    text = re.sub(r"[ \t\xa0]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def strip_licence_header(code: str) -> str:
    """Drops leading comment blocks that speak of copyright or a licence."""
    lines = code.split("\n")
    head = 0
    in_block = False
    for i, line in enumerate(lines[:80]):
        s = line.strip()
        if in_block or s.startswith("/*"):
            in_block = "*/" not in s
            head = i + 1
        elif not s or s.startswith(("//", "#!", "# ", "#\t")) or s == "#":
            head = i + 1
        else:
            break
    header = "\n".join(lines[:head])
    if re.search(r"copyright|licen[cs]e|SPDX", header, re.I):
        return "\n".join(lines[head:])
    return code


def is_plain_english(text: str) -> bool:
    sample = text[:20_000]
    ascii_share = sum(c < "\x7f" for c in sample) / max(1, len(sample))
    letters = sum(c.isalpha() or c.isspace() for c in sample) / max(1, len(sample))
    return ascii_share > 0.97 and letters > 0.55


def read_text(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    return data.decode("utf-8", errors="replace").replace("\ufffd", "?")


# --- readers, one per topic ------------------------------------------------


def _render_man_page(path: str) -> Document | None:
    source = read_text(Path(path))
    if source.lstrip().startswith(".so ") or len(source) < 600:
        return None
    done = subprocess.run(
        ["mandoc", "-T", "utf8", "-O", "width=78"],
        input=source.encode(),
        capture_output=True,
    )
    text = re.sub(".\x08", "", done.stdout.decode("utf-8", errors="replace"))
    text = text.replace("\u2010", "-").replace("\u2212", "-").replace("\u2019", "'")
    lines = text.rstrip().split("\n")
    return Document(path.rsplit("/usr/", 1)[1], "\n".join(lines[:-1]))  # last: footer


def read_manual(root: Path) -> Iterator[Document]:
    pages = sorted(str(p) for p in root.glob("usr/share/man/man[1-9]*/*.gz") if not p.is_symlink())
    with Pool() as pool:
        for document in pool.imap(_render_man_page, pages, chunksize=32):
            if document is not None:
                yield document


def read_python(root: Path) -> Iterator[Document]:
    for path in sorted((root / "usr/lib").glob("python3*/**/*.py")):
        if path.is_file() and not path.is_symlink():
            code = strip_licence_header(read_text(path))
            if len(code) > 400:
                yield Document(str(path.relative_to(root)), code)


def _read_tar(path: Path, keep: re.Pattern[str]) -> Iterator[Document]:
    process = subprocess.Popen(["xz", "-dc", "-T0", str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
        for member in archive:
            if member.isfile() and keep.search(member.name):
                handle = archive.extractfile(member)
                if handle is not None:
                    code = handle.read().decode("utf-8", errors="replace")
                    yield Document(member.name, strip_licence_header(code))
    process.wait()


KERNEL_FILES = re.compile(
    r"^[^/]+/(?:(?:kernel|mm|fs|net|lib|block|crypto|ipc|init|security|virt|io_uring|sound/core"
    r"|drivers/(?:base|block|char|clk|cpufreq|dma|gpio|hid|hwmon|i2c|input|leds|md|mfd|mmc|mtd"
    r"|nvme|pci|power|rtc|spi|thermal|tty|usb|virtio|watchdog))/.*\.c|include/linux/.*\.h)$"
)
GLIBC_FILES = re.compile(
    r"^[^/]+/(?:stdlib|stdio-common|libio|malloc|string|posix|misc|io|time|inet|nptl|nss|elf"
    r"|locale|wcsmbs|resolv|sunrpc|socket|dirent)/[^/]*\.[ch]$"
)


def read_c(root: Path) -> Iterator[Document]:
    (kernel,) = (root / "usr/src").glob("linux-source-*.tar.xz")
    yield from _read_tar(kernel, KERNEL_FILES)
    (glibc,) = (root / "usr/src/glibc").glob("glibc-*.tar.xz")
    yield from _read_tar(glibc, GLIBC_FILES)


def read_rust(root: Path) -> Iterator[Document]:
    for path in sorted((root / "usr/src").glob("rustc-*/**/*.rs")):
        name = str(path.relative_to(root))
        if path.is_symlink() or "/stdarch/crates/core_arch" in name or "/test" in name:
            continue
        code = strip_licence_header(read_text(path))
        if len(code) > 300:
            yield Document(name, code)


def read_docs(root: Path) -> Iterator[Document]:
    share = root / "usr/share/doc"
    texts = [
        *(share / "linux-doc-6.1/Documentation").rglob("*.rst.gz"),
        *(share / "linux-doc-6.1/Documentation").rglob("*.rst"),
        *(share / "linux-doc-6.1/Documentation").rglob("*.txt.gz"),
        *(share / "python3.11/html/_sources").rglob("*.txt"),
        *(share / "cmake-data/html").rglob("*.rst.txt"),
        *(share / "git-doc").rglob("*.txt*"),
        *(share / "debian-policy").glob("*.txt.gz"),
        *(share / "developers-reference").rglob("*.txt.gz"),
        *(share / "debian-reference-en").rglob("*.txt.gz"),
        *(root / "usr/share/perl").rglob("*.pod"),
    ]
    pages = [
        *(share / "postgresql-doc-15/html").rglob("*.html"),
        *(share / "python-django-doc/html").rglob("*.html"),
        *(share / "sqlite3").rglob("*.html"),
        *(share / "ncurses-doc").rglob("*.html"),
        *(share / "networkx-2.8.8").rglob("*.html"),
    ]
    for book in ("book", "reference", "nomicon", "rust-by-example", "embedded-book"):
        pages += (share / "rust-doc/html" / book).rglob("*.html")
    for path in sorted(set(texts + pages)):
        name = str(path.relative_to(root))
        if not path.is_file() or path.is_symlink():
            continue
        if re.search(r"translations/|/_modules/|genindex|/print\.html|searchindex|RelNotes", name):
            continue
        text = read_text(path)
        yield Document(name, html_text(text) if name.endswith(".html") else text)


def _dict_entries(base: Path) -> Iterator[str]:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    value = {c: i for i, c in enumerate(digits)}

    def number(code: str) -> int:
        out = 0
        for c in code:
            out = out * 64 + value[c]
        return out

    body = gzip.decompress(base.with_suffix(".dict.dz").read_bytes())
    spans = set()
    for line in base.with_suffix(".index").read_text(errors="replace").splitlines():
        word, offset, length = line.split("\t")[:3]
        if not word.startswith("00"):
            spans.add((number(offset), number(length)))
    for offset, length in sorted(spans):
        yield body[offset : offset + length].decode("utf-8", errors="replace").strip()


def _wordnet_entries(root: Path) -> Iterator[str]:
    kinds = {"noun": "n", "verb": "v", "adj": "adj", "adv": "adv"}
    for kind, short in kinds.items():
        for line in (root / f"usr/share/wordnet/data.{kind}").read_text().splitlines():
            if line.startswith("  "):
                continue
            fields, _, gloss = line.partition("|")
            columns = fields.split()
            words = columns[4 : 4 + 2 * int(columns[3], 16) : 2]
            names = ", ".join(re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in words)
            yield f"{names} ({short}.): {gloss.strip()}"


def _grouped(name: str, entries: Iterator[str], size: int, joiner: str) -> Iterator[Document]:
    group: list[str] = []
    count = 0
    for entry in entries:
        group.append(entry)
        if len(group) == size:
            yield Document(f"{name}/{count}", joiner.join(group))
            group, count = [], count + 1
    if group:
        yield Document(f"{name}/{count}", joiner.join(group))


def read_dictionary(root: Path) -> Iterator[Document]:
    for name in ("gcide", "foldoc", "jargon", "devil"):
        entries = _dict_entries(root / "usr/share/dictd" / name)
        yield from _grouped(name, entries, 25, "\n\n")
    yield from _grouped("wordnet", _wordnet_entries(root), 40, "\n")


# Left out: files in other languages, drawings, and jokes about groups of people.
FORTUNE_FILES = (
    "art", "computers", "cookie", "debian", "definitions", "disclaimer", "education", "food",
    "fortunes", "goedel", "humorists", "kids", "knghtbrd", "law", "linux", "linuxcookie",
    "literature", "love", "magic", "medicine", "miscellaneous", "news", "paradoxum", "people",
    "perl", "pets", "platitudes", "politics", "riddles", "science", "songs-poems", "sports",
    "tao", "wisdom", "work",
)  # fmt: skip


def read_prose(root: Path) -> Iterator[Document]:
    share = root / "usr/share/doc"
    for path in sorted((share / "anarchism/markdown").glob("*.md*")):
        yield Document(str(path.relative_to(root)), read_text(path))
    for path in sorted((share / "debian-handbook/html/en-US").glob("*.html")):
        yield Document(str(path.relative_to(root)), html_text(read_text(path)))
    for path in sorted((share / "debian").rglob("*.txt*")):
        yield Document(str(path.relative_to(root)), read_text(path))
    for name in FORTUNE_FILES:
        text = read_text(root / "usr/share/games/fortunes" / name)
        yield from _grouped(f"fortunes/{name}", iter(text.split("\n%\n")), 15, "\n%\n")


def read_scripture(root: Path) -> Iterator[Document]:
    command = [
        str(root / "usr/bin/bible"),
        *("-p", str(root / "usr/lib"), "-l100000", "gen1:1-rev22:21"),
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    text = done.stdout.decode("latin-1")
    for chapter in re.split(r"\n(?=\S.* \d+\n\n)", "\n" + text.strip()):
        chapter = re.sub(r"(?m)^ +", "", chapter.strip())
        if chapter:
            yield Document("kjv/" + chapter.split("\n", 1)[0], chapter)


SOURCES = (
    Source("scripture", ("bible-kjv", "bible-kjv-text"), read_scripture, 10**9, "public domain"),
    Source(
        "prose",
        ("anarchism", "debian-handbook", "doc-debian", "debian-faq", "fortunes", "fortunes-min"),
        read_prose,
        10**9,
        "GPL-2+ and GFDL (anarchism), CC-BY-SA-3.0 and GPL-2+ (handbook), GPL-2+ (Debian FAQ), "
        "public domain and BSD-style collection (fortunes)",
    ),
    Source(
        "dictionary",
        ("dict-gcide", "dict-foldoc", "dict-jargon", "dict-devil", "wordnet-base"),
        read_dictionary,
        45_000_000,
        "GPL-3+ (gcide), GFDL (foldoc), public domain (jargon, devil), WordNet licence (BSD-style)",
    ),
    Source(
        "manual",
        (
            *("manpages", "manpages-dev", "coreutils", "git-man", "perl-doc", "glibc-doc"),
            *("freebsd-manpages", "findutils", "util-linux", "systemd", "libssl-doc"),
            *("ncurses-doc", "tcl8.6-doc", "tk8.6-doc", "libbsd-dev", "openssh-client"),
            *("iproute2", "zsh-common", "bash", "ffmpeg", "imagemagick-6-common", "tar", "gnupg"),
            *("dpkg-dev", "nmap", "postgresql-client-15", "e2fsprogs", "lvm2", "xfsprogs"),
            *("btrfs-progs", "libcurl4-doc", "libpcap0.8-dev", "libarchive-dev", "libx11-doc"),
            *("sudo", "rsync", "procps", "openssl", "iptables"),
        ),
        read_manual,
        55_000_000,
        "mostly GPL-2+, BSD, MIT/X11, Artistic and the man-pages verbatim licence, by page",
    ),
    Source(
        "python",
        (
            *("libpython3.11-stdlib", "python3-sympy", "python3-django", "python3-scipy"),
            *("python3-sklearn", "python3-networkx", "python3-sqlalchemy", "python3-twisted"),
            *("python3-matplotlib", "python3-numpy", "python3-pandas"),
        ),
        read_python,
        75_000_000,
        "PSF (standard library), BSD-3-Clause (most), MIT (SQLAlchemy, Twisted)",
    ),
    Source(
        "c",
        ("linux-source-6.1", "glibc-source"),
        read_c,
        90_000_000,
        "GPL-2 (Linux), LGPL-2.1+ (glibc)",
    ),
    Source("rust", ("rust-src",), read_rust, 60_000_000, "MIT or Apache-2.0"),
    Source(
        "docs",
        (
            *("linux-doc-6.1", "python3.11-doc", "cmake-doc", "git-doc", "debian-policy"),
            *("developers-reference", "debian-reference-en", "perl-doc", "postgresql-doc-15"),
            *("python-django-doc", "sqlite3-doc", "ncurses-doc", "python3-networkx", "rust-doc"),
        ),
        read_docs,
        70_000_000,
        "GPL-2 (Linux, git, Debian), PSF (Python), BSD-3-Clause (CMake, Django), PostgreSQL, "
        "public domain (SQLite), GPL-1+/Artistic (Perl), MIT or Apache-2.0 (Rust)",
    ),
)


# --- collection ------------------------------------------------------------


def fetch_packages(work: Path) -> dict[str, str]:
    """Downloads and unpacks every package; returns the version of each."""
    debs, root = work / "debs", work / "root"
    debs.mkdir(parents=True, exist_ok=True)
    root.mkdir(exist_ok=True)
    names = sorted({name for source in SOURCES for name in source.packages})
    here = {path.name.split("_")[0] for path in debs.glob("*.deb")}
    missing = [name for name in names if name not in here]
    if missing:
        subprocess.run(["apt-get", "download", "-qq", *missing], cwd=debs, check=True)
    versions = {}
    for path in sorted(debs.glob("*.deb")):
        name, version = path.name.split("_")[:2]
        if name not in names:
            continue
        versions[name] = version.replace("%3a", ":")
        stamp = work / "unpacked" / path.name
        if not stamp.exists():
            subprocess.run(["dpkg", "-x", str(path), str(root)], check=True)
            stamp.parent.mkdir(exist_ok=True)
            stamp.touch()
    return versions


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def drop_repeats(text: str, seen: set[int]) -> str:
    """Removes long paragraphs that are in `seen`, and adds the others to it."""
    kept = []
    for paragraph in text.split("\n\n"):
        if len(paragraph) >= MIN_PARAGRAPH:
            key = hash_of(re.sub(r"\W+", " ", paragraph))
            if key in seen:
                continue
            seen.add(key)
        kept.append(paragraph)
    return "\n\n".join(kept)


def collect(source: Source, root: Path, out: Path) -> dict[str, int]:
    """Writes `<topic>.train.jsonl` and `.test.jsonl`, one JSON string a line."""
    raw_bytes = 0
    documents = []
    for document in source.read(root):
        raw_bytes += len(document.text)
        text = tidy(document.text[:MAX_DOCUMENT_BYTES])
        if source.topic in ("scripture", "dictionary") or is_plain_english(text):
            documents.append(Document(document.name, text))
    documents.sort(key=lambda d: hash_of(d.name))  # a fixed shuffle
    train = [d for d in documents if hash_of("split " + d.name) % 1000 >= TEST_PER_MILLE]
    test = [d for d in documents if hash_of("split " + d.name) % 1000 < TEST_PER_MILLE]
    counts = {"raw_bytes": raw_bytes}
    seen: set[int] = set()
    for side, group, cap in (
        ("train", train, source.cap_bytes),
        ("test", test, source.cap_bytes * TEST_PER_MILLE // 1000),
    ):
        written = kept = 0
        with open(out / f"{source.topic}.{side}.jsonl", "w", encoding="utf-8") as handle:
            for document in group:
                if written >= cap:
                    break
                text = drop_repeats(document.text, seen)
                if len(text) < max(200, 0.2 * len(document.text)):
                    continue
                handle.write(json.dumps(text, ensure_ascii=False) + "\n")
                written += len(text.encode())
                kept += 1
        counts[f"{side}_bytes"], counts[f"{side}_documents"] = written, kept
    return counts


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder (about 4 GB)")
    parser.add_argument("--topic", action="append", help="only this topic (repeatable)")
    return parser


def main() -> None:
    args = setup_arg_parser().parse_args()
    work = args.work.resolve()
    versions = fetch_packages(work)
    out = work / "text"
    out.mkdir(exist_ok=True)
    record_path = out / "sources.json"
    os.environ["LC_ALL"] = "C.UTF-8"
    for source in SOURCES:
        if args.topic and source.topic not in args.topic:
            continue
        counts = collect(source, work / "root", out)
        packages = {name: versions[name] for name in source.packages if name in versions}
        record = json.loads(record_path.read_text()) if record_path.exists() else {}
        record[source.topic] = {"packages": packages, "licences": source.licences, **counts}
        record_path.write_text(json.dumps(record, indent=1) + "\n")
        print(source.topic, counts, flush=True)


if __name__ == "__main__":
    main()
