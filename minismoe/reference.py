"""LoRA-SMoE in one file, from a checkpoint to an ONNX graph, in plain loops. Read this first.

    python -m minismoe.reference                                    the built-in toy
    python -m minismoe.reference CHECKPOINT FILE.jsonl FILE.jsonl   a Llama (SmolLM2), a task a file

To fine-tune a frozen model on several tasks, measure how sensitive each matrix is to each task (1),
let each task vote for its most sensitive ones, where a vote is one LoRA expert (2), and train the
experts (3). On the way, turn the experts of each matrix into one plain LoRA, which training goes on
with (4). To ship it, merge that, round the weights to few bits (5), write an ONNX graph (6), and
let onnxruntime generate (7). A matrix W with E = 2 experts of rank r; for one token, it reads x and
writes y:

            +--- W  (out, in) ---------------------------------------+
            |                                                        |
     x -----+--- A_1 (r, in) --- B_1 (r, out) --- times g_1(x) --- (sum) ---> y
    (in)    +--- A_2 (r, in) --- B_2 (r, out) --- times g_2(x) ------+      (out)
            |                                          ^
            +--- router (E, in) --- softmax of the k largest

Letters: N tokens, D hidden size, H query heads, K key and value heads, C head size, V vocabulary,
k active experts. The rooms beside this file compute the same, fast, and the tests compare them.
Sources: LoRA-SMoE (Xu and Diao 2025, arXiv 2505.06272), Switch (2101.03961), Mixtral (2401.04088).
"""
import ctypes
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from onnxruntime import InferenceSession, OrtValue
from safetensors.torch import load_file
from torch import Tensor, nn

# 0. The decoder of a Llama. It reads one sequence at a time, so there is no padding.
Sample = tuple[Tensor, int]      # tokens (N,), and how many of them come before the answer
class Decoder:
    """config: config.json; weights: {name: tensor}, of which matrices W are (out, in)."""
    def __init__(self, config: Any, weights: dict[str, Tensor]):
        self.config, self.weights = config, weights
        self.mixtures: dict[str, Mixture] = {}           # in place of some matrices (3)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x (N, in) -> (N, out)."""
        return self.mixtures[name](x) if name in self.mixtures else x @ self.weights[name].T

    def norm(self, name: str, x: Tensor) -> Tensor:
        """x / sqrt(mean of x^2 + eps) * weight, of each token's x (N, D)."""
        mean_square = x.square().mean(dim=-1, keepdim=True)
        return x * (mean_square + self.config.rms_norm_eps).rsqrt() * self.weights[name]

    def __call__(self, ids: Any, read: slice = slice(None)) -> Tensor:
        """Logits (., V) of the next token, at the positions `read` of tokens ids (N,)."""
        c, N = self.config, len(ids)
        later, turn = torch.ones(N, N, dtype=torch.bool).triu(1), angles(c, N)
        x = self.weights["embed_tokens"][torch.as_tensor(ids)]                   # (N, D)
        for i in range(c.num_hidden_layers):
            # Attention: softmax(q k^T / sqrt(C)) v in each head; H / K heads share k and v.
            name, y = f"layers.{i}.self_attn", self.norm(f"layers.{i}.input_layernorm", x)
            q, k, v = (self.linear(f"{name}.{part}_proj", y).view(N, -1, c.head_dim)
                       .transpose(0, 1) for part in "qkv")           # (H, N, C), twice (K, N, C)
            q, k = rotate(q, turn), rotate(k, turn)
            k, v = (y.repeat_interleave(len(q) // len(y), dim=0) for y in (k, v))
            scores = (q @ k.mT / c.head_dim ** 0.5).masked_fill(later, -torch.inf)   # (H, N, N)
            y = (scores.softmax(dim=-1) @ v).transpose(0, 1).flatten(1)              # (N, H * C)
            x = x + self.linear(f"{name}.o_proj", y)
            # MLP: down(silu(gate y) * up y), silu(z) = z * sigmoid(z).
            name, y = f"layers.{i}.mlp", self.norm(f"layers.{i}.post_attention_layernorm", x)
            gate, up = self.linear(f"{name}.gate_proj", y), self.linear(f"{name}.up_proj", y)
            x = x + self.linear(f"{name}.down_proj", gate * gate.sigmoid() * up)
        return self.norm("norm", x)[read] @ self.weights["lm_head"].T

def angles(c: Any, N: int) -> Tensor:
    """Rotary positions (N, C / 2): n * theta^(-2 i / C) for token n and pair i."""
    return torch.arange(N)[:, None] * c.rope_theta ** (torch.arange(0, c.head_dim, 2) / -c.head_dim)

def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """The pairs (i, i + C / 2) of x (heads, N, C), turned by angles (N, C / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * turn.cos() - b * turn.sin(), b * turn.cos() + a * turn.sin()], dim=-1)

def answer_losses(model: Decoder, ids: Tensor, prompt: int) -> Tensor:
    """Cross-entropy of each token of a sample's answer, which follows `prompt` tokens."""
    return F.cross_entropy(model(ids, slice(prompt - 1, -1)), ids[prompt:], reduction="none")

# 1. Probe (LoRA-SMoE). L_i is the mean loss of sample i over its answer:
#    s[t, W]  =  sum over the samples i of task t of  || dL_i / dW ||_F^2
def sensitivity(weights: Mapping[str, Tensor], losses: Iterable[Tensor]) -> dict[str, float]:
    """{module: s} of one task, from the losses L_i of its samples, one after another."""
    s = dict.fromkeys(weights, 0.0)
    for loss in losses:
        for name, gradient in zip(s, torch.autograd.grad(loss, list(weights.values()))):
            s[name] += gradient.square().sum().item()
    return s

# 2. Vote (LoRA-SMoE). Matrices compete within a group; of equal scores the first one wins:
#    E[W]  =  number of tasks t for which s[t, W] is among the keep * size largest of W's group
def vote(scores: Mapping[str, Any], groups: Sequence[Any], keep: float) -> dict[str, int]:
    """{module: experts} from {task: {module: s}}."""
    experts = {module: 0 for group in groups for module in group}
    for s in scores.values():
        for group in groups:
            votes = max(1, int(keep * len(group) + 0.5 + 1e-9))      # 0.145 * 100 is 14.499...
            for module in sorted(group, key=lambda module: -s[module])[:votes]:
                experts[module] += 1
    return experts

# 3. Train (LoRA-SMoE, Mixtral). Without a router (E = 1, or frozen) each gate is 1:
#    y     =  W x  +  scaling * sum over experts e of  g_e(x) B_e^T A_e x
#    g(x)  =  softmax over the k largest of the E router logits, 0 elsewhere
class Mixture(nn.Module):
    """A frozen linear layer with experts: lora_A (E, r, in), lora_B (E, r, out), router (E, in)."""
    def __init__(self, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
                 router: Tensor | None, top_k: int, scaling: float):
        super().__init__()
        self.weight, self.bias, self.lora_A, self.lora_B = weight, bias, lora_A, lora_B
        self.router, self.top_k, self.scaling = router, top_k, scaling
        self.router_logits: Tensor | None = None             # (N, E) of the last forward

    def gates(self, x: Tensor) -> Tensor:
        """g(x), (N, E), of tokens x (N, in)."""
        if self.router is None:
            return x.new_ones(len(x), len(self.lora_A))
        self.router_logits = logits = x @ self.router.T
        return logits.masked_fill(~chosen(logits, self.top_k), -torch.inf).softmax(dim=-1)

    def outputs(self, x: Tensor) -> list[Tensor]:
        """What each expert gives before its gate, (N, out): scaling * B_e^T A_e x."""
        return [self.scaling * (x @ A.T @ B) for A, B in zip(self.lora_A, self.lora_B)]

    def added(self, x: Tensor) -> Tensor:
        """What all experts add to W x, (N, out)."""
        gated = [g[:, None] * y for g, y in zip(self.gates(x).T, self.outputs(x))]
        return torch.stack(gated).sum(dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> y (..., out)."""
        added = self.added(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return F.linear(x, self.weight, self.bias) + added

def chosen(logits: Tensor, k: int) -> Tensor:
    """(N, E) of true and false: the k experts of a token's largest logits; of equal, the first."""
    return logits.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < k

def add_experts(model: Decoder, experts: Mapping[str, int], r: int = 8, k: int = 2) -> None:
    """Make {module: E} mixtures. B is 0, so that at first the experts add nothing."""
    for name, E in experts.items():
        W = model.weights[name].detach()
        A = torch.empty(E, r, W.shape[1]).uniform_(-1, 1) / W.shape[1] ** 0.5
        A, B = nn.Parameter(A), nn.Parameter(torch.zeros(E, r, W.shape[0]))
        router = nn.Parameter(0.02 * torch.randn(E, W.shape[1])) if E > 1 else None
        model.mixtures[name] = Mixture(W, None, A, B, router, k, scaling=2.0)

# Balance loss of a matrix (Switch, equations 4 to 6; top-k form of Mixtral); 1 is perfect balance:
#    E * sum over experts e of f_e P_e,   f_e = share of the k * N choices that went to expert e,
#                                         P_e = mean of softmax(logits)_e over the tokens
def balance_loss(logits: Tensor, k: int) -> Tensor:
    """The loss of router logits (N, E)."""
    f = chosen(logits, k).to(logits.dtype).mean(dim=0) / min(k, logits.shape[1])
    return len(f) * (f * logits.softmax(dim=-1).mean(dim=0)).sum()

# A step's loss is the mean over the tokens of its answers, plus 0.01 times the mean balance loss.
# The rate rises in a twentieth of the steps (or ten, or half of all), then falls as half a cosine.
# After 0.8 of the steps the mixtures become plain LoRAs (4), and the optimizer begins anew.
def train(model: Decoder, batches: Sequence[Sequence[Sample]], peak: float,
          ) -> tuple[list[float], dict[str, float]]:
    """Train all experts; returns the loss of each step, without balance, and what `freeze` does."""
    steps, curve, residuals = len(batches), list[float](), dict[str, float]()
    warm = max(1, min(10, steps // 2), round(0.05 * steps))
    freeze_at, begin = min(round(0.8 * steps), steps - 1), 0
    for step, batch in enumerate(batches):
        if step == freeze_at:
            residuals = freeze(model, [sample for batch in batches for sample in batch][:256])
        if step in (0, freeze_at):
            begin, trained = step, [p for m in model.mixtures.values() for p in m.parameters()]
            optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.0)
        routed = [m for m in model.mixtures.values()                       # they choose
                  if m.router is not None and m.top_k < len(m.lora_A)]
        losses, logits = [], []
        for sample in batch:
            losses.append(answer_losses(model, *sample))
            logits.append([m.router_logits for m in routed])
        balance = [balance_loss(torch.cat(x), m.top_k) for m, x in zip(routed, zip(*logits))]
        loss = torch.cat(losses).mean()
        (loss + 0.01 * sum(balance) / max(1, len(routed))).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        cosine = math.cos(math.pi * max(0, step - warm) / max(1, steps - warm))
        optimizer.param_groups[0]["lr"] = (
            peak * min(1, (step - begin + 1) / warm) * min(1, (1 + cosine) / 2))
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve, residuals

# 4. Freeze (ours). A and B are all experts' stacked. Find the A' (E*r, in) of one plain LoRA:
#    A'  =  A_g + S,   S = argmin  mean over tokens of  w || g(x) * A x - (A_g + S) x ||^2  +  pull
#    A_g =  each A_e times its mean gate,   pull = 0.01 || S ||^2 times the mean square of w^(1/2) x
#    w   =  0.01 + 0.99 || dL / dy ||^2 / mean,   y = what the matrix writes, L = the answers' loss
def linear_fit(layer: Mixture, x: Tensor, w: Tensor) -> Tensor:
    """A' from tokens x (N, in) with weights w (N,)."""
    g, root = layer.gates(x), w.sqrt()[:, None]                              # (N, E), (N, 1)
    A_g = torch.cat([A * (w @ g[:, e]) / w.sum() for e, A in enumerate(layer.lora_A)])
    wanted = torch.cat([g[:, e, None] * (x @ A.T) for e, A in enumerate(layer.lora_A)], dim=1)
    missed, x = root * (wanted - x @ A_g.T), root * x
    # The pull is `in` more equations: each entry of S, times its root, is 0.
    pull = (0.01 * x.square().sum(dim=0).mean()).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
    S = torch.linalg.lstsq(torch.cat([x, pull]), torch.cat([missed, 0 * pull @ A_g.T]),
                           driver="gels").solution
    return A_g + S.T

def freeze(model: Decoder, samples: Sequence[Sample]) -> dict[str, float]:
    """Make each mixture one LoRA, as A' for A, gates of 1 and no router. Returns {module: residual}
    by every fourth sample, which is not fitted: || y - y' ||^2 / || y ||^2 of what experts add."""
    routed = {name: m for name, m in model.mixtures.items() if m.router is not None}
    seen: dict[Any, tuple[list[Tensor], list[Tensor]]] = {m: ([], []) for m in routed.values()}
    def watch(layer: Any, x: tuple[Tensor, ...], y: Tensor) -> None:
        seen[layer][0].append(x[0].detach())
        y.register_hook(lambda dy: seen[layer][1].append(dy.square().sum(dim=1)))
    hooks = [m.register_forward_hook(watch) for m in routed.values()]
    for sample in samples:
        answer_losses(model, *sample).sum().backward()
    for hook in hooks:
        hook.remove()
    residuals = {}
    with torch.no_grad():
        for name, layer in routed.items():
            layer.zero_grad()
            x, d = (torch.cat(parts) for parts in seen[layer])               # (N, in), (N,)
            sizes = torch.tensor([len(part) for part in seen[layer][0]])
            held = torch.arange(len(sizes)).repeat_interleave(sizes) % 4 == 1
            w = 0.01 + 0.99 * d / d.mean().clamp(min=1e-30)
            A = linear_fit(layer, x[~held], w[~held])
            y = layer.added(x[held])
            layer.lora_A.copy_(A.view_as(layer.lora_A))
            layer.router = layer.router_logits = None
            missed = y - layer.added(x[held])
            lost, energy = (w[held] @ each.square().sum(dim=1) for each in (missed, y))
            residuals[name] = (lost / energy).item() if energy > 0 else 0.0
    return residuals

# Merge: W becomes  W + scaling * the sum of all B_e^T A_e.
@torch.no_grad()
def merge(model: Decoder) -> None:
    """Merge all frozen mixtures."""
    for name, layer in model.mixtures.items():
        added = torch.stack([B.T @ A for A, B in zip(layer.lora_A, layer.lora_B)]).sum(dim=0)
        model.weights[name] = layer.weight + layer.scaling * added
    model.mixtures.clear()

# 5. Few bits (ours). Blocks of 32 weights of a row share a scale, and become integers q of b bits:
#    W_b  =  scale * q,   -2^(b-1) <= q < 2^(b-1),   where the largest weight gets q = -2^(b-1)
def integers(W: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """q (out, in), int8, and scale (out, in / 32) of W (out, in)."""
    blocks, most = W.unflatten(1, (-1, 32)), 2 ** (b - 1)            # (out, in / 32, 32)
    scale = blocks.gather(2, blocks.abs().argmax(dim=2, keepdim=True)) / -most
    scale = torch.where(scale.abs() < 2 ** -20, 2 ** -20, scale)     # all 32 may be 0
    q = (blocks / scale).round().clamp(-most, most - 1)
    return q.flatten(1).to(torch.int8), scale.squeeze(2)

# 6. ONNX, in standard operators of opset 23. Where the decoder computes, the graph writes a node,
#    which has the name of what it computes. The cache holds P tokens, to which N are added.
FLOAT, INT4, INT8, INT64 = map(TensorProto.DataType.Value, ("FLOAT", "INT4", "INT8", "INT64"))
class Graph:
    """A merged decoder; bits: {module: 4 or 8}. Other weights are float32."""
    def __init__(self, model: Decoder, bits: Mapping[str, int]):
        self.weights, self.config, self.bits = model.weights, model.config, bits
        self.nodes, self.tensors = list[Any](), list[Any]()

    def node(self, op: str, name: str, *reads: str, more: Sequence[str] = (), **how: Any) -> str:
        """A node whose outputs are `name` and `more`."""
        self.nodes.append(helper.make_node(op, reads, [name, *more], name, **how))
        return name

    def tensor(self, name: str, x: Tensor, kind: int = FLOAT) -> str:
        shape, x = x.shape, x.contiguous()
        if kind == INT4:                                 # two in a byte, the first in the low half
            x = x.flatten()[0::2] & 15 | x.flatten()[1::2] << 4
        data = ctypes.string_at(x.data_ptr(), x.nbytes)
        self.tensors.append(helper.make_tensor(name, kind, shape, data, raw=True))
        return name

    def linear(self, name: str, x: str) -> str:
        """x (1, N, in) -> (1, N, out), by W^T (in, out)."""
        W, b = self.weights[name], self.bits.get(name)
        if b is None:
            return self.node("MatMul", name, x, self.tensor(f"{name}.W", W.T))
        q, scale = integers(W, b)
        parts = (self.tensor(f"{name}.q", q.T, INT4 if b == 4 else INT8),
                 self.tensor(f"{name}.scale", scale.T))
        return self.node("MatMul", name, x, self.node(
            "DequantizeLinear", f"{name}.W", *parts, axis=0, block_size=32))

    def norm(self, name: str, x: str) -> str:
        return self.node("RMSNormalization", name, x, self.tensor(
            f"{name}.weight", self.weights[name]), epsilon=self.config.rms_norm_eps)

    def decoder(self) -> Any:
        """input_ids and position_ids (1, N), and the cache -> logits (1, V) of the last token."""
        c, value = self.config, helper.make_tensor_value_info
        H, K, C = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        turn = angles(c, c.max_position_embeddings)
        rope = self.tensor("cos", turn.cos()), self.tensor("sin", turn.sin()), "position_ids"
        inputs = [value(name, INT64, [1, "N"]) for name in ("input_ids", "position_ids")]
        outputs = [value("logits", FLOAT, [1, c.vocab_size])]
        table = self.tensor("table", self.weights["embed_tokens"])
        x = self.node("Gather", "embed_tokens", table, "input_ids")              # (1, N, D)
        for i in range(c.num_hidden_layers):
            name, y = f"layers.{i}.self_attn", self.norm(f"layers.{i}.input_layernorm", x)
            q, k, v = (self.linear(f"{name}.{part}_proj", y) for part in "qkv")
            q = self.node("RotaryEmbedding", f"{name}.q", q, *rope, num_heads=H)
            k = self.node("RotaryEmbedding", f"{name}.k", k, *rope, num_heads=K)
            past, present = ([f"{when}.{i}.key", f"{when}.{i}.value"]
                             for when in ("past_key_values", "present"))
            inputs += [value(y, FLOAT, [1, K, "P", C]) for y in past]
            outputs += [value(y, FLOAT, [1, K, "P + N", C]) for y in present]
            y = self.node("Attention", name, q, k, v, "", *past, more=present, is_causal=1,
                          q_num_heads=H, kv_num_heads=K)
            x = self.node("Add", f"{name}.x", x, self.linear(f"{name}.o_proj", y))
            name, y = f"layers.{i}.mlp", self.norm(f"layers.{i}.post_attention_layernorm", x)
            gate, up = self.linear(f"{name}.gate_proj", y), self.linear(f"{name}.up_proj", y)
            y = self.node("Mul", f"{name}.silu", gate, self.node("Sigmoid", f"{name}.act", gate))
            y = self.linear(f"{name}.down_proj", self.node("Mul", name, y, up))
            x = self.node("Add", f"{name}.x", x, y)
        x = self.node("Gather", "x", x, self.tensor("last", torch.tensor(-1), INT64), axis=1)
        tied = self.weights["lm_head"] is self.weights["embed_tokens"]
        head = table if tied else self.tensor("head", self.weights["lm_head"])
        self.node("Gemm", "logits", self.norm("norm", x), head, transB=1)        # (1, D) (V, D)^T
        graph = helper.make_graph(self.nodes, "llama", inputs, outputs, self.tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)

# 7. Generate: the likeliest token, again and again, until the one that ends an answer.
@torch.no_grad()
def greedy(logits_of: Callable[[list[int]], Tensor], prompt: list[int], end: int) -> list[int]:
    """At most 24 tokens. logits_of(tokens so far) -> logits (., V); the last row counts."""
    ids = list(prompt)
    while len(ids) < len(prompt) + 24 and (token := int(logits_of(ids)[-1].argmax())) != end:
        ids.append(token)
    return ids[len(prompt):]

def with_cache(session: InferenceSession, c: Any) -> Callable[[list[int]], Tensor]:
    """logits_of for one prompt, in onnxruntime: it computes only tokens that the cache lacks."""
    cache = [torch.zeros(1, c.num_key_value_heads, 0, c.head_dim)] * (2 * c.num_hidden_layers)
    def logits_of(ids: list[int]) -> Tensor:
        P = cache[0].shape[2]
        feeds = [torch.tensor([ids[P:]]), torch.arange(P, len(ids))[None], *cache]
        values = dict(zip((x.name for x in session.get_inputs()), map(OrtValue.from_dlpack, feeds)))
        logits, *cache[:] = map(torch.from_dlpack, session.run_with_ort_values(None, values))
        return logits
    return logits_of

# 8. Files: the checkpoint of a Llama, its tokenizer, and the lines of a task.
def load(folder: Path) -> tuple[Decoder, Callable[[str], list[int]], Callable[[list[int]], str]]:
    """A decoder in float32; text to tokens; tokens to text. Raises ValueError for other models."""
    raw = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "bos_token_id": None,
           **json.loads((folder / "config.json").read_text(encoding="utf-8"))}
    raw |= raw.get("rope_parameters") or {}
    plain = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False,
             "mlp_bias": False, "rope_scaling": None, "rope_type": "default"}
    if other := {key: raw[key] for key in plain if raw.get(key, plain[key]) != plain[key]}:
        raise ValueError(f"only a plain Llama is implemented, not {other}")
    c = SimpleNamespace(**{"head_dim": raw["hidden_size"] // raw["num_attention_heads"]} | raw)
    weights = {name.removeprefix("model.").removesuffix(".weight"): x.float()
               for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    weights.setdefault("lm_head", weights.get("embed_tokens", torch.empty(0)))       # tied
    odd = any(W.shape[1] % 32 for name, W in weights.items() if "_proj" in name)
    if odd or (len(weights), *weights.get("layers.0.self_attn.k_proj", torch.empty(0)).shape) != (
            9 * c.num_hidden_layers + 3, c.num_key_value_heads * c.head_dim, c.hidden_size):
        raise ValueError("its *.safetensors are not what config.json describes, in rows of 32")
    if c.vocab_size == 259:                      # bytes, and three special tokens
        return (Decoder(c, weights), lambda text: [*text.encode()],
                lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace"))
    from tokenizers import Tokenizer
    text = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return Decoder(c, weights), lambda t: text.encode(t, add_special_tokens=False).ids, text.decode

def read_samples(file: Path, encode: Callable[[str], list[int]], c: Any) -> list[Sample]:
    """A task, from lines {"prompt": "...", "completion": "..."}."""
    samples, begin = [], [c.bos_token_id] * (c.bos_token_id is not None)
    for number, text in enumerate(file.read_text(encoding="utf-8").strip().split("\n"), 1):
        try:
            line = json.loads(text)
            prompt, answer = f"User: {line['prompt']}\nAssistant:", " " + line["completion"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{file}, line {number}: no text prompt and completion") from None
        ids = [*begin, *encode(prompt + answer), c.eos_token_id]
        samples.append((torch.tensor(ids), len(begin + encode(prompt))))
    return samples

def main() -> None:
    """9. All of it. The first line of each task is asked, and not trained on."""
    torch.manual_seed(0)
    toy, file = Path(__file__).parent / "data" / "toy_base", Path("reference.onnx")
    folder, *files = map(Path, sys.argv[1:] or (toy, *sorted(toy.glob("*.jsonl"))))
    try:
        model, encode, decode = load(folder)
        tasks = {str(file): read_samples(file, encode, model.config) for file in files}
        if min(map(len, tasks.values()), default=0) < 2 or file.exists():
            raise ValueError(f"a task takes two lines or more, and {file} must be new")
        c, prompts = model.config, [ids[:n].tolist() for (ids, n), *_ in tasks.values()]
        before = [greedy(model, prompt, c.eos_token_id) for prompt in prompts]
    except Exception as e:
        sys.exit(f"cannot take {folder}: {type(e).__name__}: {e}")
    training = {task: samples[1:] for task, samples in tasks.items()}
    weights = {name: W.requires_grad_() for name, W in model.weights.items() if "_proj" in name}
    scores = {task: sensitivity(weights, (answer_losses(model, *s).mean() for s in samples[:16]))
              for task, samples in training.items()}
    groups = [[name for name in weights if part in name] for part in ("self_attn", "mlp")]
    experts = {name: max(1, E) for name, E in vote(scores, groups, keep=0.6).items()}
    add_experts(model, experts)
    print(f"1, 2. probe and vote: {sum(experts.values())} experts on {len(experts)} matrices")
    pool = [sample for samples in training.values() for sample in samples]
    order = [pool[i] for _ in range(3) for i in torch.randperm(len(pool)).tolist()]
    batches = [order[i:i + 8] for i in range(0, len(order), 8)]
    curve, residuals = train(model, batches, peak=4e-3)
    print(f"3. train: {len(curve)} steps, loss {curve[0]:.3f} to {curve[-1]:.3f}")
    print(f"4. freeze, on the way: worst residual {max(residuals.values(), default=0):.2%}")
    trained = [greedy(model, prompt, c.eos_token_id) for prompt in prompts]
    merge(model)
    size = file.write_bytes(Graph(model, dict.fromkeys(weights, 4)).decoder().SerializeToString())
    shipped = [greedy(with_cache(InferenceSession(file), c), prompt, c.eos_token_id)
               for prompt in prompts]
    print(f"5 to 7. ONNX, in 4 bits: {file}, {size / 1e6:.1f} MB")
    for texts in zip(prompts, before, trained, shipped):
        print("\n{}\n  before training: {}\n  trained:         {}\n  onnxruntime:     {}".format(
            *(decode(ids).strip() for ids in texts)))

if __name__ == "__main__":
    main()
