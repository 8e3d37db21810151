"""The report as data: dataclasses whose fields are the fields of its JSON file.

docs/make_report_schema.py writes the JSON schema and its page from these types and from comments
that start with `#:`. Sizes are bytes, times seconds, shares 0 to 1. Raise `VERSION` when a field
goes or changes its meaning; give a new field a default, so that older reports can be read.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from .._analysis.measure import DriveRate
from .._analysis.predict import Range

SCHEMA: Literal["mlx-streamexperts/report"] = "mlx-streamexperts/report"
VERSION: Literal[1] = 1
Share = Annotated[float, "0 to 1"]
T = TypeVar("T")


@dataclass_transform(field_specifiers=(field,))
class Record:
    """Its subclasses are dataclasses."""

    def __init_subclass__(cls) -> None:
        dataclass(cls)


class Spread(Record):
    median: float
    low: float  #: lowest
    high: float  #: highest

    @property
    def width(self) -> float:
        """Highest less lowest, as a share of the median."""
        return (self.high - self.low) / self.median


class Repeats(Spread):
    values: list[float]  #: each, in order

    @classmethod
    def of(cls, values: Sequence[float]) -> Repeats:
        return cls(statistics.median(values), min(values), max(values), list(values))


class Kind(Record):
    task: str
    language: str

    @property
    def name(self) -> str:
        return f"{self.task}, {self.language}"


class Host(Record):
    system: str
    architecture: str
    processor: str  #: empty if the system does not say
    cores: int
    memory_bytes: int
    mlx_device: str
    device: dict[str, int | str]  #: MLX's device_info


class Model(Record):
    name: str
    model_type: str
    sha256: str  #: of configuration and each shard's name, size and header
    bytes: int
    expert_layers: int
    experts: int  #: of a layer
    top_k: int  #: experts a token
    expert_bytes: int  #: of the largest
    experts_bytes: int  #: of all
    trunk_bytes: int
    cold_bytes_per_token: int  #: of experts, if none were resident


class Settings(Record):
    kind: str = "quick"  #: quick or full; the page says which
    prompts: int | None = None  #: how many of the shipped prompts; null: all
    prompt_tokens: int = 64  #: of a prompt, at most
    tokens: int = 24  #: generated after a prompt
    repeats: int = 3  #: of everything that is timed
    lengths: tuple[int, ...] = (16, 64, 256)  #: of prompts for the first token
    batches: tuple[int, ...] = (1, 2, 4)  #: sequences at once
    seconds: float = 0.2  #: of the drive, at each size and depth
    depths: tuple[int, ...] = (1, 4, 16)  #: reads in flight
    points: int = 5  #: throttled drives, by rate and by latency
    sustained: float = 0.5  #: minutes
    window: float = 1.0  #: seconds of decoding in one window of the sustained run
    shares: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.75)  #: resident, replayed
    alone: int = 8  #: tokens of each prompt decoded one by one, against stock
    bits: tuple[int, ...] = (3, 2)  #: of experts in the lossy what-ifs
    items: int | None = None  #: of the bundled task; null: all


class PromptSize(Kind):
    tokens: int


class Method(Record):
    machine: Host  #: hardware and system
    load_average: float | None  #: of the minute before; null: the system does not say
    versions: dict[str, str]  #: Python and libraries
    model: Model  #: the checkpoint
    options: dict[str, Any]  #: StreamConfig; whether there are a store and a hot set, not where
    resident_share: Share  #: slots of all experts
    cache_bytes: int  #: of all slots
    page_cache: str  #: how reads use it
    bypasses_page_cache: bool
    settings: Settings  #: how much was measured
    prompts: list[PromptSize]  #: in order; other lists follow it
    sampling: str
    warm_up: str


class ColdStart(Record):
    page_cache_dropped: bool  #: the files were dropped from it before
    load_s: float
    first_token_s: float
    prompt_tokens: int
    total_s: float


class Decoding(Record):
    token_s: float  #: seconds of a token after the first
    wait_s: float  #: of that, standing still for reads
    other_s: float  #: of that, all else
    hit_rate: Share  #: needed experts that were resident, tokens after the first
    read_bytes: float  #: a token
    reads: float  #: system calls that read, a token
    tokens_per_s: Repeats  #: tokens after the first


class PromptSpeed(Decoding, Kind):
    prompt_tokens: int
    first_token_s: Repeats  #: after a warm-up


class LengthSpeed(Record):
    prompt_tokens: int
    seconds: Repeats  #: to the first token
    tokens_per_s: Repeats  #: of the seven after


class BatchSpeed(Record):
    batch: int
    tokens_per_s: Repeats  #: of all together


class Window(Record):
    at_s: float  #: its end
    tokens_per_s: float  #: of decoding, without prompts
    celsius: dict[str, float]  #: by sensor
    throttled: list[str]  #: devices with clocks held down, and why


class Sustained(Record):
    seconds: float
    decode_s: float  #: of that, decoding; the rest went into prompts
    window_s: float  #: seconds of decoding in one
    tokens: int  #: each prompt's first token included
    windows: list[Window]  #: in order
    tokens_per_s: Spread  #: of windows
    drift: float | None  #: last third's median over the first's, less 1; null: too few windows
    dips: int  #: windows below 80 % of the median
    interrupted: bool  #: by Ctrl-C, before its time


class Speed(Record):
    cold_start: ColdStart  #: the first load
    tokens_per_s: Repeats | None = None  #: medians of the prompts
    by_prompt: list[PromptSpeed] | None = None  #: steady decoding
    by_prompt_length: list[LengthSpeed] | None = None  #: first token and decoding by length
    by_batch: list[BatchSpeed] | None = None  #: several sequences
    sustained: Sustained | None = None  #: decoding without a pause


class Percentile(Record):
    percentile: int
    bytes: float
    latency_s: float
    queued_s: float  #: waited before it began
    depth: float  #: in flight as it began, itself too


class Reads(Record):
    reads: int
    ahead: int  #: prefetches among them
    percentiles: list[Percentile]  #: 1 to 100

    def at(self, percentile: int) -> Percentile:
        return next(p for p in self.percentiles if p.percentile == percentile)


class Throttled(Record):
    bytes_per_s: float | None  #: of the throttle; null: this machine's own
    latency_s: float  #: added to each read
    tokens_per_s: Repeats  #: measured
    modelled_tokens_per_s: float  #: all but reads as measured on this machine's own drive


class CurvePoint(Record):
    bytes_per_s: float
    tokens_per_s: float


class NamedMachine(Record):
    name: str
    bytes_per_s: float  #: of its drive
    this_compute_tokens_per_s: float  #: its drive, this processor
    its_tokens_per_s: Range  #: predict() of the whole machine


class Sensitivity(Record):
    unthrottled: Decoding  #: this machine's own
    by_rate: list[Throttled]  #: at rates
    by_latency: list[Throttled]  #: at latencies
    curve: list[CurvePoint]  #: modelled
    machines: list[NamedMachine]  #: predictions
    median_error_of_model: float | None  #: share, of both series
    rate_factor: float = 1.0  #: in the model: reads' seconds at a rate, of those of their bytes
    latency_factor: float = 1.0  #: in the model: the same at a latency


class Drive(Record):
    bypasses_page_cache: bool
    rates: list[DriveRate] | None = None  #: random reads
    in_generation: Reads | None = None  #: reads while generating
    sensitivity: Sensitivity | None = None  #: slower drives


class CacheRow(Record):
    share: float
    policy: str
    hit_rate: float
    decode_hit_rate: float
    hits: int
    compulsory: int  #: misses that are first uses
    capacity: int  #: misses after eviction


class LayerRow(Record):
    share: float
    hit_rates: list[float]  #: by expert layer


class PromptRow(Record):
    prompt: int  #: index into method.prompts
    share: float
    hit_rate: float


class Caches(Record):
    policy: str  #: in force
    shares: list[float]  #: resident
    by_policy: list[CacheRow]  #: prompts one after another
    by_layer: list[LayerRow]  #: policy in force
    by_prompt_alone: list[PromptRow]  #: each from an empty cache


class KindRow(Record):
    name: str
    prompts: int
    hit_rate: float  #: mean
    low: float
    high: float


class ByKind(Record):
    share: float  #: resident, the one nearest to a quarter
    deviation: float  #: standard deviation of the hit rate over prompts
    task: list[KindRow]  #: by task
    language: list[KindRow]  #: by language


class Reuse(Record):
    shares: list[float]  #: distances
    uses: list[float]  #: share of uses at most so far apart
    first_uses: Share  #: without a distance


class Overlap(Record):
    lag: int  #: tokens apart
    shared: float
    by_chance: float


class Locality(Record):
    tokens: int  #: recorded, prompts included
    caches: Caches  #: replayed
    by_kind: ByKind  #: prompts by themselves, put together
    reuse: Reuse  #: distances: other experts used in between, over the layer's experts
    token_overlap: list[Overlap]  #: experts in common, same layer
    request_overlap: list[list[float]]  #: cosine of counts of uses, prompts by prompts


class Power(Record):
    sources: list[str]  #: of energy
    missing: dict[str, str]  #: why a source is not there, or failed
    watts_at_rest: dict[str, float]  #: by source
    watts: dict[str, float]  #: while decoding
    #: of psys alone if it is there, else of all; prompts' energy included; null: not measured
    joules_per_token: float | None
    celsius_before: dict[str, float]  #: by sensor
    celsius_after: dict[str, float]  #: by sensor
    throttled_windows: int
    tells_throttling: bool  #: some device says whether clocks are held down


class Judged(Record):
    identical: bool  #: every logit is the same bits as stock's
    largest_difference: float  #: of a logit
    kl_nats: float  #: mean KL(stock || this) a token
    same_first: Share  #: tokens whose likeliest successor is stock's
    perplexity: float  #: over every token of the prompts but each first
    tokens: int  #: compared
    task_score: Share  #: right answers of the bundled task
    task_items: int  #: its items


class Lossy(Judged):
    kind: Literal["fewer experts", "fewer bits"]
    name: str
    value: int  #: experts, or bits


class Exactness(Record):
    decoded_tokens: int  #: decoded one by one, from the start of each prompt
    decoded_identical: bool  #: their logits are the same bits as stock's
    prompts_difference: float  #: of whole prompts' logits, at most, relative to a prompt's largest
    prompts_bound: float  #: what another order of sums explains: 0 on MLX's CPU backend


class Quality(Record):
    package_offers_lossy_options: bool  #: off in every report; before `lossy` came, it had none
    streamed_perplexity: float
    tokens: int
    task_score: Share  #: streamed
    task_items: int
    stock: Judged | None
    streamed: Judged | None
    lossy: list[Lossy]  #: what-ifs on the stock model
    not_measured: str  #: why, if so
    exactness: Exactness | None = None


class Report(Record):
    schema: Literal["mlx-streamexperts/report"]  #: names this format
    version: Literal[1]  #: of the format; it rises when a field changes its meaning or goes
    created: str  #: UTC, ISO 8601
    note: str  #: of whoever made it
    unfinished: str  #: the step at which the run ended early, without later fields; empty: whole
    seconds: float  #: that it took
    method: Method  #: how it was measured
    speed: Speed  #: tokens and seconds
    ssd: Drive | None = None  #: the drive
    locality: Locality | None = None  #: recorded routing
    power: Power | None = None  #: energy and heat; empty if nothing can be read
    quality: Quality | None = None  #: against stock mlx-lm
    limits: list[str] = field(default_factory=list)  #: what this run could not measure


PARTS = (Report, Speed, Drive)
"""Classes whose fields are None until they are measured; the JSON leaves those fields out."""


def as_json(report: Report) -> dict[str, Any]:
    """The plain values of the JSON file."""
    found = asdict(report)
    for part in (found, found["speed"], found["ssd"] or {}):
        for name in [k for k, v in part.items() if v is None]:
            del part[name]
    return found


def from_json(kind: type[T], value: Any) -> T:
    """Dataclasses of plain values; fields that this version does not know are left out.

    Raises:
        TypeError, AttributeError: a field is missing, or no object where one is due.
    """
    made: Any = value
    inner = get_args(kind)
    if is_dataclass(kind):
        made = kind(**{k: from_json(x, value[k]) for k, x in hints(kind).items() if k in value})
    elif get_origin(kind) in (UnionType, Union) and value is not None:
        made = from_json(inner[0], value)
    elif get_origin(kind) is list:
        made = [from_json(inner[0], x) for x in value]
    return made


def hints(kind: type) -> dict[str, Any]:
    """Types of a dataclass's fields, `Share` as it is."""
    return get_type_hints(kind, include_extras=True)
