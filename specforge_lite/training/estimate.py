"""Peak memory of one training rank, term by term, before anything is started; also its time per step and disk.

    peak = what stays (weights, optimizer, gradients, target's head, batches) + the largest of three moments:

      teacher    the target's logits over the draft vocabulary are made
      loss       all K steps are done, the loss runs: every activation is alive, and the head's buffers
      backward   the first gradients exist, the last activations are still alive

Terms follow model/eagle3.py and model/block.py, allocation by allocation, so they move with every setting;
benchmarks/bench_memory.py holds them against measured peaks. An in-process target (`--target-backend hf`) and the
libraries themselves (200 to 400 MB of host memory, a CUDA context of 500 MB) come on top.

Letters: P trained parameters, N key rows, M predicted tokens, R rows of a step, K steps, D draft width, H target width,
A aux layers, F feed-forward width, V / Vd vocabularies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from specforge_lite.checkpoints.draft_files import expected_shapes
from specforge_lite.core.errors import ConfigError
from specforge_lite.model.block_loss import CPU_CHUNK_BYTES, GPU_CHUNK_SHARE
from specforge_lite.model.block_plan import BLOCKS_PER_CALL
from specforge_lite.model.draft import DraftConfig
from specforge_lite.model.losses import CPU_PASS_ELEMENTS, UNKNOWN_MEMORY, chunk_elements

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0 + 8 / 256}  # per parameter; 8-bit: one fp32 scale per 256 values
# What the allocator keeps of freed blocks, as a share of what comes and goes: measured for glibc, assumed for CUDA.
ALLOCATOR_SHARE = {"cpu": 0.35, "cuda": 0.08}
BLOCK_ALLOCATOR_SHARE = 0.08  # few large tensors, which glibc maps and gives back; measured in three cases
BLOCK_ROWS = 128  # rows and keys of a block of flex_attention
CONTEXT_BYTES = 1.5 * 2**30  # CUDA context, cuBLAS workspaces and NCCL buffers of a process
# Where nothing else is given: Hopper SXM in bf16, one CPU core in fp32. Peak TFLOP/s, what share of it large matrix
# products reach, GB/s of memory, and of the link between ranks. Peaks are the vendor's; shares are assumptions.
MACHINES = {"cuda": (989.0, 0.65, 3350.0, 400.0), "cpu": (0.13, 0.7, 20.0, 5.0)}


@dataclass(frozen=True)
class Workload:
    """What decides about memory besides the draft's shape.

    tokens: of a rank's micro batch (batch size x sample length, or the packing budget). supervised: share of them.
    world_size, sp_size: ranks, and how many of them share a batch. captured_ahead: micro batches of hidden states that
    wait, on the host, or on the GPU where the target runs in the trainer's process (target_in_process: the hf engine).
    states_bytes: per value of those. sample_length: of the longest sample. flex: the attention backend is
    flex_attention, whose block masks take memory. device_memory: bytes of the GPU; logits are cut into chunks by it.
    num_steps: of EAGLE; num_anchors: of a dspark or dflash draft, blocks of a sample at most.
    """

    draft: DraftConfig
    tokens: int
    num_steps: int = 7
    precision: str = "bf16"
    device: str = "cuda"
    supervised: float = 1.0
    world_size: int = 1
    sp_size: int = 1
    sharding: str = "ddp"
    cpu_offload: bool = False
    optim: str = "adamw"
    activation_checkpointing: bool = False
    captured_ahead: int = 2
    states_bytes: int = 2
    tied_head: bool = False
    sample_length: int = 2048
    target_in_process: bool = False
    flex: bool = False
    device_memory: int = UNKNOWN_MEMORY
    num_anchors: int = 512

    def __post_init__(self) -> None:
        if self.precision not in BYTES:
            raise ConfigError(f"precision {self.precision}: expected one of {', '.join(BYTES)}")
        if self.world_size % self.sp_size:
            raise ConfigError(f"sp_size {self.sp_size}: does not divide {self.world_size} GPU(s)")


@dataclass
class MemoryPlan:
    """Bytes by term. `stays` is there all the time; `moments` holds the terms of each moment; host: memory of the host,
    beside the rank's device (on a CPU these are part of `stays`)."""

    stays: dict[str, float] = field(default_factory=dict)
    moments: dict[str, dict[str, float]] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    allocator_share: float = 0.0

    @property
    def peak_moment(self) -> str:
        """Which moment needs most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak_terms(self) -> dict[str, float]:
        """All terms alive at the peak, and what the allocator keeps beside them."""
        terms = {**self.stays, **self.moments[self.peak_moment]}
        return terms | {"allocator": self.allocator_share * sum(self.moments[self.peak_moment].values())}

    @property
    def peak(self) -> float:
        """Bytes on the device at the peak."""
        return sum(self.peak_terms.values())


def num_parameters(draft: DraftConfig) -> int:
    """P of an EAGLE-3 or block draft."""
    if draft.tokens_per_block:
        return sum(math.prod(shape) for shape in expected_shapes(draft).values())
    return sum(_parts(draft).values())


def _parts(draft: DraftConfig) -> dict[str, int]:
    width, inner = draft.hidden_size, draft.intermediate_size
    queries, keys = draft.num_attention_heads * draft.head_dim, draft.num_key_value_heads * draft.head_dim
    norms = 4 + (draft.num_aux_layers * draft.target_hidden_size / width if draft.fc_norm else 0)
    return {
        "fc": draft.num_aux_layers * draft.target_hidden_size * width,
        "qkv": 2 * width * (queries + 2 * keys),
        "o": queries * width,
        "mlp": 3 * width * inner,
        "norms": int(norms * width),
        "head": draft.draft_vocab_size * width,
    }


def plan_memory(load: Workload) -> MemoryPlan:
    """Predict the peak of one rank."""
    plan = MemoryPlan(allocator_share=ALLOCATOR_SHARE["cpu" if load.device == "cpu" else "cuda"])
    _state(plan, load)
    _batches(plan, load)
    if load.draft.tokens_per_block:
        plan.allocator_share = BLOCK_ALLOCATOR_SHARE
        saved = _block_activations(load)
        plan.moments = {"loss": {**saved, **_block_loss(load)}, "backward": {**saved, **_block_backward(load)}}
        return plan
    saved = _activations(load)
    plan.moments["teacher"] = _teacher(load, asking=True)
    plan.moments["loss"] = {**saved, **_teacher(load, asking=False), **_loss(load)}
    plan.moments["backward"] = {**saved, **_backward(load)}
    return plan


def _state(plan: MemoryPlan, load: Workload) -> None:
    draft, parameters = load.draft, num_parameters(load.draft)
    share = load.world_size if load.sharding == "fsdp2" else 1
    at = plan.host if load.cpu_offload and load.device != "cpu" else plan.stays
    at["weights, fp32 master"] = 4 * parameters / share
    at["optimizer state"] = OPTIMIZER_BYTES[load.optim] * parameters / share
    at["gradients"] = 4 * parameters / share
    size = BYTES[load.precision]
    if load.sharding == "fsdp2":
        plan.stays["weights, gathered"] = size * parameters
    table = draft.vocab_size * draft.target_hidden_size * size
    plan.stays["target embeddings"] = table
    plan.stays["target head"] = 0 if load.tied_head else table
    if draft.hidden_size != draft.target_hidden_size:
        plan.stays["own embeddings"] = 4 * draft.vocab_size * draft.hidden_size


def _batches(plan: MemoryPlan, load: Workload) -> None:
    values = load.tokens * (load.draft.num_aux_layers + 1) * load.draft.target_hidden_size
    plan.stays["hidden states of the batch"] = values * BYTES[load.precision]
    ahead = plan.stays if load.device == "cpu" or load.target_in_process else plan.host
    ahead["hidden states captured ahead"] = load.captured_ahead * values * load.states_bytes
    if load.flex:  # int32 tables of key blocks by row block and back, full and partial, for each step
        rows, masks = -(-load.tokens // BLOCK_ROWS), load.num_steps
        columns = rows
        if load.draft.tokens_per_block:  # of all slots, and of the last layer's
            rows, masks = -(-int(_block_rows(load).slots) // BLOCK_ROWS), 2
            columns = rows + columns
        plan.stays["block masks"] = 4.0 * 4 * rows * columns * masks


# ---------------------------------------------------------------------------------------------------------------- rows


def _rows(load: Workload) -> tuple[float, float, float]:
    """(key rows N of the whole batch, those of this rank, predicted tokens M = rows R of each step of this rank)."""
    predicted = load.tokens * load.supervised / load.sp_size
    return float(load.tokens), load.tokens / load.sp_size, predicted


def _activations(load: Workload) -> dict[str, float]:
    """What forward leaves for backward, without the head."""
    draft, size = load.draft, BYTES[load.precision]
    attention = 4 if load.device == "cpu" else size
    width, inner, heads = draft.hidden_size, draft.intermediate_size, draft.num_attention_heads
    queries, keys = heads * draft.head_dim, draft.num_key_value_heads * draft.head_dim
    all_rows, own_rows, rows = _rows(load)
    aux = draft.num_aux_layers * draft.target_hidden_size
    parts = _parts(draft)
    copies = parts["qkv"] + 2 * parts["mlp"] / 3  # fused matrices are copies in any precision
    if size != 4:
        copies += parts["o"] + parts["mlp"] / 3 + parts["fc"]
    per_step = []
    for k in range(load.num_steps):
        keys_of_step = 2 * keys if k else 0
        values = 4 * width + 3 * inner  # norm, after o, norm, gate and up, gated, out
        values += queries if attention != size else 0
        attended = 1.0 * attention * (2 * queries + keys_of_step) + 4 * heads * (1 + k)
        if attention != size:  # on a CPU: norms and keys before RoPE in fp32 as well
            attended += 4 * (4 * width + keys_of_step / 2)
        per_step.append(rows * (size * values + attended))
    terms = {
        "weights in the compute dtype": size * copies,
        "embeddings and fc": own_rows * size * (aux + 4 * width + queries + 2 * keys),
        "keys and values of step 0": attention * 2 * keys * (own_rows + (all_rows if load.sp_size > 1 else 0)),
    }
    if load.activation_checkpointing:
        later = attention * 2 * keys * (load.num_steps - 1)
        terms["activations between the steps"] = rows * (load.num_steps * size * width + later)
        terms["activations of one step"] = per_step[-1]
    else:
        terms |= {f"activations of step {k}": value for k, value in enumerate(per_step)}
    return terms


# ---------------------------------------------------------------------------------------------------------------- head


def _teacher(load: Workload, asking: bool) -> dict[str, float]:
    draft, size = load.draft, BYTES[load.precision]
    logits = _rows(load)[2] * draft.draft_vocab_size * size
    if not asking:
        return {"teacher logits": logits}
    elements = min(chunk_elements(load.device, load.device_memory), _rows(load)[2] * draft.vocab_size)
    return {"teacher logits": logits, "teacher chunk": elements * size * 1.5}


def _loss(load: Workload) -> dict[str, float]:
    """Buffers of the head's forward, which forms its gradients as well."""
    draft, size = load.draft, BYTES[load.precision]
    head = draft.draft_vocab_size * draft.hidden_size
    inputs = _rows(load)[2] * load.num_steps * draft.hidden_size * size
    all_logits = _rows(load)[2] * load.num_steps * draft.draft_vocab_size
    elements = min(chunk_elements(load.device, load.device_memory), all_logits)
    if load.device == "cpu":
        chunk = 2.0 * elements * size + 4 * CPU_PASS_ELEMENTS * 3  # the product of before is freed late
    else:
        chunk = elements * (size + (4 if size == 4 else 2 * 4))  # the whole chunk in fp32, several times
    half = 0.0 if size == 4 else 2 * head * size  # the head and its product in the compute dtype
    return {
        "head inputs and their gradients": 3 * inputs * (3 if load.device == "cpu" and size == 2 else 1),
        "head gradient": 4 * head,
        "head matrices": half,
        "head slices": chunk,
    }


def _backward(load: Workload) -> dict[str, float]:
    draft, size = load.draft, BYTES[load.precision]
    width, inner = draft.hidden_size, draft.intermediate_size
    columns = (draft.num_attention_heads + 2 * draft.num_key_value_heads) * draft.head_dim
    rows = _rows(load)[2]
    parts = _parts(draft)
    inputs = rows * load.num_steps * width
    return {
        "head inputs and their gradients": inputs * (2 * size + 4 * 2),
        "head gradient": 4 * draft.draft_vocab_size * width,
        "gradients of the layer": 4 * (parts["qkv"] + parts["o"] + parts["mlp"]),
        "gradients of the states": rows * load.num_steps * width * size,
        "gradients inside a step": rows * (3 * inner + 2 * width + columns) * size,
        "gradient of the embeddings' part": 2 * rows * columns * size,
    }


# ------------------------------------------------------------------------------------------------ DSpark and DFlash


@dataclass(frozen=True)
class BlockRows:
    """Of a micro batch, in the worst case that the settings allow: context tokens, slots of all blocks, counted slots,
    distinct labels; calls of the attention (model/block_attention.py), and the keys of them all."""

    context: float
    slots: float
    counted: float
    labels: float
    calls: float
    keys: float


def _block_rows(load: Workload) -> BlockRows:
    samples = max(load.tokens / load.sample_length, 1.0)
    supervised = load.tokens * load.supervised
    anchors = min(supervised, load.num_anchors * samples)
    slots, counted = anchors * load.draft.block_size, anchors * load.draft.tokens_per_block
    calls = samples * math.ceil(anchors / samples / BLOCKS_PER_CALL)
    length = load.tokens / samples
    first = length * (1 - load.supervised)  # anchors lie behind a prompt
    keys = calls * (first + length) / 2 + slots
    return BlockRows(float(load.tokens), slots, counted, min(supervised, counted), calls, keys)


def _block_activations(load: Workload) -> dict[str, float]:
    """What forward leaves for backward, without the head."""
    draft, size, rows = load.draft, BYTES[load.precision], _block_rows(load)
    attention = 4 if load.device == "cpu" else size
    width, inner, layers = draft.hidden_size, draft.intermediate_size, draft.num_hidden_layers
    queries, keys = draft.num_attention_heads * draft.head_dim, draft.num_key_value_heads * draft.head_dim
    matrices = sum(math.prod(s) for name, s in expected_shapes(draft).items() if "_proj" in name or name == "fc.weight")
    one = rows.context * 2 * keys * size + rows.keys * 2 * keys * attention
    one += rows.slots * ((5 * width + 3 * keys + 3 * inner + 2 * queries) * size + 2 * queries * attention)
    if not load.flex:  # a mask for every query head of a group, as booleans and as numbers
        group = draft.num_attention_heads / draft.num_key_value_heads
        one += group * rows.slots / max(rows.calls, 1) * rows.keys * (1 + attention)
    terms = {
        "weights in the compute dtype": float(size * matrices if size != 4 else 0),
        "embeddings and fc": rows.context * size * (draft.num_aux_layers + 2) * width + rows.slots * width * size,
    }
    if load.activation_checkpointing:
        terms["states between the layers"] = layers * rows.slots * width * size
        terms["activations of one layer"] = one
    else:
        terms["activations of the layers"] = layers * one
    return terms


def _block_loss(load: Workload) -> dict[str, float]:
    """Buffers of the loss, which forms its gradients as well (model/block_loss.py)."""
    draft, rows, size = load.draft, _block_rows(load), BYTES[load.precision]
    budget = CPU_CHUNK_BYTES if load.device == "cpu" else load.device_memory * GPU_CHUNK_SHARE
    least = 16 * 4 * 6 * draft.vocab_size * rows.counted / max(rows.labels, 1)
    markov = 4 * draft.vocab_size * draft.markov_rank
    return {
        "states of the slots": rows.counted * draft.hidden_size * (2 * size + 4),
        "teacher states": rows.labels * draft.hidden_size * size,
        "logits of a chunk": max(budget, least),
        "Markov gradients": 2.0 * markov + 8 * rows.labels * draft.markov_rank,
    }


def _block_backward(load: Workload) -> dict[str, float]:
    draft, rows, size = load.draft, _block_rows(load), BYTES[load.precision]
    width, inner = draft.hidden_size, draft.intermediate_size
    return {
        "states of the slots": rows.counted * width * (size + 4),
        "Markov gradients": 4.0 * 2 * draft.vocab_size * draft.markov_rank,
        "gradients inside a layer": rows.slots * (3 * inner + 3 * width) * size,
        "gradient of a matrix": 4.0 * 2 * width * inner,
        "gradient of the context": rows.context * width * (size + 4),
    }


def _block_operations(load: Workload) -> float:
    """Of a forward and backward pass; head and teacher are frozen."""
    draft, rows = load.draft, _block_rows(load)
    width, layers = draft.hidden_size, draft.num_hidden_layers
    queries, keys = draft.num_attention_heads * draft.head_dim, 2 * draft.num_key_value_heads * draft.head_dim
    products = rows.context * (2 * draft.num_aux_layers * width * width + 3 * layers * width * keys)
    products += 3 * layers * rows.slots * width * keys
    products += rows.counted * 2 * width * draft.vocab_size
    products += rows.labels * (width + 3 * draft.markov_rank) * draft.vocab_size
    pairs = load.sample_length * (1 - load.supervised / 2) + draft.block_size
    asking = (layers - 1) * rows.slots + rows.counted  # the last layer computes counted slots only
    products += asking * (3 * width * (2 * queries + 3 * draft.intermediate_size) + 7 * queries * pairs)
    return 2 * products


# ------------------------------------------------------------------------------------------------------ speed and disk


def operations_per_step(load: Workload) -> float:
    """Floating-point operations of one forward and backward pass of this rank: the matrix products it cannot avoid."""
    draft = load.draft
    if draft.tokens_per_block:
        return _block_operations(load)
    width, target, vocab = draft.hidden_size, draft.target_hidden_size, draft.draft_vocab_size
    queries, keys = draft.num_attention_heads * draft.head_dim, draft.num_key_value_heads * draft.head_dim
    _, own_rows, rows = _rows(load)
    columns = queries + 2 * keys
    products = own_rows * (2 * draft.num_aux_layers * target * width + 3 * width * (columns + 2 * keys))
    products += rows * target * draft.vocab_size  # the teacher has no backward
    per_row = 3 * (width * (columns + queries + 3 * draft.intermediate_size) + width * vocab)
    pairs = 7 * queries * load.sample_length / 2
    return 2 * (products + load.num_steps * rows * (per_row + pairs))


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of one micro batch, by part; mfu: the matrix products' share of the peak, 0..1."""

    products: float
    passes: float
    update: float
    reduce: float
    mfu: float

    @property
    def seconds(self) -> float:
        return self.products + self.passes + self.update + self.reduce


def step_time(load: Workload, peak_tflops: float | None = None) -> StepTime:
    """A model, not a measurement: matrix products at the rate large ones reach, everything else at the speed of memory.

    passes: activations are written once and read about five times, logits pass in fp32 about four times.
    """
    peak, share, memory, link = MACHINES["cpu" if load.device == "cpu" else "cuda"]
    peak = (peak_tflops or peak) * 1e12
    operations, parameters = operations_per_step(load), num_parameters(load.draft)
    products = operations / (peak * share)
    terms, rows = _activations(load), _rows(load)[2] * load.num_steps
    if load.draft.tokens_per_block:
        terms, rows = _block_activations(load), _block_rows(load).counted
    activations = sum(size for name, size in terms.items() if "step" in name or "layer" in name)
    logits = rows * load.draft.draft_vocab_size
    passes = (6 * activations + 4 * 4 * logits) / (memory * 1e9)
    sharded = load.world_size if load.sharding == "fsdp2" else 1
    update = 28 * parameters / sharded / (memory * 1e9)  # gradient, weight and two moments read, the last three written
    reduce = 2 * 4 * parameters * (1 - 1 / load.world_size) / (link * 1e9)
    total = products + passes + update + reduce
    return StepTime(products, passes, update, reduce, operations / (peak * total))


def tokens_per_second(load: Workload, peak_tflops: float | None = None) -> float:
    """Class of the speed of all ranks, one of 1, 2, 5, 10, 20, ...: no more is known before a run."""
    rate = load.tokens / step_time(load, peak_tflops).seconds * load.world_size / load.sp_size
    power = 10.0 ** math.floor(math.log10(rate))
    return max(step for step in (1.0, 2.0, 5.0) if step * power <= rate) * power


def memory_fraction(plan: MemoryPlan, target_bytes: float, device_bytes: float, num_trainers: int = 1) -> float:
    """Share of a GPU for an engine that shares it with `num_trainers` training ranks (`--mem-frac`).

    target_bytes: the target's weights on this GPU. Raises ConfigError, with the numbers, where both do not fit: the
    engine needs its weights and a tenth more for captures.
    """
    gib = 2**30
    left = device_bytes - num_trainers * (plan.peak + CONTEXT_BYTES) - CONTEXT_BYTES
    needed = 1.1 * target_bytes + gib
    if left < needed:
        raise ConfigError(
            f"mem_frac: the trainer needs {(plan.peak + CONTEXT_BYTES) / gib:.1f} GiB of this GPU's"
            f" {device_bytes / gib:.1f} GiB, which leaves {max(left, 0) / gib:.1f} for a target of"
            f" {target_bytes / gib:.1f} GiB (needs {needed / gib:.1f}); give the engine GPUs of its own"
            " (--engine-devices), or a smaller --batch-size, --activation-checkpointing, --tp-size, --offline-dir"
        )
    return math.floor(100 * left / device_bytes) / 100


def disk_bytes(load: Workload, num_tokens: int) -> float:
    """Offline mode: hidden states of `num_tokens` tokens on disk."""
    return num_tokens * (load.draft.num_aux_layers + 1) * load.draft.target_hidden_size * load.states_bytes
