"""Configuration of every data source. Pure Python: importing it loads no framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


def require(ok: bool, key: str, value: object, expected: str, remedy: str) -> None:
    """Raise the ValueError every range check of this file shares."""
    if not ok:
        raise ValueError(f"data.{key}={value!r} is out of range: expected {expected}; {remedy}")


@dataclass
class DataConfig:
    """Base of every data configuration; `configs/data/<option>.yaml` picks the subclass."""

    name: str = "???"
    "Which data: the stem of its file, e.g. `stdlib` for training/data/stdlib.py."


@dataclass
class CorpusConfig(DataConfig):
    """Documents of text, packed into one sequence of tokens and cut into windows."""

    seq_len: int = 256
    "Tokens predicted per training window, T; a window carries T + 1 tokens."
    batch_size: int = 16
    "Windows per optimiser step, over all processes."
    heldout_fraction: float = 0.04
    "Fraction of the documents held out, chosen by the hash of their names."
    heldout_bytes: int | None = 400_000
    "Upper limit of the held-out part in bytes; null for none."
    eval_stride: int | None = None
    "Tokens an evaluation window advances by; null means seq_len; smaller gives more context."
    document_mask: bool = False
    "Hand out segment ids, so that attention can stay inside a document."
    shuffle_bytes: bool = False
    "Negative control: permute the tokens of the corpus (in memory), so that only counts survive."
    tokenizer: str | None = None
    "null for bytes; else a tokenizer.json, a directory that holds one, or a name on the hub."

    def __post_init__(self) -> None:
        require(self.seq_len >= 1, "seq_len", self.seq_len, "at least 1", "try 256")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1", "try 16")
        require(
            0.0 < self.heldout_fraction < 1.0,
            "heldout_fraction",
            self.heldout_fraction,
            "a fraction between 0 and 1",
            "try 0.04",
        )
        require(
            self.heldout_bytes is None or self.heldout_bytes >= 1,
            "heldout_bytes",
            self.heldout_bytes,
            "at least 1 byte",
            "use null for no limit",
        )
        require(
            self.eval_stride is None or 1 <= self.eval_stride <= self.seq_len,
            "eval_stride",
            self.eval_stride,
            f"1 to data.seq_len={self.seq_len}",
            "use null for data.seq_len",
        )
        require(
            self.tokenizer is None or bool(self.tokenizer.strip()),
            "tokenizer",
            self.tokenizer,
            "a path or a hub name",
            "use null for bytes",
        )


@dataclass
class StdlibConfig(CorpusConfig):
    """The sources of the running interpreter's standard library: real text on every machine."""

    name: str = "stdlib"
    "Which data: the stem of its file."
    by_package: bool = False
    "One document per package, its files one after another: long documents."


@dataclass
class FilesConfig(CorpusConfig):
    """Local files: text, source code, JSON lines, parquet."""

    name: str = "files"
    "Which data: the stem of its file."
    paths: list[str] = field(default_factory=list)
    "Files, directories or globs (** recurses): text, source code, .jsonl, .parquet."
    text_field: str = "text"
    "Field (.jsonl) or column (.parquet) that holds a document's text."


@dataclass
class HubConfig(CorpusConfig):
    """A Hugging Face data set, streamed by name and cached as blocks of tokens."""

    name: str = "hub"
    "Which data: the stem of its file."
    dataset: str = "HuggingFaceFW/fineweb-edu"
    "Name of the data set on the hub."
    subset: str | None = None
    "Configuration of the data set, e.g. sample-10BT; null for its default."
    split: str = "train"
    "Split of the data set."
    revision: str | None = None
    "Branch, tag or commit; null for main, pinned to the commit found at first contact."
    text_field: str = "text"
    "Column that holds a document's text."
    cache_dir: str = "${oc.env:AFFERENT_CACHE,'~/.cache/afferent'}"
    "Folder of the cached blocks; local disk is best."
    block_tokens: int = 2**22
    "Tokens per cached block; windows are visited in random order inside a block."
    heldout_documents: int = 1000
    "Documents at the start of the stream that are kept from training."

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.dataset.strip()), "dataset", self.dataset, "a name", "e.g. owner/name")
        require(
            self.block_tokens > self.seq_len,
            "block_tokens",
            self.block_tokens,
            f"more than data.seq_len={self.seq_len}",
            "try 4194304",
        )
        require(
            self.heldout_documents >= 1,
            "heldout_documents",
            self.heldout_documents,
            "at least 1",
            "try 1000",
        )


class MarkovKind(StrEnum):
    successors = "successors"
    dirichlet = "dirichlet"


@dataclass
class MarkovConfig(DataConfig):
    """Documents that each draw a Markov chain of their own; the best possible loss is known."""

    name: str = "markov"
    "Which data: the stem of its file."
    kind: MarkovKind = MarkovKind.successors
    "successors: equally likely ones, drawn without replacement; dirichlet: distributions over all."
    vocab_size: int = 16
    "Number of token ids V."
    order: int = 1
    "Tokens of context that decide the next one's distribution."
    successors: int = 2
    "Successors s of each context (kind=successors)."
    alpha: float = 0.1
    "Concentration per token of the Dirichlet distribution (kind=dirichlet)."
    zipf: float = 0.0
    "Exponent of the Zipf law of the Dirichlet's mean (kind=dirichlet); 0 is uniform."
    switch_every: int | None = None
    "Draw the document's table anew every this many tokens; null keeps it."
    seq_len: int = 256
    "Tokens predicted per document, T; a document carries T + 1 tokens."
    batch_size: int = 16
    "Documents per optimiser step, over all processes."

    def __post_init__(self) -> None:
        for key, low in (("order", 1), ("successors", 1), ("seq_len", 1), ("batch_size", 1)):
            value = getattr(self, key)
            require(value >= low, key, value, f"at least {low}", "raise it")
        require(self.vocab_size >= 2, "vocab_size", self.vocab_size, "at least 2", "try 16")
        require(
            self.successors <= self.vocab_size,
            "successors",
            self.successors,
            f"at most data.vocab_size={self.vocab_size}",
            "try 2",
        )
        require(
            self.vocab_size ** (self.order + 1) <= 2**24,
            "order",
            self.order,
            "a table of at most 2**24 entries, vocab_size ** (order + 1)",
            "lower it or data.vocab_size",
        )
        require(self.alpha > 0, "alpha", self.alpha, "above 0", "try 0.1")
        require(self.zipf >= 0, "zipf", self.zipf, "at least 0", "try 1")
        require(
            self.switch_every is None or self.switch_every >= 1,
            "switch_every",
            self.switch_every,
            "at least 1 token",
            "use null to keep the table",
        )


@dataclass
class FactsConfig(DataConfig):
    """Documents that state facts, a value for each of some keys, and then ask for them."""

    name: str = "facts"
    "Which data: the stem of its file."
    keys: int = 64
    "Number of distinct keys; a document's facts have keys of their own each."
    values: int = 64
    "Number of distinct values."
    facts: list[int] = field(default_factory=lambda: [4, 8, 16, 32])
    "Numbers of facts of a document: each batch takes one of them, the evaluation all."
    context_weight: float = 0.0
    "Weight in the training loss of tokens that are no answers; answers have 1."
    seq_len: int = 128
    "Tokens predicted per document, T, two for each fact and each question; it carries T + 1."
    batch_size: int = 32
    "Documents per optimiser step, over all processes."

    def __post_init__(self) -> None:
        for key in ("keys", "values", "batch_size"):
            value = getattr(self, key)
            require(value >= 1, key, value, "at least 1", "raise it")
        require(
            bool(self.facts) and all(1 <= n <= self.keys for n in self.facts),
            "facts",
            self.facts,
            f"numbers from 1 to data.keys={self.keys}",
            "try [4, 8, 16]",
        )
        require(
            self.seq_len % 2 == 0 and self.seq_len >= 2 * max(self.facts) + 2,
            "seq_len",
            self.seq_len,
            f"even, and room for {max(self.facts)} facts and a question",
            f"set it to at least {2 * max(self.facts) + 2}",
        )
        require(
            self.context_weight >= 0,
            "context_weight",
            self.context_weight,
            "at least 0",
            "try 0.1",
        )

    @property
    def vocab_size(self) -> int:
        """One token begins a document; then come keys and values."""
        return 1 + self.keys + self.values


@dataclass
class StatementsConfig(DataConfig):
    """Documents of statements in several wordings, and prompts about them."""

    name: str = "statements"
    "Which data: the stem of its file."
    keys: int = 64
    "Number of distinct keys, the subjects of statements."
    values: int = 64
    "Number of distinct values, their objects."
    statements: list[int] = field(default_factory=lambda: [4, 8, 16, 31])
    "Numbers of statements of a document, four tokens or less each."
    from_step: list[int] = field(default_factory=list)
    "Step from which on documents have each of these numbers, in rising order; [] for all at once."
    conflicts: float = 0.1
    "Share of the statements, in pairs, of which the later one replaces the object of the other."
    links: float = 0.2
    "Share of the statements, in pairs, of which one has the other's subject for its object."
    prompts: dict[str, float] = field(
        default_factory=lambda: {
            "what": 3.0,
            "give": 3.0,
            "who": 3.0,
            "hop": 3.0,
            "none": 1.0,
            "list": 1.0,
            "json": 1.0,
            "flip": 1.0,
        }
    )
    "How often each kind of prompt comes, relative to the others."
    ask: float = 0.2
    "Share of the prompts whose question the model learns to write, too."
    gap: int = 64
    "Most positions that are left out before the prompts, in every other batch."
    context_weight: float = 0.1
    "Weight in the training loss of tokens that are no answers; answers have 1, questions 0."
    seq_len: int = 208
    "Tokens predicted per sequence, T: a document and prompts; it carries T + 1."
    batch_size: int = 32
    "Sequences per optimiser step, over all processes."

    def __post_init__(self) -> None:
        for key in ("keys", "values", "batch_size"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1", "raise it")
        largest = min(self.keys - 1, self.values)
        require(
            bool(self.statements) and all(2 <= n <= largest for n in self.statements),
            "statements",
            self.statements,
            f"numbers from 2 to {largest}, fewer than data.keys and no more than data.values",
            "try [4, 8, 16]",
        )
        for key in ("conflicts", "links", "ask"):
            require(0 <= getattr(self, key) < 1, key, getattr(self, key), "in [0, 1)", "try 0.2")
        require(
            self.conflicts + self.links <= 1,
            "links",
            self.links,
            f"at most 1 - data.conflicts={1 - self.conflicts:g}",
            "lower one of them",
        )
        unknown = sorted(set(self.prompts) - set(PROMPTS))
        require(
            not unknown and any(share > 0 for share in self.prompts.values()),
            "prompts",
            self.prompts,
            f"shares of {', '.join(PROMPTS)}, some above 0",
            "remove the others",
        )
        require(
            self.statements == sorted(set(self.statements))
            and self.from_step in ([], sorted(self.from_step))
            and len(self.from_step) in (0, len(self.statements))
            and not any(self.from_step[:1]),
            "from_step",
            self.from_step,
            f"a step for each of data.statements={self.statements}, both rising, the first 0",
            "use [] for no curriculum",
        )
        for key in ("gap", "context_weight"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "at least 0", "try 0")
        self.check_length()

    def check_length(self) -> None:
        """A sequence holds a document and prompts."""
        longest = statements_length(max(self.statements))
        require(
            self.seq_len > longest,
            "seq_len",
            self.seq_len,
            f"more than the {longest} tokens of a document of {max(self.statements)} statements",
            f"try {longest + 80}",
        )

    @property
    def vocab_size(self) -> int:
        """Words, then keys, then values."""
        return STATEMENT_WORDS + self.keys + self.values


class Author(StrEnum):
    grammar = "grammar"
    model = "model"


@dataclass
class SelfStudyConfig(StatementsConfig):
    """Conversations about a few documents of statements, to train cartridges on."""

    name: str = "self_study"
    "Which data: the stem of its file."
    statements: list[int] = field(default_factory=lambda: [31])
    "Number of statements of a document."
    documents: int = 6
    "Documents that are studied side by side, each by itself."
    asked: float = 0.5
    "Share of the statements that are asked for directly; the others are seen in rewritings only."
    prompts: dict[str, float] = field(
        default_factory=lambda: {
            "what": 4.0,
            "hop": 1.0,
            "list": 2.0,
            "json": 2.0,
            "flip": 2.0,
            "none": 1.0,
        }
    )
    "How often each kind of prompt comes, relative to the others."
    author: Author = Author.grammar
    "Who writes the conversations: grammar, or model, which then asks whatever it likes."
    chunk: int | None = None
    "Tokens of the document that the teacher sees; null for all."
    disjoint: bool = False
    "Give every document keys of its own, so that a question tells which one it is about."
    scrambled: bool = False
    "Control: study documents whose objects are shuffled among the statements."
    seq_len: int = 48
    "Tokens predicted per conversation, T."
    batch_size: int = 8
    "Conversations per document and step."

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.statements) == 1, "statements", self.statements, "one number", "keep one")
        require(self.documents >= 1, "documents", self.documents, "at least 1", "raise it")
        share = self.keys // self.documents
        require(
            not self.disjoint or share > self.statements[0],
            "disjoint",
            self.disjoint,
            f"more than {self.statements[0]} keys for each of {self.documents} documents",
            "lower data.statements or data.documents, or raise data.keys",
        )
        require(0 <= self.asked <= 1, "asked", self.asked, "a share", "try 0.5")
        require(
            self.author == Author.grammar or self.chunk is None,
            "author",
            self.author.value,
            "grammar where the teacher sees a chunk",
            "set data.chunk=null",
        )
        whole = statements_length(self.statements[0])
        require(
            self.chunk is None or 16 <= self.chunk <= whole,
            "chunk",
            self.chunk,
            f"16 to {whole} tokens",
            "use null for the whole document",
        )

    def check_length(self) -> None:
        """A conversation holds a prompt: the document itself is not part of it."""
        require(self.seq_len >= 8, "seq_len", self.seq_len, "at least 8", "try 48")


@dataclass
class ConversationsConfig(DataConfig):
    """Conversations about a corpus, as `afferent synthesise` writes them."""

    name: str = "conversations"
    "Which data: the stem of its file."
    path: str = "???"
    "Directory of the shards."
    heldout: int = 32
    "Last conversations, which are kept from training."
    seq_len: int = 1024
    "Tokens predicted per conversation, T; longer ones are cut."
    batch_size: int = 32
    "Conversations per optimiser step, over all processes."

    def __post_init__(self) -> None:
        for key in ("heldout", "seq_len", "batch_size"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1", "raise it")


PROMPTS = ("what", "give", "who", "hop", "none", "list", "json", "flip")
"Kinds of prompts about statements."
STATEMENT_WORDS = 24
"Token ids of statements that are neither keys nor values."


def statements_length(statements: int) -> int:
    """Tokens of a document with so many statements: filled up to a multiple of 16."""
    return -(-(1 + 4 * statements) // 16) * 16
