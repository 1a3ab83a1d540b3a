"""The types that flow between stages: every manifest type of the project; `manifests.py` reads and writes them."""

import hashlib
import json
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StrictBool,
    model_serializer,
    model_validator,
)

WEIGHTS = "model.safetensors"
"""Weights of a checkpoint."""
STRUCTURE = "structure.json"
"""What pruning kept, beside a pruned checkpoint."""
VOCABULARY = "vocab.txt"
"""WordPiece vocabulary beside a checkpoint and in a bundle."""
ENCODE = "encode_image"
"""Name of the program that turns pixels into regions."""
SCHEMA_VERSION = 1


class Frozen(BaseModel):
    """Immutable value that refuses unknown keys: a typo in a manifest is an error, not a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON."""
        return digest(self.model_dump(mode="json"))


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of `value` as canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- specs -------------------------------------------------------------------------------------------------------


class PreprocessSpec(Frozen):
    """How an image file becomes the model's input; one spec for training, calibration, verification and apps.

    The app decodes (honouring EXIF orientation), converts to RGB and resizes to `height` x `width`; the graph takes
    those uint8 pixels, scales by 1/255 and normalises with `mean` and `std`.
    """

    height: int
    """Rows of the model's input, pixels."""
    width: int
    """Columns of the model's input, pixels."""
    resize: Literal["stretch", "letterbox"] = "stretch"
    """`stretch` ignores the aspect ratio; `letterbox` keeps it and pads right and bottom."""
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    """Pillow's filter of that name, antialiased when shrinking."""
    pad_value: int = 114
    """Grey level of letterbox padding, 0..255."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per channel, RGB, after scaling to 0..1 (in the graph)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per channel, RGB (in the graph)."""
    layout: Literal["NHWC"] = "NHWC"
    """Layout of the uint8 input that the app hands over."""


class TokenizerSpec(Frozen):
    """The text side of the contract: a WordPiece vocabulary and the lengths."""

    kind: Literal["wordpiece"] = "wordpiece"
    vocab_sha256: str
    vocab_size: int
    lowercase: bool = True
    max_tokens: int
    """Tokens per question with [CLS] and [SEP]; shorter ones are padded with [PAD]."""
    pad_id: int = 0
    unk_id: int = 1
    cls_id: int = 2
    sep_id: int = 3
    mask_id: int = 4
    kept_ids: tuple[int, ...] | None = None
    """After a vocabulary trim: each token's id in the vocabulary that was trimmed; None = not trimmed."""


class Labels(Frozen):
    """Closed lists that the heads index into; position = class id."""

    classes: tuple[str, ...]
    """Object classes; the detector adds a background class behind them."""
    attributes: tuple[str, ...]
    """Attribute tags (an object may carry several)."""
    answers: tuple[str, ...]
    """Answers of the task head."""


# --- model -------------------------------------------------------------------------------------------------------


class TEEConfig(Frozen):
    """Two-stage efficient extractor: trunk, BiFPN, RPN, static proposals, box head (MiniVLM, section 3)."""

    trunk: str
    """timm model name (anything `timm.create_model(features_only=True)` takes)."""
    first_level: int = 3
    """Pyramid level of the finest map; level l has stride 2**l."""
    num_levels: int = 3
    fpn_channels: int = 64
    fpn_repeats: int = 2
    anchor_scale: float = 2.5
    """Anchor size = `anchor_scale` x stride, one size per level."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Width / height."""
    num_candidates: int = 96
    """Anchors kept (all levels together) before the first NMS."""
    candidates_per_level: int | None = None
    """Anchors kept of each level, with an NMS per level (MiniVLM: 1000); None = `num_candidates` of all together."""
    num_proposals: int = 32
    """Static number of boxes that enter the box head."""
    num_regions: int = 16
    """Static number of regions that leave the extractor: the full token budget."""
    roi_size: int = 4
    roi_hidden: int = 128
    """Width of both box-head layers, and of the region feature."""
    attribute_head: Literal["linear", "own"] = "linear"
    """`linear`: one layer on the region feature. `own`: two layers of its own and an embedding of the class (MiniVLM)."""
    attribute_classes: int | None = None
    """Rows of that embedding; classes beyond share the last. None = one for each class. MiniVLM: 326 of 1591."""
    score_threshold: float = 0.2
    """Regions scoring below are masked out of the fusion."""
    grid: tuple[int, ...] = ()
    """Fixed boxes instead of detected ones: (1, 2, 4) = the whole image, 2 x 2 and 4 x 4 cells. For images unlike any that
    the extractor was trained to find objects in; `num_regions` must be their number."""
    region_feature: Literal["hidden", "tags"] = "hidden"
    """What the fusion sees of a region beside its box: the box head's last layer, or its tags, which are the
    probabilities of the classes (background last) and of the attributes. Tags can be made up without an image."""

    def region_dim(self, num_classes: int, num_attributes: int) -> int:
        """Width of a region's feature."""
        return self.roi_hidden if self.region_feature == "hidden" else num_classes + 1 + num_attributes


ENCODER_FIELDS = ("vision_heads", "vision_ffn", "text_heads", "text_ffn", "cross_heads")
"""Of `FusionConfig`: all of them or none."""


class TrimConfig(Frozen):
    """Where a fusion trims, and by what (SmartTrim; our reconstruction, and its baselines)."""

    layers: tuple[int, ...] = Field(min_length=1)
    """Layers behind which tokens are dropped, rising; with two encoders, cross-modal layers."""
    policy: Literal["learned", "attention", "random", "similarity"] = "learned"
    """What decides: trained trimmers, the attention that a token was paid (PuMer, TRIPS), chance, or bipartite merging of
    what is alike (ToMe)."""
    words: bool = False
    """Words are trimmed as well as regions."""
    head_layers: tuple[int, ...] = ()
    """Layers that skip the heads an input does not need. A static budget keeps them all."""
    context: int = Field(default=0, ge=0)
    """Context tokens, into which dropped regions are merged by similarity; 0 = they are gone."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name in ("layers", "head_layers"):
            layers = getattr(self, name)
            if list(layers) != sorted(set(layers)) or any(layer < 0 for layer in layers):
                raise ValueError(f"{name} must be rising layer indices from 0 on")
        if self.policy == "similarity" and (self.words or self.context or self.head_layers):
            raise ValueError("similarity merges regions and does nothing else: drop words, context and head_layers")
        return self


class FusionConfig(Frozen):
    """BERT-style fusion transformer. Heads and widths may differ per layer.

    Single stream (MiniVLM, section 3): every layer reads words and regions. Two encoders (EfficientVLM): `vision_*` layers
    read the regions alone, `text_*` layers the words alone, and `layer_*` are those of the cross-modal encoder behind them.
    """

    hidden: int
    head_dim: int
    layer_heads: tuple[int, ...]
    """Self-attention heads of each layer (differ after pruning); the length is the depth."""
    layer_ffn: tuple[int, ...]
    """FFN neurons of each layer (differ after pruning)."""
    vision_heads: tuple[int, ...] = ()
    """Two encoders: heads of each layer over the regions. Empty, as the four below = single stream."""
    vision_ffn: tuple[int, ...] = ()
    text_heads: tuple[int, ...] = ()
    """Two encoders: heads of each layer over the words."""
    text_ffn: tuple[int, ...] = ()
    cross_heads: tuple[int, ...] = ()
    """Two encoders: heads of each cross-modal layer's attention from the words to the regions."""
    dropout: float = 0.0
    trim: TrimConfig | None = None
    """Where and how tokens and heads are trimmed; None = never."""
    box_encoding: Literal["plain", "geometry"] = "plain"
    """How the fusion sees a box: corners and size, or `models.geometry`, which shows single pixels to a small net."""
    parts: tuple[tuple[float, float, float, float], ...] = ()
    """Normalised corners of the parts an image always has (NLVR: three boxes). Each becomes a token beside the regions,
    and `geometry` measures within them; empty = the image is one part, without a token."""
    edge_scale: float = Field(0.015, gt=0)
    """`geometry`: distance from an edge, as a share of the part, at which touching it falls to 1 / e."""
    box_bins: int = Field(10, gt=0)
    """`geometry`: soft bins per axis for the centre."""

    @classmethod
    def uniform(cls, *, hidden: int, layers: int, heads: int, ffn: int, **rest: Any) -> Self:
        """A config with the same heads and FFN width in each layer."""
        return cls(
            hidden=hidden,
            head_dim=hidden // heads,
            layer_heads=(heads,) * layers,
            layer_ffn=(ffn,) * layers,
            **rest,
        )

    @classmethod
    def two_encoders(
        cls, *, hidden: int, vision: int, text: int, cross: int, heads: int, ffn: int, **rest: Any
    ) -> Self:
        """A config of two encoders with so many vision, text and cross-modal layers, alike in heads and FFN width."""
        return cls.uniform(
            hidden=hidden,
            layers=cross,
            heads=heads,
            ffn=ffn,
            vision_heads=(heads,) * vision,
            vision_ffn=(ffn,) * vision,
            text_heads=(heads,) * text,
            text_ffn=(ffn,) * text,
            cross_heads=(heads,) * cross,
            **rest,
        )

    @property
    def has_encoders(self) -> bool:
        """Whether regions and words have encoders of their own."""
        return bool(self.cross_heads)

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        given = [getattr(self, name) for name in ENCODER_FIELDS]
        if not any(given):
            return self
        if not all(given):
            missing = next(name for name in ENCODER_FIELDS if not getattr(self, name))
            raise ValueError(f"two encoders need layers of each kind, and {missing} names none")
        for names in (
            ("vision_heads", "vision_ffn"),
            ("text_heads", "text_ffn"),
            ("layer_heads", "layer_ffn", "cross_heads"),
        ):
            if len({len(getattr(self, name)) for name in names}) > 1:
                raise ValueError(f"{', '.join(names)} must name the same number of layers")
        return self

    @model_serializer(mode="wrap")
    def _without_encoders(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A single stream is written as it was before there were encoders: hashes and manifests stay."""
        values = handler(self)
        return {k: v for k, v in values.items() if self.has_encoders or k not in ENCODER_FIELDS}


class ModelConfig(Frozen):
    """Everything that decides the network's shape."""

    tee: TEEConfig
    fusion: FusionConfig
    heads: tuple[Literal["words", "match", "pair"], ...] = ()
    """Further heads beside the answers': words (masked words and captions), match (does the text fit the image), pair
    (answers about two images)."""
    answer_head: Literal["hidden", "linear"] = "hidden"
    """One hidden layer, or a linear classifier (MiniVLM's for VQA)."""
    answer_dropout: float = 0.0
    """Before the linear classifier, and in the pair head."""
    widths: dict[str, int] = {}
    """Members that pruning has left in groups of the extractor (`models/groups.py`); the fusion's stand in `fusion`."""

    def region_dim(self, labels: Labels) -> int:
        """Width of a region's feature."""
        width = self.tee.region_dim(len(labels.classes), len(labels.attributes))
        return self.widths.get("box.2", width) if self.tee.region_feature == "hidden" else width


class Rung(Frozen):
    """One static token budget of the ladder."""

    name: str
    regions: tuple[int, ...]
    """Region tokens that go on behind each trimming layer (a model without one: how many there are)."""
    words: tuple[int, ...] = ()
    """Word tokens that go on behind each trimming layer; empty = all."""
    num_words: int | None = None
    """Word tokens that it reads; a longer question needs a larger rung. None = all."""
    num_regions: int | None = None
    """Regions that it reads, those with the best scores; None = all."""
    gmacs: float = 0.0
    """Multiply-adds of the answer program, in 1e9 (analytic)."""
    expected_accuracy: float | None = None
    """Task metric on the validation split, 0..1."""


# --- artifacts ---------------------------------------------------------------------------------------------------


class Provenance(Frozen):
    """Where an artifact comes from."""

    stage: str
    key: str
    """Hash of the stage's inputs and config: equal key = nothing to redo."""
    parents: dict[str, str] = {}
    """Name of each input artifact -> its key."""
    recipe: dict[str, Any] = {}
    """The whole recipe, so that a checkpoint found alone can still be exported."""
    dataset: str = ""
    seed: int = 0
    edgevlm: str = ""
    commit: str = ""
    created: str = ""
    """ISO 8601, UTC."""
    seconds: float = 0.0
    """Wall time of the stage."""


class Artifact(Frozen):
    """Base of all manifests."""

    kind: str
    schema_version: int = SCHEMA_VERSION
    provenance: Provenance
    files: dict[str, str] = {}
    """Path relative to the folder -> SHA-256."""


class Vocabulary(Artifact):
    """Stage `prepare`: what the dataset fixes for the rest of the run."""

    kind: Literal["vocabulary"] = "vocabulary"
    preprocess: PreprocessSpec
    tokenizer: TokenizerSpec
    labels: Labels


class Checkpoint(Artifact):
    """A trained model: `model.safetensors` and `vocab.txt` beside the manifest."""

    kind: Literal["checkpoint"] = "checkpoint"
    model: ModelConfig
    task: str
    preprocess: PreprocessSpec
    tokenizer: TokenizerSpec
    labels: Labels
    rungs: tuple[Rung, ...] = ()
    """Empty until trimmed: the full budget only."""
    metrics: dict[str, float] = {}


class RegionCache(Artifact):
    """Region features of whole splits, extracted once (`<split>/images-*.parquet` and `<split>/questions-*.parquet`)."""

    kind: Literal["regions"] = "regions"
    preprocess_hash: str
    extractor_hash: str
    """SHA-256 of the detector's weights."""
    num_images: dict[str, int]


class GroupKept(Frozen):
    """What pruning left of a group of channels, units or heads."""

    part: str
    """Of the model: vision (the extractor), and fusion, or its vision, text and cross encoder."""
    size: int
    kept: int


class Structure(Frozen):
    """What pruning kept (`structure.json` beside a pruned checkpoint), and how training came to it."""

    measure: str
    """Unit of the cost."""
    cost: float
    """Of all that could be removed."""
    asked: float
    """Share of it that was to stay, 0..1."""
    kept: float
    """Share that stayed."""
    groups: dict[str, GroupKept]
    history: dict[int, dict[str, float]]
    """Steps done -> group -> share of its members that were (expected to be) open; empty where nothing was trained."""


class TeacherOutputs(Artifact):
    """A teacher's logits of every training question (`train/outputs-*.parquet`), lined up with the cached regions."""

    kind: Literal["teacher_outputs"] = "teacher_outputs"
    teacher: str
    """What the recipe names; `teacher` for the run's own."""
    teacher_hash: str
    known: tuple[int, ...]
    """Answers that the columns stand for, rising: index into `labels.answers`. The teacher says nothing of the others."""
    num_questions: int
    accuracy: float
    """Share of the training questions that it answers as the data do, 0..1; where several annotated, the soft score."""


class CalibrationSet(Artifact):
    """A frozen choice of training samples (`calibration.npz`) for quantisers."""

    kind: Literal["calibration"] = "calibration"
    dataset: str
    split: str
    sample_ids: tuple[str, ...]
    preprocess_hash: str
    tokenizer_hash: str
    coverage: dict[str, float] = {}
    """Share of answers, classes and text lengths of the split that the set contains, 0..1."""


class GovernorRung(Frozen):
    """A rung as the governor sees it."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    name: str
    """Of the answer program: `answer_<name>`."""
    num_words: int | None = Field(default=None, ge=1)
    """Longest question that it reads, in tokens that are not padding, [CLS] and [SEP] among them; null = any."""
    threshold: float | None = Field(default=None, ge=0, le=1)
    """Smallest margin at which its answer is given; null = the margin governor never starts it."""
    gmacs: float = Field(default=0.0, ge=0)
    """Multiply-adds of its answer program, in 1e9: the cost that the thresholds were chosen for."""


class MarginDefinition(Frozen):
    """How sure an answer is: p1 - p2 of softmax(logits / temperature) in float64, p1 and p2 its two largest values."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    kind: Literal["top2_softmax"] = "top2_softmax"
    temperature: float = Field(default=1.0, gt=0)


class LatencyPolicy(Frozen):
    """How the latency governor learns that the device became slower, backs off and recovers (docs/governor.md)."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    window: int = Field(default=5, ge=1)
    """Answers whose observed / tabled time make the scale, which is their median; at first all of them count as 1."""
    hysteresis: float = Field(default=1.1, ge=1)
    """A larger rung than the present one must fit with its time multiplied by this."""
    patience: int = Field(default=8, ge=0)
    """Choices after a back-off before a larger rung is tried again."""
    back_off: float = Field(default=2.0, ge=1)
    """Factor on the patience at each back-off that follows before the device was calm for as long as the patience."""
    max_patience: int = Field(default=256, ge=0)


class GovernorEvidence(Frozen):
    """What the thresholds were certified on. Losses are score(full) - score(governed), so that below 0 is a gain."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    unit: Literal["image", "text"] = "image"
    """What is drawn independently: its mean loss is one observation."""
    num_units: int
    """Held out to test thresholds on; the smallest number that can certify anything is `least_units`."""
    num_questions: int
    least_units: int
    num_tuning_units: int
    """Others, which the path through the thresholds was chosen on."""
    loss: float
    """Mean over the held-out units."""
    loss_questions: float
    """Mean over the held-out questions."""
    p_value: float
    """Of 'the loss exceeds epsilon' at these thresholds; 1 where nothing was tested."""
    tested: int
    """Thresholds on the path that were tested, the first that failed among them; 0 where there was nothing to test with."""
    accuracy: float
    """Mean score of the governed answers on the held-out questions, 0..1."""
    accuracy_full: float
    gmacs: float
    """Mean multiply-adds of all answer programs that a held-out question starts."""
    gmacs_full: float
    answered_by: dict[str, float]
    """Rung -> share of the held-out questions that it answers, 0..1."""


class Governor(Frozen):
    """`governor.json`: how a rung is chosen at run time; docs/governor.md says how to read it."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    schema_version: Literal[1] = 1
    model_hash: str
    """Of the model that it was calibrated on: equals `model_hash` in the bundle's manifest.json, whatever the target."""
    rungs: tuple[GovernorRung, ...] = Field(min_length=1)
    """Cheapest first; the last is the full rung, which reads every question and whose threshold is 0."""
    margin: MarginDefinition = MarginDefinition()
    latency: LatencyPolicy = LatencyPolicy()
    epsilon: float = Field(gt=0, lt=1)
    """Accuracy that may be lost against the full rung, 0..1 ..."""
    delta: float = Field(gt=0, lt=1)
    """... except with this probability, over the draw of the held-out units."""
    certified: StrictBool
    """Whether the thresholds hold that promise; false = nothing could be certified, and every question goes to the full rung."""
    evidence: GovernorEvidence | None = None

    @model_validator(mode="after")
    def _full_is_last(self) -> Self:
        names = [rung.name for rung in self.rungs]
        if len(set(names)) < len(names):
            raise ValueError("two rungs have the same name")
        if self.rungs[-1].threshold != 0 or self.rungs[-1].num_words is not None:
            raise ValueError("the last rung must read every question (num_words: null) and have the threshold 0")
        return self


class GovernorCalibration(Artifact):
    """Stage `govern`: the governor of a checkpoint; `export` writes it into the bundle."""

    kind: Literal["governor"] = "governor"
    governor: Governor


def answer_name(rung: str) -> str:
    """Name of the answer program of a rung."""
    return f"answer_{rung}"


class ExportedModel(Frozen):
    """One target at one precision: the files that together hold every program."""

    target: str
    precision: str
    scheme: str
    """How it was quantised, in words that no other file shares (for example, 'static int8 convolutions')."""
    programs: dict[str, str]
    """Program name (`encode_image`, `answer_<rung>`) -> file, relative to the bundle."""
    files: tuple[str, ...]
    """All files of this model, relative to the bundle."""
    size_mb: float
    tools: dict[str, str] = {}
    """Library -> version that wrote it."""
    seconds: float = 0.0


class ExportFailure(Frozen):
    """A target that could not be exported, with the reason; the row stays visible in every report."""

    target: str
    precision: str
    reason: str


class Bundle(Artifact):
    """What an app team gets: models of every target, specs, vocabulary, labels and golden cases."""

    kind: Literal["bundle"] = "bundle"
    name: str
    task: str
    model: ModelConfig
    preprocess: PreprocessSpec
    tokenizer: TokenizerSpec
    labels: Labels
    rungs: tuple[Rung, ...]
    models: tuple[ExportedModel, ...]
    failures: tuple[ExportFailure, ...] = ()
    metrics: dict[str, float] = {}
    model_hash: str = ""
    """Of the checkpoint that every target was exported from (`model_hash`); a governor must carry the same."""


def model_hash(checkpoint: Checkpoint) -> str:
    """Hash of what a model answers, and at which rungs: weights, shape, specs, labels and ladder.

    Raises:
        KeyError: the manifest lists no weights (it was never written).
    """
    values = checkpoint.model_dump(mode="json", include={"model", "preprocess", "tokenizer", "labels", "rungs"})
    return digest({**values, "weights": checkpoint.files[WEIGHTS]})


Evidence = Literal["device", "runtime", "emulated", "reference evaluator", "none"]
Verdict = Literal["passed", "failed", "unproven"]


class ParityRow(Frozen):
    """One target x rung x precision against the PyTorch model on the same samples."""

    target: str
    precision: str
    rung: str
    evidence: Evidence
    verdict: Verdict
    num_samples: int = 0
    max_abs_logits: float | None = None
    """Largest |logit difference|, pixels to logits."""
    mean_abs_logits: float | None = None
    box_match: float | None = None
    """Share of PyTorch's valid regions with a partner at IoU >= 0.9, 0..1."""
    agreement: float | None = None
    """Share of samples with the same answer as PyTorch, 0..1."""
    metric: float | None = None
    """Task metric of the exported file, 0..1."""
    metric_ci: tuple[float, float] | None = None
    """95 % interval of `metric` (Wilson)."""
    reference_metric: float | None = None
    """Task metric of PyTorch fp32 on the same samples."""
    reasons: tuple[str, ...] = ()
    """Why a row failed or is unproven."""


class ParityReport(Artifact):
    """Stage `verify`."""

    kind: Literal["parity"] = "parity"
    bundle_key: str
    metric_name: str
    majority: float
    """Accuracy of always giving the most frequent answer of the samples."""
    rows: tuple[ParityRow, ...]


class DeviceFacts(Frozen):
    """The machine a latency was measured on."""

    name: str
    system: str
    processor: str
    num_cores: int
    memory_gb: float
    threads: int
    versions: dict[str, str] = {}


class PieceTimes(Frozen):
    """What a piece of the model takes at some of the sizes that pruning may give it."""

    groups: tuple[str, ...]
    """Whose members decide its size (`models/groups.py`)."""
    points: tuple[tuple[int, ...], ...]
    """For each group, the numbers of members that were measured, rising."""
    ms: tuple[float, ...]
    """One for each combination of points, the last group's running fastest."""


class LatencyTable(Artifact):
    """What a model takes on one target, and its pieces at several sizes: milliseconds as a function of structure."""

    kind: Literal["latency"] = "latency"
    target: str
    precision: str
    threads: int
    device: DeviceFacts
    whole_ms: float
    """One image and one untrimmed question, nothing removed."""
    pieces: dict[str, PieceTimes]


class LatencyRow(Frozen):
    """One target x rung x precision on one device; times in milliseconds."""

    target: str
    precision: str
    rung: str
    size_mb: float
    load_ms: float | None = None
    first_ms: float | None = None
    """First image-and-question after loading."""
    encode_p50_ms: float | None = None
    answer_p50_ms: float | None = None
    p50_ms: float | None = None
    """Pixels to answer: encode plus answer."""
    p90_ms: float | None = None
    num_runs: int = 0
    peak_memory_mb: float | None = None
    """Peak resident memory of a fresh process that holds only this model."""
    outputs_checked: bool = False
    """The timed outputs matched the golden cases."""
    latency_valid: bool = True
    """False where time means nothing (emulation)."""
    reason: str = ""
    """Why a row has no numbers."""


class DeviceReport(Artifact):
    """Stage `bench`."""

    kind: Literal["latency"] = "latency"
    bundle_key: str
    device: DeviceFacts
    rows: tuple[LatencyRow, ...]


class Gate(Frozen):
    """One promise and whether it held."""

    name: str
    value: float
    limit: float
    passed: bool
    unit: str = ""


class ScoreRow(Frozen):
    """Parity and latency of one target x rung x precision, joined."""

    parity: ParityRow
    latency: LatencyRow
    pareto: bool = False
    """No other row is both faster and more accurate."""


class Scorecard(Artifact):
    """Stage `scorecard`: `SCORECARD.md` and `scorecard.html` beside the manifest."""

    kind: Literal["scorecard"] = "scorecard"
    name: str
    task: str
    metric_name: str
    majority: float
    device: DeviceFacts
    training: dict[str, float] = Field(default_factory=dict)
    """Stage -> task metric on the test split, 0..1."""
    stage_seconds: dict[str, float] = Field(default_factory=dict)
    rows: tuple[ScoreRow, ...]
    gates: tuple[Gate, ...] = ()


KINDS: dict[str, type[Artifact]] = {
    "vocabulary": Vocabulary,
    "checkpoint": Checkpoint,
    "regions": RegionCache,
    "calibration": CalibrationSet,
    "governor": GovernorCalibration,
    "bundle": Bundle,
    "parity": ParityReport,
    "latency": DeviceReport,
    "scorecard": Scorecard,
}
