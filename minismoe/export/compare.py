"""Compare an exported graph with PyTorch: logits and greedy texts.

Letters: n tokens compared, V vocabulary.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack

import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from ..data.tasks import Example, collate
from ..model.decoder import CausalLM
from ..model.quantize import BlockWeight
from ..runtime import Generator
from ..runtime.folder import graph_of
from ..runtime.model import CHUNK
from .nodes import all_nodes

TOKENS = 24                              # of each greedy text
FEW = 4                                  # of each text read without rounding, which is slow
LITTLE = 1e11                            # multiplications that a longer prompt may cost
EXPLAINED = 2                            # times `rounding_error`; kernels had 0.2 to 0.9 of it
Prompts = Sequence[Sequence[int]]


@torch.no_grad()
def logits(model: CausalLM | Generator, prompts: Prompts, texts: Prompts) -> list[Tensor]:
    """Logits (n, V) after each prompt and each token of the text that follows it, in float32 on the
    CPU. PyTorch computes them in one batch; a graph reads texts token by token, and from its cache
    what a prompt shares with the one before."""
    if isinstance(model, Generator):
        return [torch.stack([torch.from_dlpack(given)[0].clone().flatten()
                             for given in model.forced(prompt, text)])
                for prompt, text in zip(prompts, texts)]
    rows = [[*prompt, *text] for prompt, text in zip(prompts, texts)]
    ids, mask, _ = collate([Example("", row, row) for row in rows], 0)
    last = torch.tensor([[len(prompt) - 1] for prompt in prompts])       # of each prompt
    needed = mask.bool() & (torch.arange(ids.shape[1]) >= last)
    hidden = model.model(ids, mask, needed=needed)
    found = model.lm_head(hidden[needed.to(hidden.device)]).float().cpu()
    return [*found.split([len(text) + 1 for text in texts])]


def compare_logits(wanted: Sequence[Tensor], given: Sequence[Tensor], tolerance: float = math.inf,
                   complaint: str = "the export is not what PyTorch computes") -> dict[str, float]:
    """Compare the logits of an export with those that are wanted, text by text.

    tolerance: the largest difference, as a share of the largest logit. Raises ValueError with the
    complaint if a difference is larger, or no finite number.
    """
    errors = [(a - b).abs().max() / a.abs().max() for a, b in zip(wanted, given)]
    same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(wanted, given)]
    error = torch.stack(errors).max().item()             # nan if any is: Python's max may drop it
    if not (error <= tolerance and math.isfinite(error)):
        raise ValueError(f"{complaint}: its logits are off by {error:.2g} of the largest, and "
                         f"rounding explains {tolerance:g}")
    return {"logits_error": float(f"{error:.3g}"),
            "tokens_agreed": round(torch.cat(same).double().mean().item(), 4)}


def compare_texts(model: CausalLM, generator: Generator, prompts: Prompts, texts: Prompts,
                  most: int) -> dict[str, float]:
    """Compare a graph with `model` along the graph's greedy texts, of at most `most` tokens. A text
    is the same if the model finds each of its tokens likeliest, and its end too."""
    wanted, stops = logits(model, prompts, texts), generator.tokenizer.stop_ids
    said = [of_text.argmax(-1).tolist() for of_text in wanted]
    same = sum(tokens[:-1] == text and (tokens[-1] in stops or len(text) == most)
               for tokens, text in zip(said, texts))
    return compare_logits(wanted, logits(generator, prompts, texts)) | {
        "texts": len(texts), "texts_equal": same}


def compare_exact(shipped: CausalLM, generator: Generator, prompts: Prompts, tolerance: float,
                  ) -> dict[str, float]:
    """Compare a session that rounds no activations with the model that its graph was written from,
    along the last tokens of prompts, as it may be slow; two prompts suffice beside long ones.
    Raises ValueError as `compare_logits` does."""
    npu = generator.info["target"] == "npu"
    hint = ", or too few texts showed its activations: give more --prompts" if npu else ""
    count = min(FEW, generator.room(max(map(len, prompts))))     # a static past may hold few
    read, texts = with_long(generator, shipped, *last_tokens(prompts, count))
    last = slice(-4, None) if len(read) > len(prompts) else slice(None)
    figures = compare_logits(
        logits(shipped, read[last], texts[last]), logits(generator, read[last], texts[last]),
        tolerance, f"the export is not what PyTorch computes with the weights that it stores{hint}")
    return {"graph_error": figures["logits_error"]}


def compare_shipped(shipped: CausalLM, generator: Generator, prompts: Prompts, texts: Prompts,
                    tolerance: float, rounds: bool) -> dict[str, float]:
    """Compare the session that ships with the model that its graph was written from, along its own
    greedy texts. rounds: it rounds activations, which may explain more than the tolerance. Raises
    ValueError as `compare_logits` does, and if the session takes a token that the model finds less
    likely than another, by more than both differences."""
    wanted, given = logits(shipped, prompts, texts), logits(generator, prompts, texts)
    if rounds and compare_logits(wanted, given)["logits_error"] > tolerance:
        tolerance = max(tolerance, EXPLAINED * rounding_error(shipped, prompts, texts, wanted))
    figures = compare_logits(wanted, given, tolerance)
    for of_text, text in zip(wanted, texts):
        behind = of_text[:-1].amax(-1) - of_text[range(len(text)), text]
        if (behind > 2 * tolerance * of_text.abs().max()).any():
            raise ValueError("the export says other texts than PyTorch: it takes a token whose "
                             f"logit is {behind.max():.2g} below the largest")
    return {"shipped_error": figures["logits_error"]}


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
        return compare_logits(wanted, logits(shipped, prompts, texts))["logits_error"]


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
    for attribute in (a for node in all_nodes(graph.graph.node) for a in node.attribute):
        if attribute.name == "accuracy_level":
            attribute.i = 0
    options = generator.session.get_session_options()
    options.add_session_config_entry(                    # for the nodes fused in target portable
        "session.qdq_matmulnbits_accuracy_level", "0")
    options.add_session_config_entry(                    # the graph comes as bytes, without a path
        "session.model_external_initializers_file_folder_path", str(file.parent))
    generator.close()                        # first, as a large model may not fit twice
    generator.session = ort.InferenceSession(graph.SerializeToString(), options,
                                             providers=["CPUExecutionProvider"])
    generator.use(None)
