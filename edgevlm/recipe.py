"""The typed recipe: everything that decides a run. Unknown keys are refused; `edgevlm/recipes` reads it from YAML."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from edgevlm.artifacts import PreprocessSpec


class Section(BaseModel):
    """Base of all recipe sections: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(Section):
    dataset: str
    """Reader name: see `edgevlm.data.READERS`."""
    path: str | None = None
    """Folder of the dataset; `--data` on the command line wins. None for embedded data."""
    num_train: int | None = Field(None, gt=0)
    """Images of the training split; None = all."""
    num_val: int | None = Field(None, gt=0)
    num_test: int | None = Field(None, gt=0)
    texts_per_image: int = Field(8, gt=0)
    """Questions or sentences per image, where the dataset can draw any number."""
    captions_per_image: int = Field(1, gt=0)
    """Captions per image, where the dataset can draw any number."""
    answers: str | None = None
    """File with the closed list of answers (JSON list, or one per line); None = the frequent training answers."""
    annotations: dict[str, str] = {}
    """Split -> annotation file inside the folder (datasets of one format, like coco); else the usual names are tried."""
    images: dict[str, str] = {}
    """Split -> image folder inside the folder."""
    on_bad: Literal["stop", "skip"] = "stop"
    """A malformed record stops the run, or is left out and counted."""


class TextSection(Section):
    vocab_size: int = Field(512, ge=32)
    """Upper limit of the WordPiece vocabulary that `prepare` trains."""
    max_tokens: int = Field(24, ge=4)
    vocab: str | None = None
    """A BERT vocabulary instead of a trained one: a `vocab.txt`, a folder that holds one, or a model on the Hugging Face
    hub. A fusion that starts from a text model needs that model's."""
    trim: bool = False
    """Keep of `vocab` only the pieces that the training texts use, and every single character."""

    @model_validator(mode="after")
    def _something_to_trim(self) -> "TextSection":
        if self.trim and self.vocab is None:
            raise ValueError("trim needs vocab: a trained vocabulary holds nothing that the texts do not use")
        return self


class Choice(Section):
    """A registered network by name (`edgevlm.models.registry`), with any of its fields overridden."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def overrides(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TrainSection(Section):
    steps: int = Field(gt=0)
    batch_size: int = Field(64, gt=0)
    """Rows per step, over all processes and pieces: a recipe gives the same model on one GPU and on eight."""
    accumulate: int = Field(1, gt=0)
    """Pieces into which each process cuts its share of a batch, one after the other: less memory for the same step."""
    optimiser: Literal["adamw", "sgd"] = "adamw"
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of SGD. MiniVLM's detector: base rate 0.075 at batch 16, weight decay 1e-5."""
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps with a rising learning rate; `schedule` says how it falls afterwards."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    clip_norm: float = Field(5.0, gt=0)
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of the weights (0.9998, say), which is then evaluated and saved; None = none."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the matrix products; weights and sums stay float32. `auto`: bf16 on an NVIDIA GPU, fp32 elsewhere."""
    compile: bool = False
    """Compile the objective with torch.compile: minutes at the start for faster steps; needs a C++ compiler."""
    loaders: int = Field(1, ge=0)
    """Threads that prepare batches ahead; 0 = each when its step asks for it."""
    save_every: int = Field(200, gt=0)
    """Steps between resumable snapshots."""


class AugmentSection(Section):
    """Random changes of a training image, before it is resized as ever; boxes go with it."""

    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a mirror image (left and right)."""
    min_cut: float = Field(1.0, gt=0, le=1)
    """Each side of a random cut is at least this share of the image's; 1 = never cut. Scales and shifts objects."""
    cut_probability: float = Field(0.8, ge=0, le=1)
    min_kept: float = Field(0.4, gt=0, le=1)
    """A box stays if at least this share of its area is inside the cut."""
    colour: float = Field(0.0, ge=0, lt=1)
    """Brightness, contrast and saturation each change by up to this share."""


class DetectorSection(TrainSection):
    trunk_weights: str | None = None
    """Where the trunk starts from: `hub` (timm's pre-trained weights), a .safetensors or .pth file, or None: scratch."""
    short_sides_px: tuple[int, ...] = ()
    """Multi-scale training: short sides of the input, one drawn per step; empty = the size of `preprocess` only."""
    augment: AugmentSection | None = None
    sampling: Literal["hardest", "random"] = "hardest"
    """Which background is trained on: `random` as in the papers and for photos (`edgevlm.tasks.detection`)."""
    sync_batchnorm: bool = False
    """Share the batch norms' statistics among the processes."""
    num_images: int | None = Field(None, gt=0)
    """Training images at most; None = all of `data.num_train`. They are held in memory."""
    box_beta: float = Field(1.0, gt=0)
    """Where the box head's smooth L1 turns from square to linear; small values ask for exact boxes to the end."""


class RegionsSection(Section):
    dtype: Literal["float32", "float16"] = "float32"
    """Of the features on disk; float16 halves the cache and rounds them to three digits."""
    shard_images: int = Field(1024, gt=0)
    """Images per file; what a killed run loses at most, and the unit that processes share."""


class PretrainSection(TrainSection):
    """Masked words and matching on captions and tags; defaults are MiniVLM's (its 7M set: 100 epochs)."""

    fusion: Choice
    start: str | None = None
    """As in `teacher.start`."""
    steps: int = Field(339_800, gt=0)
    batch_size: int = Field(2048, gt=0)
    lr: float = Field(4e-4, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    caption_tokens: int = Field(20, ge=3)
    """Places of a caption with [CLS] and [SEP]; longer ones are cut."""
    tag_tokens: int = Field(15, ge=1)
    """Places of the tags with [SEP]."""
    num_regions: int = Field(50, gt=0)
    """Regions at most, best first."""
    mask_share: float = Field(0.15, gt=0, lt=1)
    """Of the caption's and tags' words."""
    max_masked: int = Field(5, gt=0)
    """Per text."""
    seq2seq: bool = True
    """Masked words see the words before them only, as in generation; matching always sees all."""
    replaced_tags: float = Field(0.5, ge=0, le=1)
    """Share of the texts that carry another image's tags in matching."""
    replaced_captions: float = Field(0.0, ge=0, le=1)
    """Share that carry another image's caption (image-text matching; MiniVLM's 0: its captions are never replaced)."""
    tag_confidence: float = Field(0.8, ge=0, le=1)
    """Regions scoring below give no tag."""
    tagger: str | None = None
    """Checkpoint folder of a stronger detector that makes the tags, used in this stage only; None = the model's own."""
    teacher: str | None = None
    """Checkpoint folder of a pre-trained teacher with this run's vocabulary, preprocessing and extractor; None = none."""
    kd_weight: float = Field(0.4, ge=0, le=1)
    """With a teacher, loss = (1 - kd_weight) x own + kd_weight x imitation (EfficientVLM's general distillation)."""

    @model_validator(mode="after")
    def _at_most_all(self) -> "PretrainSection":
        if self.replaced_tags + self.replaced_captions > 1:
            raise ValueError("replaced_tags and replaced_captions are shares of the same texts: at most 1 together")
        return self


class FineTuneSection(TrainSection):
    """What is trained on the cached regions for a task."""

    fusion: Choice
    start: str | None = None
    """Where the fusion starts: a checkpoint folder, a Hugging Face text model's folder, or its name on the hub. None =
    from the stage `pretrain` where the recipe has one (not the student), else untrained."""


class TeacherSection(FineTuneSection):
    answer_head: Literal["hidden", "linear"] = "hidden"
    """One hidden layer, or a linear classifier that starts at probability 0.01 per answer (MiniVLM's for VQA)."""
    answer_dropout: float = Field(0.0, ge=0, lt=1)
    """Before the linear classifier; MiniVLM's is 0.3."""


class SyntheticSection(FineTuneSection):
    """Drawn sentences and scenes (dataset nlvr): `steps` of pre-training, and a share of every later batch."""

    scenes_per_sentence: int = Field(8, ge=2, multiple_of=2)
    """Half of them make the sentence true. `batch_size` counts pairs of a sentence and a scene."""
    families: int = Field(4000, gt=0)
    """Size of the pool of scenes, in families of six that differ by a few edits."""
    share_towers: float = Field(0.4, ge=0, le=1)
    """Share of the sentences that are about towers."""
    box_error_px: float = Field(0.3, ge=0)
    """Standard deviation of the extractor's box edges, pixels of the stored image."""
    tag_error: float = Field(0.03, ge=0)
    """Probability mass that the extractor's tags put on wrong values, on average."""
    trace_weight: float = Field(1.0, ge=0)
    """Weight of 'in which box does the claim hold' and (half) 'how many does it count there'."""
    mix: float = Field(0.5, ge=0, lt=1)
    """Share of drawn pairs in the batches of later stages."""
    label_smoothing: float = Field(0.05, ge=0, lt=1)
    """Of the later stages: the dataset's labels are noisy."""


Encoder = Literal["vision", "text", "cross"]
"""A stack of layers of a fusion of two encoders."""
Layers = tuple[Annotated[int, Field(ge=0)], ...]
LayerMap = Literal["even"] | Layers | dict[Encoder, Layers]
"""Teacher layer for each student layer, counted from 0; `even`: spread over its depth, last to last (2:1 gives 1, 3, 5 ...).
With two encoders: `even`, or a list for some of them and the others even."""
Weight = Annotated[float, Field(ge=0)] | dict[Encoder, Annotated[float, Field(ge=0)]]
"""One number, or with two encoders one for each; what is not named weighs nothing."""


class DistilSection(TeacherSection):
    """Learn from a teacher. A weight of None is EfficientVLM's for the task (`compress/distil.py`, docs/distillation.md)."""

    teacher: str | None = None
    """Instead of training one: a checkpoint folder of this run's vocabulary, preprocessing and extractor. Or what looks at
    images itself and gives logits alone: a BLIP, ViLT or BridgeTower as a Hugging Face folder or hub name, or
    `module:function`."""
    precompute: bool = False
    """Read the teacher's logits from the stage `teacher_outputs` instead of running it in every step. A teacher that looks
    at images always is."""
    kd_weight: float | None = Field(None, ge=0, le=1)
    """loss = (1 - kd_weight) x task + kd_weight x distillation."""
    hidden_weight: Weight | None = None
    """Of the mean over layers of the squared error of hidden states."""
    attention_weight: Weight | None = None
    """Of the mean over layers of the squared error of attention maps, times the number of keys."""
    layer_map: LayerMap = "even"
    nce_weight: float = Field(0.0, ge=0)
    """Of telling the teacher's state of a question from those of earlier ones (DistillVLM)."""
    nce_queue: int = Field(4096, gt=0)
    """Earlier states to tell it from."""
    start: str | None = None
    """As in `teacher.start`; or `teacher`: the teacher's embeddings, heads and the layers that the student imitates."""

    @model_validator(mode="after")
    def _logits_only(self) -> "DistilSection":
        if self.precompute and (self.hidden_weight or self.attention_weight):
            raise ValueError(
                "precompute keeps logits only: attention_weight and hidden_weight need the live teacher; drop one of them"
            )
        return self


class TeacherOutputsSection(Section):
    """What the teacher says of every training question, written once."""

    batch_size: int = Field(64, gt=0)
    dtype: Literal["float32", "float16"] = "float32"
    """On disk; float16 halves the files and rounds logits to three digits."""
    pooled: bool = False
    """Keep the pooled state of each question as well (of a checkpoint of ours), which `distil.nce_weight` needs."""
    candidates: int | None = Field(None, gt=0)
    """A teacher that writes its answers (BLIP) scores only so many, those with the likeliest first word, and gives the
    others no probability; None = every answer of the list. BLIP's own evaluation takes 128."""


class RetrievalSection(FineTuneSection):
    """Matching captions and images; defaults are those of MiniVLM's public COCO configuration."""

    batch_size: int = Field(128, gt=0)
    """Captions per step, each with its image and with one random negative: twice as many pairs."""
    lr: float = Field(2e-5, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    hard_negatives: float = Field(0.0, ge=0, le=1)
    """Share of the negatives drawn among the 32 images with the most similar tags (ours; MiniVLM's are all random)."""
    shortlist: int | None = Field(None, gt=0)
    """Images per caption, and captions per image, that tag overlap hands to the model; None = all pairs are ranked."""
    fold_images: int = Field(1000, gt=0)
    """Images per fold of the second protocol (COCO 1K: the average over five folds)."""


class PairsSection(FineTuneSection):
    """Sentences about two images; defaults are Oscar's for NLVR2 (MiniVLM's are not public)."""

    batch_size: int = Field(72, gt=0)
    lr: float = Field(3e-5, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    dropout: float = Field(0.3, ge=0, lt=1)
    """In the three-layer pair head."""


class PruneSection(TrainSection):
    parts: tuple[Literal["vision", "fusion"], ...] = ("fusion",)
    """What is pruned: `fusion` (heads, FFN neurons), `vision` (the extractor's channels and units), or both under one
    budget. With `vision` every step encodes images, and the regions are cached anew behind the stage."""
    sparsity: float = Field(0.4, gt=0, lt=1)
    """Share to remove of what can be removed of these parts."""
    measure: Literal["parameters", "macs", "ms"] = "parameters"
    """What that is a share of: parameters, multiply-adds of an image (with `vision`) and an untrimmed question, or the
    milliseconds that an image and such a question take (`target` and the three behind it say where)."""
    target: str = "onnx"
    precision: str = "fp32"
    threads: int = Field(1, gt=0)
    target_ms: float | None = Field(None, gt=0)
    """With `measure: ms`: what it may take; wins over `sparsity`."""
    images_per_step: int = Field(16, gt=0)
    """With `vision`: images in a step; the questions of `batch_size` are spread over them."""
    num_images: int | None = Field(None, gt=0)
    """With `vision`: training images at most; None = all of `data.num_train`. They are held in memory."""
    extractor_weight: float = Field(1.0, ge=0)
    """With `vision`: weight of imitating what the unpruned extractor detects."""
    method: Literal["fisher", "gates", "gradient", "modality", "magnitude"] = "fisher"
    """How the structure is chosen (`compress/structure.py`)."""
    seed: int = Field(0, ge=0)
    """Another one repeats the stage with other draws; everything before it stays."""
    ramp: float = Field(0.5, gt=0, le=1)
    """Share of the pruning steps over which the target rises from 0; one ramp for the whole run."""
    gate_lr: float = Field(0.1, gt=0)
    one_schedule: bool = True
    """The ways that train while they choose keep their learning rate until the structure is chosen, and let it fall while
    they recover; False = it falls and rises twice."""
    recover_steps: int = Field(200, ge=0)
    """Steps of fine-tuning after the physical shrinking."""
    round_to: int = Field(8, gt=0)
    """Kept FFN widths are rounded up to a multiple of this."""
    kd_weight: float | None = Field(0.5, ge=0, le=1)
    """As in `distil`, these three: null = EfficientVLM's for the task."""
    hidden_weight: Weight | None = 0.1
    attention_weight: Weight | None = 1.0
    layer_map: LayerMap = "even"

    @field_validator("parts")
    @classmethod
    def _some_part(cls, parts: tuple[str, ...]) -> tuple[str, ...]:
        if not parts or len(set(parts)) < len(parts):
            raise ValueError("name fusion, vision or both, each once")
        return parts

    @model_validator(mode="after")
    def _one_measure(self) -> "PruneSection":
        if self.target_ms is not None and self.measure != "ms":
            raise ValueError("target_ms needs measure: ms")
        return self


class RungBudget(Section):
    """A rung that a recipe names itself."""

    regions: tuple[int, ...] = Field(min_length=1)
    """Regions kept behind each of `trim.layers`, never more than before."""
    words: tuple[int, ...] = ()
    """Words kept behind each of them; empty = all."""
    num_words: int | None = Field(None, gt=1)
    """Words read at all; None = all."""
    num_regions: int | None = Field(None, gt=0)
    """Regions read at all, those with the best scores; None = all."""

    @model_validator(mode="after")
    def _falling(self) -> "RungBudget":
        for name, first in (("regions", self.num_regions), ("words", self.num_words)):
            numbers = [*([first] if first is not None else []), *getattr(self, name)]
            if numbers != sorted(numbers, reverse=True) or min(numbers, default=1) < 1:
                raise ValueError(f"{name} must not rise from one trimming layer to the next, and not fall below 1")
        if self.words and self.words[-1] < 2:
            raise ValueError("[CLS] and [SEP] always stay: keep at least 2 words")
        return self


def _kind_of_rungs(rungs: Any) -> str:
    return "named" if isinstance(rungs, dict) else "number"


Rungs = Annotated[
    Annotated[int, Tag("number")] | Annotated[dict[str, RungBudget], Tag("named")], Discriminator(_kind_of_rungs)
]


class TrimSection(TrainSection):
    layers: tuple[int, ...] = Field((0,), min_length=1)
    """Fusion layers (0 = the first; with two encoders, cross-modal ones) behind which tokens are trimmed."""
    policy: Literal["learned", "attention", "random", "similarity"] = "learned"
    """What decides (`TrimConfig.policy`): trained trimmers, or one of the baselines."""
    words: bool = True
    """Trim words as well as regions. Ignored by `similarity`."""
    head_layers: tuple[int, ...] = ()
    """Layers that skip heads where an input does not need them; of use to dynamic inference, rungs keep all heads."""
    context: int = Field(0, ge=0)
    """Context tokens into which dropped regions are merged; 0 = dropped ones are gone."""
    budget: float = Field(0.4, gt=0, lt=1)
    """Share of the multiply-adds of an untrimmed question that the learned thresholds aim at, mean over the questions."""
    least: float = Field(0.15, gt=0, lt=1)
    """Smallest share of tokens that a step trains with."""
    ramp: float = Field(0.4, gt=0, le=1)
    """Share of the steps over which budgets fall from everything to `budget` and `least`."""
    rungs: Rungs = 3
    """How many rungs to choose on the validation split, the full one among them; or the rungs themselves by name."""
    max_loss: float = Field(0.03, ge=0, lt=1)
    """Accuracy that the smallest chosen rung may lose against the full one, 0..1."""
    tune_steps: int = Field(0, ge=0)
    """Steps of fine-tuning all rungs together once they are chosen; undone where it does not pay."""
    self_distil_weight: float = Field(1.0, ge=0)
    """Weight of imitating the full path of the same model as it was at the start."""
    budget_weight: float = Field(4.0, ge=0)
    """Weight of the squared difference between the cost and its budget, both as shares of the full cost."""
    seed: int = Field(0, ge=0)
    """Another one repeats the stage with other draws; everything before it stays."""
    exit_weight: float = Field(0.2, ge=0)
    """Weight of answering from [CLS] where a trimmer reads it (METR): it must know by then what the question is about."""

    @field_validator("rungs", mode="before")
    @classmethod
    def _short_form(cls, rungs: Any) -> Any:
        """`{b8: 8}` is short for eight regions behind every trimming layer."""
        return (
            {k: {"regions": [v]} if isinstance(v, int) else v for k, v in rungs.items()}
            if isinstance(rungs, dict)
            else rungs
        )

    @property
    def num_rungs(self) -> int:
        """How many there are, or are wanted."""
        return self.rungs if isinstance(self.rungs, int) else len(self.rungs)

    @model_validator(mode="after")
    def _ladder(self) -> "TrimSection":
        if isinstance(self.rungs, int):
            if self.rungs < 1:
                raise ValueError("rungs: at least the full one")
            return self
        if not self.rungs:
            raise ValueError("rungs: name at least one, or say how many to choose")
        for name, rung in self.rungs.items():
            for field in ("regions", "words"):
                given = len(getattr(rung, field))
                if given not in (0, 1, len(self.layers)):
                    raise ValueError(
                        f"rung {name} gives {given} numbers of {field} for {len(self.layers)} trimming layers"
                    )
        last = [rung.regions[-1] for rung in self.rungs.values()]
        if last != sorted(last, reverse=True):
            raise ValueError("rungs must go from the largest budget to the smallest")
        return self


class SelfCriticalSection(TrainSection):
    lr: float = Field(1e-6, gt=0)
    num_samples: int = Field(5, gt=0)
    """Captions drawn per image and step; each is compared with the greedy one."""


class CaptionSection(FineTuneSection):
    """Defaults are the published fine-tuning on COCO captions (20 epochs; MiniVLM authors' configuration)."""

    batch_size: int = Field(512, gt=0)
    lr: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    num_caption: int = Field(40, ge=4)
    """Text tokens for the caption, with [CLS] and [SEP]; longer ones are cut."""
    num_tags: int = Field(30, ge=1)
    """Text tokens for the tags behind it; `text.max_tokens` must hold both."""
    tag_confidence: float = Field(0.2, ge=0, le=1)
    """Regions of at least this score give their class as a tag."""
    every_word: bool = False
    """Learn all words of a caption at once, each from exactly what generation shows (ours), instead of a masked few."""
    mask_share: float = Field(0.15, gt=0, le=1)
    max_masked: int = Field(3, gt=0)
    """Words of a caption that are masked at most."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    max_words: int = Field(20, gt=0)
    """Longest caption that is generated, in word pieces."""
    num_beams: int = Field(1, gt=0)
    """1 = greedy."""
    length_penalty: float = Field(1.0, ge=0)
    """A beam's score is its log-probability / length ** length_penalty."""
    no_repeat: int = Field(0, ge=0)
    """No sequence of so many word pieces twice in a caption; 0 = free."""
    self_critical: SelfCriticalSection | None = None
    """CIDEr optimisation afterwards; None = cross-entropy only."""

    @model_validator(mode="after")
    def _fits(self) -> "CaptionSection":
        if self.max_words >= self.num_caption:
            raise ValueError("max_words must be smaller than num_caption: [CLS] takes one place")
        return self


class CalibrationSection(Section):
    num_samples: int = Field(64, gt=0)
    min_samples: int = Field(32, gt=0)
    """Fewer is refused."""


class GovernSection(Section):
    """How far a governor may trust small rungs (docs/governor.md)."""

    epsilon: float = Field(0.01, gt=0, lt=1)
    """Accuracy that may be lost against the full rung, 0..1 ..."""
    delta: float = Field(0.1, gt=0, lt=1)
    """... except with this probability, over the draw of the held-out half of the validation split."""
    unit: Literal["image", "text"] = "image"
    """What the data draw independently: images, each with its questions; or texts, each with the images it is about."""
    temperature: float = Field(1.0, gt=0)
    """Of the softmax that the margin is taken from."""
    seed: int = Field(0, ge=0)
    """Of the order in which held-out units are tested. A seed that is chosen by its result voids the promise."""


class ExportSection(Section):
    targets: tuple[str, ...] = ("onnx", "tflite", "openvino", "coreml")
    precisions: tuple[str, ...] = ("fp32", "int8")
    num_golden: int = Field(6, gt=0)


class VerifySection(Section):
    num_samples: int = Field(600, gt=0)
    """Validation questions that every exported file answers."""
    max_abs_logits_fp32: float = Field(1e-4, gt=0)
    """Largest difference of a logit from PyTorch's, pixels to logits; where logits exceed 10, it grows with them."""
    min_agreement_fp32: float = Field(0.999, ge=0, le=1)
    min_retention_int8: float = Field(0.98, ge=0, le=1)
    """Task metric of an int8 file / PyTorch fp32 on the same samples and rung."""


class BenchSection(Section):
    threads: int = Field(1, gt=0)
    warmup: int = Field(10, ge=0)
    runs: int = Field(50, gt=0)


class GateSection(Section):
    """Promises of the whole run; None = not checked. A broken one makes the command exit 2."""

    min_points_above_majority: float | None = None
    """Student's test accuracy minus the majority answer's, in points (0..100)."""
    min_student_retention: float | None = None
    """Student / teacher test accuracy."""


class Recipe(Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    task: Literal["vqa", "reasoning", "entailment", "retrieval", "captioning", "pretraining", "detection"]
    seed: int = 0
    data: DataSection
    preprocess: PreprocessSpec
    text: TextSection = TextSection()  # pyright: ignore[reportCallIssue]
    referred_weight: float = Field(1.0, ge=0)
    """Weight of the auxiliary loss 'which regions does the text refer to', where the data say so."""
    tee: Choice
    extractor: str | None = None
    """Folder of a trained detector (a checkpoint) whose extractor is taken as it is, with its classes and attributes;
    None = the stage `detector` trains one on this data's boxes. `tee` must name its shape."""
    detector: DetectorSection
    regions: RegionsSection = RegionsSection()  # pyright: ignore[reportCallIssue]
    pretrain: PretrainSection | None = None
    """Learn from captions and tags before any task; None = no such stage."""
    synthetic: SyntheticSection | None = None
    """Learn from drawn sentences before the teacher and beside real ones; None = real ones only."""
    teacher: TeacherSection
    teacher_outputs: TeacherOutputsSection = TeacherOutputsSection()  # pyright: ignore[reportCallIssue]
    distil: DistilSection
    retrieval: RetrievalSection | None = None
    """Image-text retrieval, where the run has that stage."""
    pairs: PairsSection | None = None
    """Sentences about two images (NLVR2), where the run has that stage."""
    prune: PruneSection
    trim: TrimSection
    captioning: CaptionSection | None = None
    """Fine-tune on captioning, and end there; None = another task."""
    calibration: CalibrationSection = CalibrationSection()  # pyright: ignore[reportCallIssue]
    govern: GovernSection = GovernSection()  # pyright: ignore[reportCallIssue]
    export: ExportSection = ExportSection()  # pyright: ignore[reportCallIssue]
    verify: VerifySection = VerifySection()  # pyright: ignore[reportCallIssue]
    bench: BenchSection = BenchSection()  # pyright: ignore[reportCallIssue]
    gates: GateSection = GateSection()

    @model_validator(mode="after")
    def _one_start(self) -> "Recipe":
        if self.pretrain is not None and self.teacher.start is not None:
            raise ValueError("teacher.start and pretrain exclude each other: the teacher starts from one of them")
        return self

    @model_validator(mode="after")
    def _what_outputs_hold(self) -> "Recipe":
        if self.distil.precompute and self.distil.nce_weight and not self.teacher_outputs.pooled:
            raise ValueError("distil.nce_weight with distil.precompute needs teacher_outputs.pooled: true")
        if self.distil.precompute and self.synthetic is not None:
            raise ValueError(
                "distil.precompute and synthetic exclude each other: drawn sentences are new in every step"
            )
        return self
