"""The recipe: every choice of a run as typed dataclasses. Hydra fills them from `hydra_conf/`.

Lengths are in tokens, times in seconds, sizes in bytes unless a field says otherwise.
"""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import MISSING

if TYPE_CHECKING:

    class Family(Enum):
        """Architecture as transformers names its `model_type`; a family is a file of `recipes/families/`."""

else:
    _names = (path.stem for path in Path(__file__).with_name("families").glob("[!_]*.py"))
    Family = Enum("Family", {name: name for name in sorted(_names)})


class Mtp(Enum):
    """What an export does with the base's multi-token-prediction layers, which are not trained."""

    copy = "copy"
    drop = "drop"


class Dtype(Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class Rope(Enum):
    """Rotary positions beyond the native context: refused, left unscaled, or scaled by YaRN (arXiv 2309.00071)."""

    native = "native"
    unscaled = "unscaled"
    yarn = "yarn"


class Recompute(Enum):
    """What a backward pass computes again: nothing; the MLPs and experts; every layer from its input but attention's kernel, so
    that only what grows linearly with the length comes twice; every layer from its input. From the fastest to the leanest."""

    none = "none"
    selective = "selective"
    linear = "linear"
    full = "full"


class OptimizerState(Enum):
    """fp32 weights and two moments on the GPU; there without the bits that the bf16 weights hold already; on the host."""

    resident = "resident"
    precision_aware = "precision_aware"
    offloaded = "offloaded"


class Sampling(Enum):
    """epochs: every trajectory comes equally often, and steps of an epoch differ in size by at most one. stream: batches of
    exactly `batch_size` are cut from an endless row of shuffled epochs, as slime's own data source does."""

    epochs = "epochs"
    stream = "stream"


class Turns(Enum):
    """Which assistant turns are supervised: every one, those after the last user message, or those whose message does
    not say `weight: 0`."""

    all = "all"
    last_segment = "last_segment"
    weighted = "weighted"


class Thinking(Enum):
    """Reasoning is learned, shown without being learned, or left out of the text."""

    supervise = "supervise"
    context = "context"
    drop = "drop"


class ErroneousCalls(Enum):
    """Turns with a call that failed or that its tool's schema refuses: learned, or shown without being learned."""

    supervise = "supervise"
    mask = "mask"


class SchemaBreaks(Enum):
    """Trajectories with a call that its tool's schema refuses: rejected, or accepted and counted."""

    reject = "reject"
    accept = "accept"


class SpecialTokens(Enum):
    """Trajectories with one of the tokenizer's special tokens as text: rejected, or a space put behind its first
    character."""

    reject = "reject"
    escape = "escape"


class TooLong(Enum):
    """Trajectories over `data.max_tokens`: rejected, or cut before user messages, each piece a conversation of its own."""

    reject = "reject"
    split = "split"


class EngineName(Enum):
    megatron = "megatron"
    slime = "slime"


@dataclass
class Model:
    """Dimensions and checkpoint of a model; the names follow Megatron, the values its `config.json`."""

    name: str = MISSING
    family: Family = MISSING
    checkpoint: str = MISSING  # a Hugging Face folder
    random_init: bool = False  # make `checkpoint` here, with seeded random weights, where it is missing
    layers: int = MISSING
    hidden: int = MISSING
    ffn: int = MISSING
    heads: int = MISSING
    kv_heads: int = MISSING
    head_dim: int = MISSING
    vocab: int = MISSING  # rows of the embedding
    max_position: int = MISSING  # of config.json
    native_context: int = MISSING  # tokens that pretraining reached
    rope: Rope = Rope.native
    rope_factor: float = 1.0  # YaRN's: the longest sequence is this times native_context
    rope_base: float = MISSING
    rope_fraction: float = 1.0  # share of a head that is rotated
    norm_eps: float = 1e-6
    qk_norm: bool = MISSING
    qkv_bias: bool = MISSING
    tied: bool = MISSING  # the output layer shares the embedding
    experts: int = 0  # routed experts; 0 is a dense model
    top_k: int = 0
    expert_ffn: int = 0
    shared_experts: int = 0
    dense_layers: int = 0  # leading layers without experts
    router_scaling: float = 1.0
    mtp_layers: int = 0
    mtp: Mtp = Mtp.copy


@dataclass
class Data:
    source: str = MISSING  # a module of data_prep/sources
    path: str = MISSING  # training trajectories: a file, or a data set on the Hugging Face hub
    heldout: str | None = None  # evaluation trajectories, from the same source
    out: str = MISSING  # folder of packed data sets, each named by the hash of its inputs
    max_tokens: int = 155_648  # 152 x 1024: LIMI's longest trajectory
    max_rejected: int = 0  # more rejected records than this are an error
    workers: int | None = None  # processes; one a core where null, and one in all for a small source
    turns: Turns = Turns.all
    thinking: Thinking = Thinking.supervise
    erroneous_calls: ErroneousCalls = ErroneousCalls.supervise
    schema_breaks: SchemaBreaks = SchemaBreaks.reject
    special_tokens: SpecialTokens = SpecialTokens.reject
    too_long: TooLong = TooLong.reject


@dataclass
class Optim:
    """Adam with a warm-up and a cosine; every figure is in optimizer steps."""

    lr: float = MISSING
    min_lr_ratio: float = MISSING  # rate of the last step, as a share of lr
    epochs: int = MISSING
    batch_size: int = MISSING  # trajectories a step
    copies: int = 1  # times a trajectory comes in an epoch
    sampling: Sampling = Sampling.epochs
    warmup_steps: int = MISSING
    warmup_fraction: float | None = (
        None  # of all steps, as Megatron counts them, the first at zero; wins over warmup_steps
    )
    eval_steps: int = MISSING  # held-out loss every so many steps, before the first and after the last
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class Layout:
    """Degrees of parallelism. `dp` follows from the world size and is checked where it is given. With `search` the planner
    fills in everything that `fixed` does not name."""

    search: bool = False
    fixed: list[str] = field(default_factory=list)  # fields that the command line named

    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int | None = None
    first_stage_layers: int | None = None  # of the pipeline, where its stages are not alike
    last_stage_layers: int | None = None
    recompute: Recompute = Recompute.none
    offload: bool = False  # what linear or full recomputation keeps waits in the host's memory
    optimizer_state: OptimizerState = OptimizerState.resident
    loss_chunk: int | None = (
        None  # tokens whose softmax is computed at a time, and again backward; all at once where null
    )
    max_tokens_per_gpu: int = MISSING  # a micro-batch holds at most this times cp, padding counted


@dataclass
class Gpu:
    """Data-sheet figures, bandwidths in one direction; null where nothing is predicted."""

    name: str = MISSING
    dtype: Dtype = MISSING  # that the embedded engine trains in
    timeout: int = MISSING  # seconds that its longest step may take
    memory_mib: int | None = None
    bf16_tflops: float | None = None  # dense
    memory_gb_s: float | None = None
    nvlink_gb_s: float | None = None
    pcie_gb_s: float | None = None
    matmul_efficiency: float | None = None  # attained share of the peak
    attention_efficiency: float | None = None
    attention_backward_efficiency: float | None = None
    hour_price: float | None = None  # of one GPU, in any currency


@dataclass
class Cluster:
    name: str = MISSING
    nodes: int = MISSING
    gpus_per_node: int = MISSING  # ranks a node; on a machine without GPUs a rank takes one core
    host_memory_gb: float | None = None  # of a node
    network_gb_s: float | None = None  # between nodes, a GPU, one direction
    disk_gb_s: float | None = None  # writing, of the whole file system
    root: str = MISSING  # absolute folder every node sees: runs, data, models
    address: str | None = (
        None  # of a Ray head's dashboard, http://HEAD:8265, where jobs go; null starts Ray on this machine
    )
    interface: str | None = None  # network interface of NCCL's and Gloo's sockets; where null they choose
    env: dict[str, str] = field(default_factory=dict)  # added to the environment of every rank


@dataclass
class Engine:
    name: EngineName = MISSING
    dtype: Dtype = MISSING
    save_steps: int = MISSING  # a checkpoint every so many steps, and one after the last
    keep_last: int = MISSING  # older checkpoints are removed
    timeout: int = MISSING  # longest wait for a step, a save or the start of the ranks
    max_retries: int = MISSING  # new starts from the last checkpoint after a rank died or hung
    args: dict[str, str] = field(default_factory=dict)  # slime's further flags by name, "true" for one without a value
    wandb: str | None = (
        None  # slime: project on Weights & Biases, the key being in the environment that Ray was started in
    )
    slime_root: str | None = None  # checkouts at the pinned commits, and the Python that runs them
    megatron_root: str | None = None
    python: str | None = None
    spike: float | None = MISSING  # stop where a step's loss is over this many times the largest of the ten before it


@dataclass
class Sanity:
    url: str | None = None  # http://HOST:PORT of a SGLang that is up already and is left as it is; null starts one here
    port: int | None = None  # the server's port on loopback; a free one where null, for `serve` 30000 where it is free
    tp: int | None = None  # GPUs that share the model; where null the fewest of one node that hold it
    timeout: int = (
        MISSING  # seconds of silence after which a server is given up; while anything comes of it, it is waited for
    )
    nll_tolerance: float = MISSING  # held-out loss, server against trainer, both in fp32
    nll_tolerance_bf16: float = MISSING  # of a trainer in bf16, whose sums are rounded
    prompts: int = MISSING  # most turns that are asked of the training and of the held-out data, evenly over it
    min_tool_calls: float | None = (
        MISSING  # share of trained prompts answered with exactly the right calls; null judges none
    )
    min_finished: float | None = MISSING  # share of trained tasks that it must finish as recorded; null judges none
    min_well_formed: float = MISSING  # share of answers that end, call known tools rightly, leak no marks, and so on
    max_moved: float = (
        MISSING  # largest change of a weight, in sums of the learning rates; Adam's worst is 1.7 at beta2=0.98
    )
    max_above_base: float = MISSING  # nats a held-out token, all or those of a turn or position, before a check warns


@dataclass
class Recipe:
    run: str = MISSING  # the run's name: letters, digits, '.', '_' and '-'
    words: list[str] = field(default_factory=list)  # the command line's, which a submitted job gets as they are
    seed: int = MISSING
    dry_run: bool = False  # print the resolved recipe and what would run
    anew: bool = False  # `train` from the first step; what is in the run's folder moves aside
    limit_s: int = 540  # of one call of `bench-gpu`, which goes on in the next
    id: str | None = None  # of the trajectory that `inspect` shows
    checkpoint: str | None = None  # Hugging Face folder that `sanity` and `serve` take; the run's export where null
    step: int | None = (
        None  # that `replay` repeats, the first being 1; completed ones of the checkpoint that `export` takes
    )
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    layout: Layout = field(default_factory=Layout)
    gpu: Gpu = field(default_factory=Gpu)
    cluster: Cluster = field(default_factory=Cluster)
    engine: Engine = field(default_factory=Engine)
    sanity: Sanity = field(default_factory=Sanity)
