"""Check an exported folder: compare it with PyTorch, session by session, and measure what it lost.

`part.shipped` holds the weights of the folder: a session that rounds no activations has to compute
what it does, the session that ships and other providers may differ as far as rounding explains, and
files without a graph hold its numbers to the bit. Before it is rounded, it has to compute what the
trained model does, as placing experts loses nothing. How far the folder is from the latter is told.

Letters: n tokens compared, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from ..data.tasks import Example, collate
from ..io.text import clean
from ..model.checkpoint import load_model
from ..model.decoder import CausalLM
from ..model.quantize import BlockWeight
from ..runtime import Generator
from ..runtime.drafts import make_drafts, write_drafts
from ..runtime.folder import graph_of
from ..runtime.model import CHUNK
from .answers import check_answers, rights_in_torch, rights_of, shares, training_answers
from .plan import TOKENS, check_prompts
from .settings import ExportConfig, Source
from .ship import Part, adapter_weights, merged_weights, unrounded, widened
from .weights import PRECISIONS

Prompts = Sequence[Sequence[int]]
FEW = 4                                      # tokens of a text that is slow to read
LITTLE = 1e11                                # multiplications that a longer prompt may cost
FLOAT32, BITS8 = 1e-4, 0.1   # how far logits may be apart: in floats, activations in 8 bits
PAYS = 0.85                                  # of the steps without drafts: some read 4 tokens
EXPLAINED = 2                                # times `rounding_error`; kernels had 0.2 to 0.9 of it


def tolerance(config: ExportConfig, exact: bool = False) -> float:
    """How far the logits of the session that ships, or of the `exact` one, may be from those of the
    same weights in PyTorch, as a share of the largest."""
    if config.form.rounds_activations and not exact:
        return BITS8
    if PRECISIONS[config.precision].half:    # a router may take another of two equal experts
        return 6e-2 if config.routing == "dynamic" else 3e-2
    return 2e-2 if config.target == "npu" else FLOAT32           # activations in 16 bits


def check(part: Part, source: Source, folder: Path, reference_fp32: CausalLM) -> dict[str, Any]:
    """Compare a folder with the shipped model and with the trained one; returns figures. Raises
    ValueError if it does not compute what the shipped model does."""
    config, prompts = part.config, check_prompts(source)
    check_placed(part, reference_fp32, prompts)
    if not config.graph:
        return check_weights(part, source, folder, prompts)
    figures = check_exact(part, folder, prompts)
    generator = Generator(folder)
    figures |= check_shipped(part, source, generator, prompts)
    show_logits(source.name, figures, "the trimmed model" if config.vocab else "the trained model")
    for name in config.provider or ():
        figures.setdefault("providers", {})[name] = check_provider(
            part, generator, Generator(folder, name), name, prompts)

    steps = Counter[str]()
    if config.form.last > 1:
        generator.drafts = make_drafts(training_answers(source))
    rights = check_answers(part, source, config.precision,
                           lambda task: rights_of(generator, task, steps))
    if generator.drafts and steps["steps"] < PAYS * steps["steps_without"]:
        write_drafts(folder, generator.drafts)
        figures["drafts"] = dict(steps)
    return figures | {"exact_match": {task: shares(row) for task, row in rights.items()}}


def check_placed(part: Part, reference_fp32: CausalLM, prompts: Prompts) -> None:
    """The model that ships before it is rounded, beside the trained one: merged or beside the
    weights, the experts do the same."""
    model = unrounded(part, reference_fp32) if part.config.form.rounds else part.shipped
    along = last_tokens(prompts)
    compare(logits(reference_fp32, *along), logits(model, *along), FLOAT32,
            "placing the experts changed the model that was trained")


def check_exact(part: Part, folder: Path, prompts: Prompts) -> dict[str, Any]:
    """A session that rounds no activations to 8 bits, beside the shipped model: it shows the least
    error in weights and operators. It ends before another one opens."""
    config, generator = part.config, Generator(folder)
    npu = config.target == "npu"
    if config.form.rounds_activations and not npu:
        stop_rounding(generator)
    hint = ", or too few texts showed its activations: give more --prompts" if npu else ""
    count = min(FEW, generator.room(max(map(len, prompts))))     # a static past may hold few
    read, texts = with_long(generator, part.shipped, *last_tokens(prompts, count))
    last = slice(-4, None) if len(read) > len(prompts) else slice(None)      # they may be slow
    wanted, given = (logits(m, read[last], texts[last]) for m in (part.shipped, generator))
    return {"graph_error": compare(
        wanted, given, tolerance(config, exact=True), "the export is not what PyTorch computes "
        f"with the weights that it stores{hint}")["logits_error"]}


def check_shipped(part: Part, source: Source, generator: Generator, prompts: Prompts,
                  ) -> dict[str, Any]:
    """The session that ships, beside the shipped model and the trained one, along its own greedy
    texts. It may not take a token that the shipped model finds less likely than another, by more
    than both may differ."""
    config, most = part.config, min(TOKENS, generator.room(max(map(len, prompts))))
    texts, allowed = generator.batch(prompts, most), tolerance(config)
    wanted, given = (logits(m, prompts, texts) for m in (part.shipped, generator))
    if config.form.rounds_activations and compare(wanted, given)["logits_error"] > allowed:
        allowed = max(allowed, EXPLAINED * rounding_error(part.shipped, prompts, texts, wanted))
    error = compare(wanted, given, allowed)["logits_error"]
    for of_text, text in zip(wanted, texts):
        behind = of_text[:-1].amax(-1) - of_text[range(len(text)), text]
        if (behind > 2 * allowed * of_text.abs().max()).any():
            raise ValueError("the export says other texts than PyTorch: it takes a token whose "
                             f"logit is {behind.max():.2g} below the largest")
    return {"shipped_error": error} | compare(logits(source.trained, prompts, texts), given)


def check_provider(part: Part, generator: Generator, other: Generator, name: str, prompts: Prompts,
                   ) -> dict[str, Any]:
    """A session on another provider, beside the one that ships, along the greedy texts of that one:
    what a provider takes, it may compute wrongly."""
    npu, wrong = part.config.target == "npu", f"{name} does not compute what the CPU does"
    if npu:                                  # an emulated one is slow
        prompts, wrong = prompts[:1], f"{wrong} (try another T in --static 1xTxP)"
    texts, said = ([[*session.generate(prompt, FEW - 1 if npu else TOKENS)]
                    for prompt in prompts] for session in (generator, other))
    along = (prompts, texts) if npu else with_long(generator, part.shipped, prompts, texts)
    found = compare(logits(generator, *along), logits(other, *along),
                    tolerance(part.config, exact=npu), wrong)
    found |= {"texts": len(texts), "texts_equal": sum(map(list.__eq__, texts, said))}
    show_logits(name, found, "the CPU")
    return found


@torch.no_grad()
def logits(model: CausalLM | Generator, prompts: Prompts, texts: Prompts) -> list[Tensor]:
    """Logits (n, V) after each prompt and each token of the text that follows it, in float32 on the
    CPU. PyTorch computes them in one batch; a graph reads texts token by token, and from its cache
    what a prompt shares with the one before."""
    if isinstance(model, Generator):
        return [torch.stack([torch.from_dlpack(given)[0, -1].clone()
                             for given in model.forced(prompt, text)])
                for prompt, text in zip(prompts, texts)]
    rows = [[*prompt, *text] for prompt, text in zip(prompts, texts)]
    ids, mask, _ = collate([Example("", row, row) for row in rows], 0)
    last = torch.tensor([[len(prompt) - 1] for prompt in prompts])       # of each prompt
    needed = mask.bool() & (torch.arange(ids.shape[1]) >= last)
    hidden = model.model(ids, mask, needed=needed)
    found = model.lm_head(hidden[needed.to(hidden.device)]).float().cpu()
    return [*found.split([len(text) + 1 for text in texts])]


def compare(wanted: Sequence[Tensor], given: Sequence[Tensor], most: float = math.inf,
            complaint: str = "the export is not what PyTorch computes") -> dict[str, Any]:
    """Compare logits (n, V), text by text. A text is the same if each of its tokens and its end are
    the likeliest of both.

    most: the largest difference, as a share of the largest logit. Raises ValueError with the
    complaint if a difference is larger, or no finite number.
    """
    errors = [(a - b).abs().max() / a.abs().max() for a, b in zip(wanted, given)]
    same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(wanted, given)]
    error = torch.stack(errors).max().item()             # nan if any is: Python's max may drop it
    if not (error <= most and math.isfinite(error)):
        raise ValueError(f"{complaint}: its logits are off by {error:.2g} of the largest, and "
                         f"rounding explains {most:g}")
    return {"logits_error": float(f"{error:.3g}"),
            "tokens_agreed": round(torch.cat(same).double().mean().item(), 4),
            "texts": len(same), "texts_equal": sum(bool(each.all()) for each in same)}


def rounding_error(shipped: CausalLM, prompts: Prompts, texts: Prompts, wanted: Sequence[Tensor],
                   ) -> float:
    """How far the logits of a model that ships are from those `wanted` if what its blocks multiply
    is rounded to 8 bits, with one scale a row: kernels have as many scales, or more."""
    def rounded(layer: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        step = args[0].abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return (args[0] / step).round() * step

    with ExitStack() as hooks:
        for layer in shipped.modules():
            if isinstance(layer, nn.Linear) and isinstance(layer.weight, BlockWeight):
                hooks.enter_context(layer.register_forward_pre_hook(rounded))
        return compare(wanted, logits(shipped, prompts, texts))["logits_error"]


def last_tokens(prompts: Prompts, count: int = FEW) -> tuple[Prompts, Prompts]:
    """Prompts without their last tokens, and these."""
    ends = [max(1, len(prompt) - count) for prompt in prompts]
    return [p[:end] for p, end in zip(prompts, ends)], [p[end:] for p, end in zip(prompts, ends)]


def with_long(generator: Generator, model: CausalLM, prompts: Prompts, texts: Prompts,
              ) -> tuple[Prompts, Prompts]:
    """Prompts and texts, and two long prompts with FEW tokens after each.

    They are longer than what the runtime reads at once and than any attention window, and end where
    the context does if that costs little. They differ near their ends alone, so that the second is
    read from the cache of the first.
    """
    step = generator.static[1] if generator.static and generator.info["target"] != "npu" else 1
    longest, size = generator.context - FEW * step, sum(
        part.weight.shape.numel() for part in model.modules()
        if isinstance(part, nn.Linear | nn.Embedding))
    if longest * size > LITTLE:
        longest = min(longest, max(CHUNK, *(w or 0 for w in model.config.windows)) + TOKENS)
    if longest <= max(map(len, prompts)) + FEW:
        return prompts, texts
    tokens = [token for prompt in prompts for token in prompt]
    long = (tokens * (longest // len(tokens) + 1))[:longest]
    return [*prompts, long, [*long[:-2 * FEW], *long[:FEW]]], [*texts, long[:FEW], long[:FEW]]


def stop_rounding(generator: Generator) -> None:
    """Let a generator round no activations from now on, which is slow, to test only its blocks."""
    file = generator.folder / graph_of(generator.info)
    graph = onnx.load(str(file), load_external_data=False)
    for attribute in (a for node in graph.graph.node for a in node.attribute):
        if attribute.name == "accuracy_level":
            attribute.i = 0
    options = generator.session.get_session_options()
    for key, value in (
            ("session.qdq_matmulnbits_accuracy_level", "0"),     # nodes fused in target portable
            # The graph comes as bytes, without a path.
            ("session.model_external_initializers_file_folder_path", str(file.parent))):
        options.add_session_config_entry(key, value)
    generator.close()                        # first, as a large model may not fit twice
    generator.session = ort.InferenceSession(graph.SerializeToString(), options,
                                             providers=["CPUExecutionProvider"])
    generator.renew_cache()


def check_weights(part: Part, source: Source, folder: Path, prompts: Prompts) -> dict[str, Any]:
    """Compare each tensor of a folder of layout hf or peft with the shipped model, to the bit, and
    what the folder computes with the trained one."""
    layout, exported = part.config.layout, part.shipped
    if layout == "hf":
        exported = load_model(folder, None)
        tensors = merged_weights(part.shipped, exported, source.base)
    else:
        tensors = adapter_weights(part.shipped, folder)
    if wrong := [name for name, found, wanted in tensors if found is None or not (
            found.dtype == wanted.dtype and torch.equal(found, wanted))]:
        raise ValueError(f"the export is not what PyTorch computes: {len(wrong)} tensors are not "
                         f"the merged ones, to the bit, such as {wrong[0]}")
    exported, along = widened(exported), last_tokens(prompts)
    figures = compare(logits(source.trained, *along), logits(exported, *along))
    show_logits(source.name, figures)
    rights = check_answers(part, source, layout, partial(rights_in_torch, exported, source))
    return figures | {"exact_match": {task: shares(row) for task, row in rights.items()}}


def show_logits(name: str, figures: dict[str, Any], beside: str = "the trained model") -> None:
    """Print how far an export is from the trained model, or another provider from the CPU."""
    graph = (f"computes its weights within {figures['graph_error']:.1e}, and as it ships within "
             f"{figures['shipped_error']:.1e}; " if "graph_error" in figures else "")
    print(f"{clean(name)}: {graph}logits within {figures['logits_error']:.1e} of {beside}'s "
          f"largest, {figures['texts_equal']} of {figures['texts']} texts the same, "
          f"{100 * figures['tokens_agreed']:.1f} % of tokens")
