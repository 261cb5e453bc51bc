"""What an export will hold: the flags, made whole by the source, before any work is done."""

from dataclasses import replace
from itertools import chain, zip_longest

from ..model.config import Config
from ..model.quantize import BLOCK, ROW
from ..training.evaluate import questions
from .settings import ExportConfig, Source
from .weights import PRECISIONS

TOKENS = 24                              # of each greedy text that is compared
NPU_TOKENS, NPU_SLOTS = 64, 512          # of a step, and of the cache, if nothing else is asked for
CHECKED = 8                              # prompts on which an export must agree with PyTorch
HELLO = ("Hello!", "What is the capital of France?", "Count from one to five.")   # without data


def resolved(config: ExportConfig, source: Source) -> ExportConfig:
    """The settings asked for, with values in place of defaults. Raises ValueError for what does not
    fit the model or its texts."""
    config = with_precision(config, bool(config.prompts or source.examples))
    context, static = sizes_of(config, source)
    if config.graph:
        refuse(source.trained.config, config.target, config.block or BLOCK, static)
    norm = source.trained.model.norm.weight              # in the dtype that the model computes in
    return replace(config, context=context, static=static, device=str(norm.device),
                   dtype=str(norm.dtype).removeprefix("torch."))


def with_precision(config: ExportConfig, has_texts: bool) -> ExportConfig:
    """The settings with a precision and blocks. has_texts: there are some to calibrate on. Raises
    ValueError for what needs texts where there are none."""
    npu, precision = config.target == "npu", config.precision
    if npu and not has_texts and precision not in ("auto", "fp16"):
        raise ValueError(f"--precision {precision} rounds activations by ranges that texts "
                         "show: export a RUN, give --prompts FILE, or take --precision fp16")
    if precision == "auto" or not config.graph:
        precision = ("fp32" if not config.graph else "q8" if config.layout == "web" else
                     "int4-8" if not npu else "w8a16" if has_texts else "fp16")
    in_blocks = PRECISIONS[precision].layers and precision != "w8a16"
    block = ROW if precision == "q8" else config.block or BLOCK if in_blocks else None
    return replace(config, precision=precision, block=block)


def in_words(config: ExportConfig, has_texts: bool) -> str:
    """What will be written, and how to have something else, in one line."""
    what = config.precision if config.graph else "weights" if config.layout == "hf" else "a LoRA"
    blocks = f" in blocks of {config.block}" if (config.block or 0) > 0 else ""
    floats = f"; --precision fp{16 if config.target == 'npu' else 32} keeps floats"
    bits = PRECISIONS[config.precision].layers
    nearest = "" if has_texts or bits != 4 else (
        ", each number rounded to the nearest (--prompts FILE rounds for what the model reads)")
    return f"writes {what}{blocks}{nearest}{floats if bits else ''}"


def check_prompts(source: Source, count: int = CHECKED) -> list[list[int]]:
    """Token prompts from the test lines of the tasks in turn; without data, a few of our own."""
    chats = [list(m[:-1]) for lines in zip_longest(*(t.test for t in source.tasks))
             for m in lines if m] or [[{"role": "user", "content": text}] for text in HELLO]
    return [source.tokenizer.encode_chat(chat, True).ids for chat in chats[:count]]


def sizes_of(config: ExportConfig, source: Source) -> tuple[int, tuple[int, int, int] | None]:
    """The context, which holds all texts of the check, and the static sizes. Raises ValueError if
    the context asked for, the model, or a static past is too short for the texts."""
    longest, npu = source.trained.config.max_position_embeddings, config.target == "npu"
    asked = [questions(source.tokenizer, task, longest) for task in source.tasks]
    prompt = max(map(len, chain(check_prompts(source), *(each.prompts for each in asked))))
    whole = [len(ids) + n for each in asked for ids, n in zip(each.prompts, each.limits)]
    needed = min(longest, max(prompt + TOKENS, *whole, 0))
    context, static = config.context or min(longest, max(2048, needed)), config.static
    if npu:                                  # all tokens are in the cache, whose size is fixed
        windows = [w - NPU_TOKENS for w in source.trained.config.windows if w]
        static = static or (
            1, NPU_TOKENS, config.context or max(needed, min(longest, NPU_SLOTS, *windows)))
        context = static[2]
    if not needed <= context <= longest:
        flag = f"--static with {context} past positions" if npu else f"--context {context}"
        raise ValueError(f"{flag}: the texts that the export is checked with need {needed}, and "
                         f"the model ends at {longest}")
    if static and not npu and (past := min(context, static[2])) < (least := prompt + static[1]):
        raise ValueError(f"--static with {past} past positions (at most the context): the texts "
                         f"that the export is checked with need {least}")
    return context, static


def refuse(config: Config, target: str, block: int, static: tuple[int, int, int] | None) -> None:
    """Raise ValueError for what a target (ort, portable or npu) cannot do with a model."""
    rows = (config.hidden_size, config.intermediate_size,
            config.num_attention_heads * config.head_dim)
    odd = min((k for k in rows if k % block), default=0)
    window, (_, T, P) = min(filter(None, config.windows), default=0), static or (0, 0, 0)
    for wrong, reason in (
            (target == "portable" and block > BLOCK and odd,
             f"--block {block}: rows of {odd} weights are no whole blocks, which OpenVINO refuses "
             "in the portable target; use a smaller --block"),
            (target == "ort" and config.head_dim % 16,
             f"head size {config.head_dim}: onnxruntime's attention takes multiples of 16 only; "
             "use the portable target"),
            (target == "ort" and config.rotary_size % 16,
             f"{config.rotary_size} numbers of a head turn: onnxruntime's attention turns "
             "multiples of 16 only"),
            (config.delta_layers and target != "ort", f"--target {target} has no gated delta nets: "
             "only onnxruntime's own operators do, --target ort"),
            (target == "npu" and config.conv_layers,
             "--target npu has no convolutions: take --target portable --static"),
            (target == "npu" and 0 < window < T + P,
             f"an attention window of {window} tokens is shorter than the cache: --static 1x{T}xP "
             "with a smaller P, or --target portable --static")):
        if wrong:
            raise ValueError(reason)
