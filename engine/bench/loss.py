"""`python -m engine bench loss`: the streamed divergence against bare GEMMs and whole logits, at one size.

All contenders run in one set of rank processes, in turn, round after round, so that a noisy machine treats them
alike. Each does the same arithmetic per rank: T tokens of its own against the whole vocabulary, forward and backward.

    gemms     the four matrix products alone, in chunks: what any method has to pay
    naive     whole [T, V] logits of both models and autograd
    stream    ours on one rank by itself: the whole head, no communication
    G=...     ours over the ranks, head rows on the ZeRO pieces, at each vocabulary-parallel size
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

from engine.bench.loopback import private_loopback, why_not_private
from engine.bench.measure import Measured, measure
from engine.cluster.collectives import VocabGroups, build_vocab_groups
from engine.loss.divergence import DivergenceSpec, dense_divergence
from engine.loss.head import HeadShard, VocabLayout, masked_columns
from engine.loss.signal import HiddenSignal
from engine.loss.vocab_parallel import Stream, vocab_parallel_divergence
from engine.plan import volume


@dataclass(frozen=True)
class Size:
    """What is measured: V, H_s, H_t, T response tokens per rank, ranks, and the stream's settings."""

    vocab: int = 49152
    student_hidden: int = 576
    teacher_hidden: int = 576
    tokens: int = 256
    ranks: int = 1
    rounds: int = 3
    chunk_bytes: int = 32 * 2**20
    compiled: bool = False
    kind: str = "jsd"
    beta: float = 0.5
    naive: bool = True


@dataclass
class Line:
    """A contender's figures, medians over the rounds; bytes are sent per rank and step."""

    name: str
    seconds: float
    ratio_to_gemms: float
    peak_bytes: int
    sent_bytes: float | None
    formula_bytes: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = Size()
    parser.add_argument("--vocab", type=int, default=defaults.vocab)
    parser.add_argument("--student-hidden", type=int, default=defaults.student_hidden)
    parser.add_argument("--teacher-hidden", type=int, default=defaults.teacher_hidden)
    parser.add_argument("--tokens", type=int, default=defaults.tokens, help="response tokens of one rank")
    parser.add_argument("--ranks", type=int, default=defaults.ranks)
    parser.add_argument("--rounds", type=int, default=defaults.rounds)
    parser.add_argument("--chunk-bytes", type=int, default=defaults.chunk_bytes)
    parser.add_argument("--compiled", action="store_true", help="fuse the element-wise part with torch.compile")
    parser.add_argument("--no-naive", dest="naive", action="store_false", help="leave whole logits out")
    parser.add_argument("--json", type=Path, help="also write the lines to this file")


def run(options: argparse.Namespace) -> int:
    names = [name for name in Size.__dataclass_fields__ if hasattr(options, name)]
    size = Size(**{name: getattr(options, name) for name in names})
    lines = bench(size)
    print(format_table(size, lines))
    shared = why_not_private()
    if shared and any(line.sent_bytes is not None for line in lines):
        print(f"`sent` counts whatever else passed over this machine's loopback, too: {shared}")
    if options.json:
        options.json.write_text(json.dumps({"size": asdict(size), "rows": [asdict(line) for line in lines]}, indent=1))
    return 0


def bench(size: Size) -> list[Line]:
    """Start the ranks, measure, and return rank 0's lines."""
    with tempfile.TemporaryDirectory() as folder:
        # Without these, glibc keeps freed blocks and the peak of one contender hides that of the next.
        os.environ.update(MALLOC_MMAP_THRESHOLD_=str(2**22), MALLOC_TRIM_THRESHOLD_=str(2**26), OMP_NUM_THREADS="1")
        # On a loopback of their own where bytes are counted and that can be, so that the bytes are theirs.
        is_private = not torch.cuda.is_available() and why_not_private() is None
        with private_loopback() if is_private else nullcontext():
            ranks = multiprocessing.spawn(_rank, args=(size, folder), nprocs=size.ranks, join=False)
        while not ranks.join():
            pass
        return [Line(**line) for line in json.loads((Path(folder) / "lines.json").read_text())]


def _rank(rank: int, size: Size, folder: str) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=size.ranks)
    contenders = build_contenders(size, rank, device)
    runs: dict[str, list[Measured]] = {name: [] for name in contenders}
    for function, _ in contenders.values():  # warm-up: allocations, connections, compilation
        measure(function)
    for _ in range(size.rounds):
        for name, (function, _) in contenders.items():
            runs[name].append(measure(function))
    if rank == 0:
        floor = statistics.median(m.seconds for m in runs["gemms"])
        lines = [_line(name, runs[name], floor, contenders[name][1], size) for name in contenders]
        (Path(folder) / "lines.json").write_text(json.dumps([asdict(line) for line in lines]))
    dist.barrier()
    dist.destroy_process_group()


def _line(name: str, runs: list[Measured], floor: float, formula: float, size: Size) -> Line:
    seconds = statistics.median(m.seconds for m in runs)
    counts = [m.sent_bytes for m in runs if m.sent_bytes is not None]  # none on an accelerator
    sent = statistics.median(counts) / size.ranks if counts else None
    return Line(name, seconds, seconds / floor, int(statistics.median(m.peak_bytes for m in runs)), sent, formula)


Contender = tuple[Callable[[], object], float]


def build_contenders(size: Size, rank: int, device: torch.device) -> dict[str, Contender]:
    """Each contender's function, and the bytes that it should send per rank."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(rank)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=dtype)  # noqa: E731
    student_NH, teacher_NH = draw(size.tokens, size.student_hidden), draw(size.tokens, size.teacher_hidden)
    student_VH, teacher_VH = draw(size.vocab, size.student_hidden) / 24, draw(size.vocab, size.teacher_hidden) / 24
    targets_N = torch.randint(0, size.vocab, (size.tokens,), device=device)
    spec = DivergenceSpec(size.kind, size.beta)

    alone = VocabGroups(0, 1, 1, _group_of_one(rank), _group_of_one(rank))
    contenders: dict[str, Contender] = {"gemms": (_gemms(size, student_NH, teacher_NH, student_VH, teacher_VH), 0.0)}
    if size.naive:
        contenders["naive"] = (_naive(spec, student_NH, teacher_NH, student_VH, teacher_VH), 0.0)
    parts = (student_NH, teacher_NH, targets_N, student_VH, teacher_VH)
    contenders["stream"] = (_ours(size, spec, alone, *parts), 0.0)
    for group_size in (g for g in range(1, size.ranks + 1) if size.ranks % g == 0 and size.ranks > 1):
        groups = build_vocab_groups(group_size, size.ranks)
        hidden = volume.hidden_bytes(size.tokens, size.student_hidden, size.teacher_hidden, group_size, dtype.itemsize)
        formula = hidden + volume.scalar_bytes(size.tokens, group_size)
        contenders[f"G={group_size}"] = (_ours(size, spec, groups, *parts), formula)
    return contenders


def _group_of_one(rank: int) -> dist.ProcessGroup:
    groups = [dist.new_group([other]) for other in range(dist.get_world_size())]
    return groups[rank]


def _gemms(size: Size, student_NH, teacher_NH, student_VH, teacher_VH) -> Callable[[], object]:
    """Student and teacher logits, hidden gradient, head gradient: the products alone, on chunks of the same size."""
    chunk = max(1, size.chunk_bytes // (8 * size.vocab))

    def run() -> object:
        total_VH = torch.zeros_like(student_VH, dtype=torch.float32)
        for start in range(0, size.tokens, chunk):
            own = slice(start, start + chunk)
            logits = student_NH[own] @ student_VH.t()
            teacher_NH[own] @ teacher_VH.t()
            logits @ student_VH
            if total_VH.dtype == logits.dtype:
                total_VH.addmm_(logits.t(), student_NH[own])
            else:
                total_VH += torch.mm(logits.t(), student_NH[own], out_dtype=torch.float32)
        return total_VH

    return run


def _naive(spec: DivergenceSpec, student_NH, teacher_NH, student_VH, teacher_VH) -> Callable[[], object]:
    def run() -> object:
        hidden, weight = student_NH.clone().requires_grad_(), nn.Parameter(student_VH)
        with torch.no_grad():
            teacher_logits = (teacher_NH @ teacher_VH.t()).float()
        loss = dense_divergence((hidden @ weight.t()).float(), teacher_logits, spec).mean()
        loss.backward()
        return hidden.grad, weight.grad

    return run


def _ours(size, spec, groups, student_NH, teacher_NH, targets_N, student_VH, teacher_VH) -> Callable[[], object]:
    """The stream on this rank's rows, one micro-batch; the head's own exchange is not part of it."""
    layout = VocabLayout(size.vocab, size.student_hidden, groups.world_size, groups.group_size)
    ids_S = layout.shard_ids(groups.rank)
    columns = masked_columns(ids_S, size.vocab, student_NH.device)
    rows = ids_S.clamp_min(0).to(student_NH.device)
    whole = torch.equal(ids_S, torch.arange(size.vocab))
    student_SH, teacher_SH = (w if whole else w[rows] for w in (student_VH, teacher_VH))
    stream = Stream(groups, ids_S.to(student_NH.device), size.chunk_bytes, size.compiled)
    weight_N = torch.full((size.tokens,), 1 / size.tokens, device=student_NH.device)

    def run() -> object:
        grad_SH = torch.zeros_like(student_SH, dtype=torch.float32)
        student = HeadShard(student_SH, None, columns, 1.0, None, grad_SH)
        teacher = HeadShard(teacher_SH, None, columns, 1.0, None)
        hidden = student_NH.detach().requires_grad_()
        loss, _ = vocab_parallel_divergence(
            hidden, HiddenSignal(teacher_NH, teacher), student, targets_N, weight_N, size.tokens, spec, stream
        )
        loss.backward()
        return hidden.grad, grad_SH

    return run


def format_table(size: Size, lines: list[Line]) -> str:
    text = [
        f"loss, V={size.vocab} H_s={size.student_hidden} H_t={size.teacher_hidden}, {size.tokens} tokens a rank, "
        f"{size.ranks} ranks, chunk {size.chunk_bytes / 2**20:.0f} MiB, {size.kind} beta={size.beta}, "
        f"{'compiled' if size.compiled else 'eager'}, medians of {size.rounds} rounds",
        f"{'':10}{'seconds':>10}{'x GEMMs':>10}{'peak MiB':>10}{'sent MiB':>10}{'formula':>10}",
    ]
    for line in lines:
        sent = "-" if line.sent_bytes is None else f"{line.sent_bytes / 2**20:.2f}"
        text.append(
            f"{line.name:10}{line.seconds:10.3f}{line.ratio_to_gemms:10.2f}{line.peak_bytes / 2**20:10.1f}"
            f"{sent:>10}{line.formula_bytes / 2**20:10.2f}"
        )
    return "\n".join(text)
