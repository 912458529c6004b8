"""The recipe of a run: every option, as typed dataclasses. Hydra fills them from `hydra_conf/`.

Lengths are in tokens, times in seconds and sizes in bytes unless the comment of a field gives another unit. `???` (MISSING)
marks a field without a default: a file of `hydra_conf/` or the command line must set it.
"""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import MISSING

if TYPE_CHECKING:

    class Family(Enum):
        """Architecture of a model, by the `model_type` of transformers. Each family is one file of `recipes/families/`."""

else:
    _names = (path.stem for path in Path(__file__).with_name("families").glob("[!_]*.py"))
    Family = Enum("Family", {name: name for name in sorted(_names)})


class Mtp(Enum):
    """What an export does with the base's multi-token-prediction layers. They are never trained."""

    copy = "copy"  # copy them unchanged
    drop = "drop"  # leave them out, and set their number in config.json to 0


class Dtype(Enum):
    """Floating-point format of weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"


class Rope(Enum):
    """What happens to rotary positions beyond the native context."""

    native = "native"  # longer sequences are refused
    unscaled = "unscaled"  # positions continue without scaling
    yarn = "yarn"  # positions are scaled by YaRN (arXiv 2309.00071)


class Recompute(Enum):
    """What the backward pass recomputes, from the fastest (most memory) to the leanest (least memory)."""

    none = "none"  # nothing
    selective = "selective"  # the MLPs and the experts
    linear = "linear"  # every layer from its input, except the attention kernel; the cost is linear in the length
    full = "full"  # every layer from its input


class OptimizerState(Enum):
    """Where the optimizer state is: the fp32 weights and Adam's two moments."""

    resident = "resident"  # on the GPU
    precision_aware = "precision_aware"  # on the GPU, without the bits that the bf16 weights already hold
    offloaded = "offloaded"  # in host memory


class AttentionKernel(Enum):
    """Kernel of packed attention on a GPU, for the embedded engine."""

    varlen = "varlen"  # PyTorch's varlen attention: FlashAttention-2
    flash4 = "flash4"  # the same call, run by FlashAttention-4 of the package flash-attn-4
    cudnn = "cudnn"  # cuDNN's, one sequence after the other


class Sampling(Enum):
    """How trajectories are divided into steps."""

    epochs = "epochs"  # every trajectory equally often; the steps of an epoch differ in size by at most one
    stream = "stream"  # batches of exactly `batch_size`, cut from endless shuffled epochs like slime's data source


class Turns(Enum):
    """Which assistant turns are supervised. Never: turns with `weight: 0`, turns that say nothing, the turn that opens a
    conversation."""

    all = "all"  # every turn
    last_segment = "last_segment"  # the turns after the last user message


class Thinking(Enum):
    """What happens to reasoning in the training text."""

    supervise = "supervise"  # shown and supervised
    context = "context"  # shown but not supervised
    drop = "drop"  # removed


class ErroneousCalls(Enum):
    """What happens to turns with a call that failed or breaks its tool's schema."""

    supervise = "supervise"  # shown and supervised
    mask = "mask"  # shown but not supervised


class SchemaBreaks(Enum):
    """What happens to trajectories with a call that breaks its tool's schema."""

    reject = "reject"  # rejected
    accept = "accept"  # accepted, and the calls are counted


class BrokenCalls(Enum):
    """What happens to trajectories with a call whose arguments the model itself broke: text that is no JSON object."""

    reject = "reject"  # rejected
    cut = "cut"  # kept up to the message before it: SGLang refuses every later prompt, which would show it


class OpenCalls(Enum):
    """What happens to trajectories in which a message comes before the result of a call, as when a user interrupts it."""

    reject = "reject"  # rejected
    keep = "keep"  # kept in the order of the record


class SpecialTokens(Enum):
    """What happens to trajectories whose text contains a special token of the tokenizer."""

    reject = "reject"  # rejected
    escape = "escape"  # accepted, with a space inserted after the first character of the token


class TooLong(Enum):
    """What happens to trajectories longer than `data.max_tokens`."""

    reject = "reject"  # rejected
    split = "split"  # cut before user messages; each piece is a separate conversation


class EngineName(Enum):
    """Program that trains."""

    megatron = "megatron"  # embedded engine: Ray actors with megatron-core from PyPI
    slime = "slime"  # slime on a cluster, with Megatron-LM and Transformer Engine


class Save(Enum):
    """What a checkpoint holds."""

    full = "full"  # weights and optimizer state, from which the run goes on; weights alone after the last step
    weights = "weights"  # weights alone, enough for `make export step=N`; a run cannot go on from them


@dataclass
class Model:
    """Dimensions and checkpoint of a model. Names follow Megatron; values follow the checkpoint's `config.json`."""

    name: str = MISSING  # name of the model in messages and reports
    family: Family = MISSING  # architecture: the model_type of config.json
    checkpoint: str = MISSING  # base weights: a Hugging Face folder, or a repository on the Hugging Face hub
    # What the chat template is told besides messages and tools, by name: model.template_options.enable_thinking=false. The
    # server is told the same.
    template_options: dict[str, str] = field(default_factory=dict)
    random_init: bool = False  # if `checkpoint` is missing, create it with seeded random weights
    layers: int = MISSING  # number of decoder layers, without multi-token-prediction layers
    hidden: int = MISSING  # width of the hidden state
    ffn: int = MISSING  # width of a dense layer's MLP
    heads: int = MISSING  # number of attention (query) heads
    kv_heads: int = MISSING  # number of key-value heads
    head_dim: int = MISSING  # width of one attention head
    vocab: int = MISSING  # rows of the embedding
    max_position: int = MISSING  # max_position_embeddings of config.json, in tokens
    native_context: int = MISSING  # longest sequence of pretraining, in tokens
    rope: Rope = Rope.native  # what happens to positions beyond native_context
    rope_factor: float = 1.0  # YaRN's factor: sequences may have up to rope_factor x native_context tokens
    rope_base: float = MISSING  # base of the rotary frequencies (rope_theta)
    rope_fraction: float = 1.0  # share of each head's width that is rotated
    norm_eps: float = 1e-6  # epsilon of RMSNorm
    qk_norm: bool = MISSING  # RMSNorm on queries and keys
    qkv_bias: bool = MISSING  # biases on the query, key and value projections
    tied: bool = MISSING  # the output layer shares the weights of the embedding
    experts: int = 0  # routed experts of a mixture-of-experts layer; 0 means a dense model
    top_k: int = 0  # routed experts that process each token
    expert_ffn: int = 0  # width of one expert's MLP
    shared_experts: int = 0  # experts of a mixture-of-experts layer that process every token
    dense_layers: int = 0  # leading layers without experts
    router_scaling: float = 1.0  # factor on the router's weights of the chosen experts
    mtp_layers: int = 0  # multi-token-prediction layers of the base; they are not trained
    mtp: Mtp = Mtp.copy  # what an export does with the multi-token-prediction layers


@dataclass
class Columns:
    """Columns of a record that hold the conversation."""

    messages: str = "messages"  # column of the messages
    tools: str = "tools"  # column of the tools


@dataclass
class Data:
    """Trajectories of the run and how they become training text."""

    source: str = MISSING  # format of the records: a module of data_prep/sources; auto tells it from the file
    path: str = MISSING  # training trajectories: a file or folder, or a data set on the Hugging Face hub
    heldout: str | None = None  # evaluation trajectories, in the same format; null means no held-out loss
    revision: str | None = None  # commit, tag or branch of a data set on the hub; null means the newest commit
    split: str | None = None  # split of data.path on the hub, such as train; null means that it has only one
    out: str = MISSING  # folder of the packed data sets, each named by the hash of its inputs
    max_tokens: int = 155_648  # longest trajectory, in tokens; the default is 152 x 1024, LIMI's longest
    max_rejected: int = 0  # most records that may be rejected; more is an error
    workers: int | None = None  # packing processes; null means one per core, and a single one for a small source
    columns: Columns = field(default_factory=Columns)  # columns of a record that hold the conversation
    tools: str | None = None  # file of tools for records without: a JSON list, or a request that has tools
    system: str | None = None  # text file of the system prompt for records without
    turns: Turns = Turns.all  # which assistant turns are supervised
    thinking: Thinking = Thinking.supervise  # whether reasoning is supervised, shown as context or dropped
    erroneous_calls: ErroneousCalls = ErroneousCalls.supervise  # turns with a failed or schema-breaking call
    schema_breaks: SchemaBreaks = SchemaBreaks.reject  # trajectories with a call that breaks its tool's schema
    broken_calls: BrokenCalls = BrokenCalls.reject  # trajectories with arguments that are no JSON object
    open_calls: OpenCalls = OpenCalls.reject  # trajectories with a message before the result of a call
    special_tokens: SpecialTokens = SpecialTokens.reject  # trajectories with special tokens in their text
    too_long: TooLong = TooLong.reject  # trajectories longer than max_tokens


@dataclass
class Optim:
    """AdamW with a linear warm-up and a cosine decay. A step is one optimizer step."""

    lr: float = MISSING  # peak learning rate, reached after the warm-up
    min_lr_ratio: float = MISSING  # learning rate of the last step, as a share of lr
    epochs: int = MISSING  # passes over the training trajectories
    batch_size: int = MISSING  # trajectories per step, over all ranks
    copies: int = 1  # times that each trajectory occurs in one epoch
    sampling: Sampling = Sampling.epochs  # how trajectories are divided into steps
    warmup_steps: int = MISSING  # steps of the warm-up; the first step's rate is lr / (warmup_steps + 1)
    # Warm-up as a share of all steps, counted as Megatron does: the first step's rate is zero. It overrides warmup_steps;
    # null means that warmup_steps counts.
    warmup_fraction: float | None = None
    eval_steps: int = MISSING  # steps between held-out losses; also before the first step and after the last
    weight_decay: float = 0.1  # AdamW's decoupled weight decay
    beta1: float = 0.9  # Adam's decay of the first moment
    beta2: float = 0.98  # Adam's decay of the second moment
    eps: float = 1e-8  # Adam's epsilon, added to the denominator
    clip_grad: float = 1.0  # largest norm of the gradient; a longer gradient is scaled down to it; 0 turns it off


@dataclass
class Layout:
    """Degrees of parallelism, and what is saved, recomputed or offloaded to fit the memory.

    With `search` the planner chooses every field that `fixed` does not name.
    """

    search: bool = False  # let the planner choose the layout (layout=auto sets it)
    fixed: list[str] = field(default_factory=list)  # set by the program: fields that the command line names

    tp: int = 1  # tensor-parallel degree
    sp: bool = False  # sequence parallelism, which needs tp above 1
    pp: int = 1  # pipeline-parallel degree: number of stages
    vpp: int = 1  # model chunks per pipeline stage; above 1 the schedule is interleaved
    cp: int = 1  # context-parallel degree: ranks that share each sequence
    ep: int = 1  # expert-parallel degree
    etp: int = 1  # tensor-parallel degree of the experts
    # Data-parallel degree. It follows from the number of ranks / (tp x pp x cp); a given value is only checked. null means
    # no check.
    dp: int | None = None
    first_stage_layers: int | None = None  # layers of the first pipeline stage; null means as many as the middle ones
    last_stage_layers: int | None = None  # layers of the last pipeline stage; null means as many as the middle ones
    recompute: Recompute = Recompute.none  # what the backward pass recomputes
    offload: bool = False  # move to host memory what linear or full recomputation saves (embedded engine)
    optimizer_state: OptimizerState = OptimizerState.resident  # where the optimizer state is
    # Tokens whose softmax is computed at a time; the backward pass recomputes it chunk by chunk. null means all at once.
    loss_chunk: int | None = None
    max_tokens_per_gpu: int = MISSING  # a micro-batch holds at most cp x this many tokens, padding included


@dataclass
class Gpu:
    """Data-sheet figures of one GPU. Bandwidths count one direction. A null figure means that nothing is predicted."""

    name: str = MISSING  # name of the GPU in messages and reports
    dtype: Dtype = MISSING  # precision in which the embedded engine trains on it
    timeout: int = MISSING  # longest time that one step of the embedded engine may take, in seconds
    memory_mib: int | None = None  # memory in MiB, as nvidia-smi shows it; null means no GPU: ranks run on CPU cores
    bf16_tflops: float | None = None  # peak of dense bf16 matrix products, in TFLOP/s
    memory_gb_s: float | None = None  # bandwidth of its memory, in GB/s
    nvlink_gb_s: float | None = None  # bandwidth of NVLink, in GB/s
    pcie_gb_s: float | None = None  # bandwidth between GPU and host, in GB/s
    attention: AttentionKernel = AttentionKernel.varlen  # kernel of packed attention in the embedded engine
    matmul_efficiency: float | None = None  # share of bf16_tflops that matrix products attain
    varlen_efficiency: float | None = None  # share of bf16_tflops that `attention=varlen` attains, forward
    varlen_backward_efficiency: float | None = None  # share of bf16_tflops that `attention=varlen` attains, backward
    flash4_efficiency: float | None = None  # share of bf16_tflops that `attention=flash4` attains, forward
    flash4_backward_efficiency: float | None = None  # share of bf16_tflops that `attention=flash4` attains, backward
    cudnn_efficiency: float | None = None  # share of bf16_tflops that cuDNN's attention, also slime's, attains, forward
    # Share of bf16_tflops that cuDNN's attention, also slime's, attains, backward.
    cudnn_backward_efficiency: float | None = None
    hour_price: float | None = None  # price of one GPU for one hour, in any currency; null means no cost in plans


@dataclass
class Cluster:
    """Machines of the run."""

    name: str = MISSING  # name of the cluster in messages; "local" means this machine's cores
    nodes: int = MISSING  # number of nodes
    gpus_per_node: int = MISSING  # ranks per node, one per GPU; on a machine without GPUs one per core
    cpus_per_node: int | None = None  # CPU cores of one node, which KubeRay's pods ask for; null means 8 per GPU
    host_memory_gb: float | None = None  # memory of one node, in GB; null means that it is not checked
    # Network bandwidth between nodes per GPU, one direction, in GB/s; null means that no times are predicted.
    network_gb_s: float | None = None
    disk_gb_s: float | None = None  # write bandwidth of the whole shared file system, in GB/s
    root: str = MISSING  # absolute path of a folder that every node sees; it holds runs, data and models
    # Address of the Ray dashboard that takes the jobs, http://HEAD:8265; null means that Ray starts on this machine.
    address: str | None = None
    rdma_resource: str | None = None  # KubeRay: name of the RDMA devices, one per GPU, as rdma/hca; null means none
    host_network: bool = False  # KubeRay: pods use their node's network
    interface: str | None = None  # network interface of NCCL's and Gloo's sockets; null means that they choose
    env: dict[str, str] = field(default_factory=dict)  # variables added to the environment of every rank


@dataclass
class Engine:
    """The program that trains, its checkpoints and its recovery from failures."""

    name: EngineName = MISSING  # megatron (embedded) or slime
    dtype: Dtype = MISSING  # precision of training
    # Steps between checkpoints; one more follows the last step. null means a quarter of the run's steps, at most 100.
    save_steps: int | None = None
    save: Save = Save.full  # what a checkpoint holds
    keep_last: int = MISSING  # number of checkpoints that remain; older ones are removed
    timeout: int = MISSING  # longest wait for a step, a save or the start of the ranks, in seconds
    max_retries: int = MISSING  # restarts from the last checkpoint after a rank died or hung
    # slime: longest wait for nodes that the cluster lost, in seconds; null means no limit.
    node_timeout: int | None = None
    args: dict[str, str] = field(default_factory=dict)  # slime: further flags by name; "true" for a flag without value
    # slime: project on Weights & Biases; null means none. The key must be in the environment in which Ray was started.
    wandb: str | None = None
    slime_root: str | None = None  # slime: checkout of slime at the pinned commit
    megatron_root: str | None = None  # slime: checkout of Megatron-LM at the pinned commit
    # Python that runs slime, and SGLang on GPUs; null means this environment's Python.
    python: str | None = None
    # Stop when the loss of a step exceeds this multiple of the largest loss of the ten steps before; null means never.
    spike: float | None = MISSING


@dataclass
class Sanity:
    """Server and limits of the sanity check, which serves the exported model and compares it with its base."""

    # Address of a running SGLang server, http://HOST:PORT, which is left running; null means that one starts here.
    url: str | None = None
    # Port of the server on loopback. null means a free port; `serve` takes 30000 if that one is free.
    port: int | None = None
    tp: int | None = None  # GPUs that share the model; null means the fewest of one node that hold it
    timeout: int = MISSING  # seconds without a sign of life after which a server counts as hung
    nll_tolerance: float = MISSING  # nats per token that held-out loss may differ, server to trainer, both in fp32
    nll_tolerance_bf16: float = MISSING  # the same limit if either computes in bf16, where sums are rounded
    prompts: int = MISSING  # most turns asked of the training data and of the held-out data, spread evenly over each
    # Least share of training prompts answered with exactly the recorded calls; null means that no share is required.
    min_tool_calls: float | None = MISSING
    # Least share of training tasks that the model must finish as recorded; null means that no share is required.
    min_finished: float | None = MISSING
    # Least share of answers that are well formed: they end, call known tools correctly, contain no special marks, do not
    # repeat themselves and do not change language.
    min_well_formed: float = MISSING
    # Largest change of a weight, as a multiple of the sum of all learning rates. Adam's worst case is 1.7 at beta2=0.98.
    max_moved: float = MISSING
    # Nats per held-out token by which the loss may exceed the base's before a check warns: of the whole, a turn or a position.
    max_above_base: float = MISSING


@dataclass
class Bench:
    """What `bench-gpu` measures."""

    rows: str | None = None  # names of rows, separated by commas, in the order of measurement; null means all
    # roofline, ours, theirs (transformers) and profile (one step of ours, kernel by kernel), separated by commas; null means
    # the first three.
    sides: str | None = None
    steps: int | None = None  # timed steps of each side; null means the row's own number


@dataclass
class Recipe:
    """Every option of a command."""

    run: str = MISSING  # name of the run: up to 100 letters, digits, '.', '_' and '-'
    overrides: list[str] = field(default_factory=list)  # set by the program: those of the command line, unchanged
    seed: int = MISSING  # seed of random initial weights, of the shuffled epochs and of the sanity check's samples
    dry_run: bool = False  # only print the resolved recipe and what would run
    anew: bool = False  # `train`: start at the first step, and move the existing run folder aside
    limit_s: int = 540  # `bench-gpu`: longest time of one call, in seconds; the next call continues
    smoke: bool = False  # `bench-gpu`: only check in a minute or two that all works on this GPU, with a figure each
    id: str | None = None  # `inspect`: trajectory to show; null means a list of all
    html: bool = False  # `inspect`: write a page of the set, with a table that sorts and filters and a reader
    checkpoint: str | None = None  # `sanity`, `serve`: Hugging Face folder to use; null means the run's export
    # `replay`: step to repeat, counted from 1; it must be given. `export`: number of completed steps of the checkpoint to
    # export; null means the newest checkpoint.
    step: int | None = None
    model: Model = field(default_factory=Model)  # the model and its base checkpoint
    data: Data = field(default_factory=Data)  # the trajectories
    optim: Optim = field(default_factory=Optim)  # optimizer, learning rate and steps
    layout: Layout = field(default_factory=Layout)  # parallelism and memory
    gpu: Gpu = field(default_factory=Gpu)  # figures of the GPU
    cluster: Cluster = field(default_factory=Cluster)  # nodes, network and folders
    engine: Engine = field(default_factory=Engine)  # the program that trains
    sanity: Sanity = field(default_factory=Sanity)  # the check of the exported model
    bench: Bench = field(default_factory=Bench)  # what `bench-gpu` measures
